"""Stored networks, images and outputs of detectron2, and tolerances for float32 rounding."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.networks.panoptic_cascade import CascadeInferenceConfig, PanopticCascade, infer_cascade_config

CASES = ("bn_image0", "bn_image1", "bn_image2", "frozen_image0")
# Measured by the reference against itself, in float64 and in a batch of two: a random deep network amplifies rounding.
SEMANTIC_NOISE = 6.5e-4
SCORE_NOISE = 9.5e-4
BOX_NOISE_PX = 0.013
MASK_NOISE = 4e-3
DEFAULTS = CascadeInferenceConfig()
_PADDING = 77


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image and everything that the reference stored about it."""

    pixels: Tensor
    """uint8 1 3 H W, padded with what must not matter."""
    sizes: Tensor
    """1 2"""
    arrays: dict[str, np.ndarray]
    card: dict[str, Any]

    def tensor(self, key: str) -> Tensor:
        """One stored array as a batch of one."""
        return torch.from_numpy(self.arrays[key])[None]


@cache
def read_case(golden: Path, name: str) -> Case:
    """Return a stored image with its outputs."""
    with np.load(golden / "detectron2" / f"{name}.npz") as stored:
        arrays = dict(stored)
    image = arrays["image_uint8"]
    pixels = np.full((1, *arrays["input"].shape), _PADDING, np.uint8)
    pixels[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    card = json.loads((golden / "detectron2" / f"{name}.json").read_text())
    return Case(pixels=torch.from_numpy(pixels), sizes=torch.tensor([image.shape[:2]]), arrays=arrays, card=card)


@cache
def read_network(golden: Path, case: str, limits: CascadeInferenceConfig = DEFAULTS) -> PanopticCascade:
    """The network that answered a case, its weights loaded name by name."""
    file = golden / "detectron2" / f"{case.split('_')[0]}_model.pth"
    state = torch.load(file, weights_only=True)["model"]
    network = PanopticCascade(infer_cascade_config(state), limits)
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


@cache
def read_units(golden: Path) -> dict[str, np.ndarray]:
    """Inputs and outputs of single operations."""
    with np.load(golden / "detectron2" / "units.npz") as stored:
        return dict(stored)


def check_near(actual: Tensor, expected: Tensor, noise: float) -> None:
    """Equal in shape, and nowhere further apart than `noise`."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=noise)
