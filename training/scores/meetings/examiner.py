"""A labelled set held against a source by any number of processes."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from model.files import hash_file
from training.engines import WHOLE, Engine, Part
from training.scores.meetings.answers import LEAST_SCORE, Source, open_source
from training.scores.meetings.comparison import Comparison, compare
from training.scores.meetings.comparison_file import GROUP, StoredComparisons, write_comparisons
from training.scores.sets.truth import Truth, TruthPicture

FORMAT_VERSION = 1
_HASH_DIGITS = 16
_TELLING = (".json", ".npz", ".onnx", ".safetensors")
"""Files of a source that its answers depend on."""

Stage = Literal["evaluate"]
Group = Sequence[TruthPicture]


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Everything is on disk: whoever has the same goes on with it, in another process or on another machine."""

    source: Path
    """A run, an artifact or a store."""
    threads: int
    truth: Truth
    """The set without its pictures, which come in groups."""
    folder: Path
    """Of the files of comparisons."""
    unit: ClassVar[str] = "picture"

    def work(self, stage: Stage, pictures: Group) -> Iterator[int]:
        """Hold the source against these pictures, unless that was done before; gives how many are done."""
        path = self.place(pictures)
        if path.is_file():
            yield len(pictures)
            return
        comparisons: list[Comparison] = []
        for each in pictures:
            comparisons.append(compare(each, self.truth, self.opened))
            yield 1
        write_comparisons(path, comparisons)

    def place(self, pictures: Group) -> Path:
        """The file of these pictures, written or not; its name is the hash of all that it depends on."""
        files = [path.stat() for each in pictures for path in (each.path, *each.annotation.files)]
        content = [
            FORMAT_VERSION, self.made_from, LEAST_SCORE, repr(self.truth), [repr(each) for each in pictures],
            [(each.st_size, each.st_mtime_ns) for each in files],
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_HASH_DIGITS]
        return self.folder / f"{name}.json"

    @cached_property
    def opened(self) -> Source:
        return open_source(self.source, threads=self.threads)

    @cached_property
    def made_from(self) -> str:
        """One hash over the files of the source."""
        files = sorted(path for path in self.source.iterdir() if path.suffix in _TELLING)
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


def examine(
    examiner: Examiner, pictures: Sequence[TruthPicture], engine: Engine, part: Part = WHOLE
) -> StoredComparisons:
    """Every picture of the set in its order, or every so many of a part's groups."""
    groups = part.choose([pictures[start : start + GROUP] for start in range(0, len(pictures), GROUP)])
    engine.run(examiner, "evaluate", groups)
    return StoredComparisons(files=[examiner.place(each) for each in groups], places=range(sum(map(len, groups))))
