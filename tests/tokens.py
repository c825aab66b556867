"""Drawn features."""

import numpy as np


def draw(objects: list[tuple[slice, slice]], size: int = 20) -> np.ndarray:
    """Noisy tokens: the ground points one way, each object another."""
    tokens = np.random.default_rng(0).normal(0, 0.1, (size, size, 8))
    tokens[..., 0] += 1.0
    for place, where in enumerate(objects, start=1):
        tokens[where] -= [1.0, *[0.0] * 7]
        tokens[(*where, place)] += 1.0
    return tokens
