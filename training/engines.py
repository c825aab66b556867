"""What carries the work on many photos: this process alone, or several beside each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from model.errors import ConfigError
from training.progress import Progress

Item = TypeVar("Item")
_Item = TypeVar("_Item", contravariant=True)


class Worker(Protocol[_Item]):
    """A dataclass that is sent to each process: small, it opens there what is large, and what it makes goes to disk."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    unit: ClassVar[str]
    """What an item is called."""

    def work(self, stage: Any, group: Sequence[_Item], /) -> Iterator[int]:
        """Do what a stage, of which each worker has its own, lacks for these items; gives how many are done."""
        ...


class Engine(Protocol):
    """Runs one stage over groups of items, and returns once all is on disk."""

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None: ...


class LocalEngine:
    """One group after the other, here."""

    def run(self, worker: Worker[Item], stage: str, groups: Sequence[Sequence[Item]]) -> None:
        with Progress(stage, sum(map(len, groups)), unit=worker.unit) as progress:
            for group in groups:
                for count in worker.work(stage, group):
                    progress.advance(count)


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of the work, counted from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ConfigError(f"a part is one of 0/{self.count} to {self.count - 1}/{self.count}, not {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def choose(self, groups: Sequence[Item]) -> Sequence[Item]:
        """Every `count`-th group."""
        return groups[self.number :: self.count]


WHOLE = Part(0, 1)


def read_part(text: str) -> Part:
    """The part that `3/16` names. Raises ConfigError for anything else."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(count)):
        raise ConfigError(f"a part is given as 3/16, the fourth of sixteen; got {text!r}")
    return Part(int(number), int(count))
