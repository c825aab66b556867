"""What carries the work on many photos: this process alone, or several beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from model.errors import ConfigError
from training.labels.workshop import Group, Stage, Workshop
from training.progress import Progress


class Engine(Protocol):
    """Runs one stage over groups of photos, and returns once all is on disk."""

    def run(self, workshop: Workshop, stage: Stage, groups: Sequence[Group]) -> None: ...


class LocalEngine:
    """One group after the other, here."""

    def run(self, workshop: Workshop, stage: Stage, groups: Sequence[Group]) -> None:
        with Progress(stage, sum(map(len, groups)), unit="photo") as progress:
            for group in groups:
                for count in workshop.work(stage, group):
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

    def choose(self, groups: Sequence[Group]) -> Sequence[Group]:
        """Every `count`-th group."""
        return groups[self.number :: self.count]


WHOLE = Part(0, 1)


def read_part(text: str) -> Part:
    """The part that `3/16` names. Raises ConfigError for anything else."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(count)):
        raise ConfigError(f"a part is given as 3/16, the fourth of sixteen; got {text!r}")
    return Part(int(number), int(count))
