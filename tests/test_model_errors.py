"""The tree of errors is the one its docstring draws."""

import re

import pytest

from model import errors
from model.errors import ContractMismatch, ImageTooLarge, InputError, QueueFull, UsegError


def list_tree(root: type[UsegError], depth: int = 0) -> list[tuple[int, str]]:
    """Depth and name of `root` and of all errors below it that `model.errors` defines, as a reader meets them."""
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [(depth, root.__name__), *(entry for child in children for entry in list_tree(child, depth + 1))]


def test_the_docstring_draws_the_tree_that_the_module_defines() -> None:
    _, drawing = (errors.__doc__ or "").split("\n\n", maxsplit=1)
    drawn = [re.findall(r"^([│├└─ ]*)(\w+)", line)[0] for line in drawing.strip().splitlines()]
    assert [(len(branch) // 3, name) for branch, name in drawn] == list_tree(UsegError)


def test_every_error_says_in_its_docstring_what_it_means() -> None:
    undocumented = [name for _, name in list_tree(UsegError) if not getattr(errors, name).__doc__]
    assert undocumented == []


def test_an_oversized_image_is_the_callers_fault_and_a_broken_contract_is_not() -> None:
    assert issubclass(ImageTooLarge, InputError)
    assert not issubclass(ContractMismatch, InputError)


def test_busy_carries_the_seconds_to_wait_next_to_its_message() -> None:
    error = QueueFull("the queue is full", retry_after_s=3)
    assert (str(error), error.retry_after_s) == ("the queue is full", 3)


def test_busy_cannot_be_raised_without_a_time_to_wait() -> None:
    with pytest.raises(TypeError, match="retry_after_s"):
        QueueFull("the queue is full")  # type: ignore[call-arg]
