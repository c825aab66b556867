"""Synthetic features for tests."""

import numpy as np
from torch import nn

from model.contract import InputSize
from model.images import plan_letterbox
from training.data.features import PhotoFeatures

PATCH_PX = 14


def draw(objects: list[tuple[slice, slice]], size: int = 20) -> np.ndarray:
    """Noisy tokens: the background has one direction, each object another."""
    tokens = np.random.default_rng(0).normal(0, 0.1, (size, size, 8))
    tokens[..., 0] += 1.0
    for index, where in enumerate(objects, start=1):
        tokens[where] -= [1.0, *[0.0] * 7]
        tokens[(*where, index)] += 1.0
    return tokens


def make_photo_features(maps: np.ndarray, height: int = 56, width: int = 56) -> PhotoFeatures:
    """Features of one photo on a 56 px square of 14 px patches; `maps` are two layers, 2 4 4 C."""
    half = maps.astype(np.float16)
    return PhotoFeatures(
        letterbox=plan_letterbox(height, width, [InputSize.square(4 * PATCH_PX)], 4),
        last_block=half[-1],
        layers=tuple(half),
        norm=nn.LayerNorm(maps.shape[-1]),
    )
