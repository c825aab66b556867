"""What a command of `useg` returned and printed, for tests that run it in their own process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int
    result: dict[str, Any]
    error: str
    """The last line of stderr."""


Run = Callable[..., Ended]


def expect_error(ended: Ended, *words: str) -> None:
    assert (ended.status, ended.result) == (1, {})
    assert ended.error.startswith("useg: ")
    assert all(word in ended.error for word in words), ended.error
