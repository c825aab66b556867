"""The families of published checkpoints that load into the panoptic cascade."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What all checkpoints of one project have in common."""

    title: str
    licence: str
    """Of the published weights."""
    thing_clusters: int | None
    """None: any number."""
    stuff_clusters: int | None
    """0: no semantic head; None: any number from 1."""

    def has(self, thing_clusters: int, stuff_clusters: int) -> bool:
        """Whether a checkpoint of this family can have these clusters."""
        is_stuff_right = stuff_clusters > 0 if self.stuff_clusters is None else stuff_clusters == self.stuff_clusters
        return is_stuff_right and self.thing_clusters in (None, thing_clusters)


FAMILIES = {
    "u2seg": Family(title="U2Seg", licence="Apache-2.0", thing_clusters=None, stuff_clusters=27),
    "cutler": Family(title="CutLER", licence="CC BY-NC-SA 4.0", thing_clusters=1, stuff_clusters=0),
    "cups": Family(title="CUPS", licence="Apache-2.0", thing_clusters=None, stuff_clusters=None),
}
"""By the word of the command line; where two fit, the first is the likelier."""


def guess_family(thing_clusters: int, stuff_clusters: int) -> str | None:
    """The family that a checkpoint with these clusters looks like."""
    return next((word for word, family in FAMILIES.items() if family.has(thing_clusters, stuff_clusters)), None)
