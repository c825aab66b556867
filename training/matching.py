"""Clusters to categories, by the pixels they share on labelled pictures."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from training.overlap import Overlap

UNMATCHED = -1


def match_by_majority(
    overlaps: Sequence[Overlap], clusters: int, thing_clusters: int, categories: int, thing_categories: int
) -> Int[np.ndarray, "N"]:
    """Cluster to category, each taking the one with which it shares most pixels: a majority vote, many to one.

    Thing clusters vote among thing categories and stuff among stuff, as in CUPS' evaluation; crowds do not vote.
    Entry c is the category of cluster c, counted as in a contract (entry 0 is unused); UNMATCHED for a cluster that
    met none.
    """
    votes = count_votes(overlaps, clusters, categories)
    votes[: thing_clusters + 1, thing_categories:] = 0
    votes[thing_clusters + 1 :, :thing_categories] = 0
    return np.where(votes.any(1), votes.argmax(1), UNMATCHED)


def count_votes(overlaps: Sequence[Overlap], clusters: int, categories: int) -> Int[np.ndarray, "N C"]:
    """Pixels shared by each cluster (rows from 1) and each category."""
    votes = np.zeros((clusters + 1, categories), np.int64)
    for overlap in overlaps:
        voters = ~overlap.is_crowd
        shared = overlap.pixels[1:, 1:][:, voters]
        for row, cluster in enumerate(overlap.predicted):
            np.add.at(votes[cluster], overlap.true[voters], shared[row])
    return votes
