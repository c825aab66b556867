"""What is likely a thing: a mask's votes, weighed by how often what it shows stands out elsewhere."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from training.labels.clusters.cluster import assign, cluster, whiten
from training.labels.clusters.photo_view import PhotoView
from training.labels.masks.discovery_recipe import MOST_OBJECTS
from training.labels.masks.proposals import Proposals

_PARTS = 128
_LEAST_TOKENS = 8
"""Of a part, in the mean."""
_SURE = 9.0
"""What a vote comes to if its four views agree wholly and the contrast is one."""

Salient = Callable[[PhotoView], Bool[np.ndarray, "h w"]]
"""The patches of a photo that stand out in it."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Kinds of patches, many more than stuff has clusters, and how often each stands out."""

    mean: Float[np.ndarray, "E"]
    projection: Float[np.ndarray, "E P"]
    parts: Float[np.ndarray, "K P"]
    salient: Float[np.ndarray, "K"]
    """The share of each kind's patches, over many photos, that are salient."""

    def judge(self, view: PhotoView, found: Proposals) -> Proposals:
        """The masks of a vote, the likeliest things first, scored in 0..1.

        A score is the geometric mean of the vote's share of what it may come to and of the salience of the patches'
        kinds: sky and ground agree in all views, and hardly ever stand out.
        """
        whitened = whiten(view.join(), self.mean, self.projection)
        salience = self.salient[assign(whitened, self.parts)]
        inside = found.hard
        likely = (inside * salience).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)
        scores = np.sqrt(np.clip(found.scores / _SURE, 0.0, 1.0) * likely)
        order = np.argsort(-scores, kind="stable")
        return Proposals(soft=found.soft[order], scores=scores[order].astype(np.float32))


def fit_judge(
    sample: Float[np.ndarray, "N E"],
    mean: Float[np.ndarray, "E"],
    projection: Float[np.ndarray, "E P"],
    views: Iterable[PhotoView],
    salient: Salient,
    seed: int,
) -> Judge:
    """Kinds of patches out of a sample of tokens, and how salient they are in some photos."""
    whitened = whiten(sample, mean, projection)
    parts = cluster(whitened, min(_PARTS, max(1, len(whitened) // _LEAST_TOKENS)), seed)
    counts = np.zeros((2, len(parts)), np.int64)
    for view in views:
        kinds = assign(whiten(view.join(), mean, projection), parts)
        counts[0] += np.bincount(kinds.ravel(), minlength=len(parts))
        counts[1] += np.bincount(kinds[salient(view)], minlength=len(parts))
    shares = counts[1] / np.maximum(counts[0], 1)
    return Judge(mean=mean, projection=projection, parts=parts, salient=shares)


def list_least_scores(scores: Sequence[Float[np.ndarray, "N"]]) -> Float[np.ndarray, "M"]:
    """The scores that leave 1, 2, … masks a photo in the mean, as many as a photo may hold."""
    ranked = np.sort(np.concatenate(scores))[::-1]
    if not len(ranked):
        return np.zeros(MOST_OBJECTS)
    places = np.arange(1, 1 + MOST_OBJECTS) * len(scores) - 1
    least: Float[np.ndarray, "M"] = ranked[np.minimum(places, len(ranked) - 1)]
    return least
