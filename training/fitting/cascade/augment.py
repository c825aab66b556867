"""Labelled photos mirrored, pasted into each other and laid side by side, as tensors on any device."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

from model.network.mask_transformer import bound
from training.fitting.cascade.matching import Objects
from training.fitting.cascade.recipe import Pasting
from training.fitting.loop.trainee import IGNORE

_MOST_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True)
class Example:
    """One photo with its labels; `inputs` are its pixels, or what an encoder made of cells of them."""

    inputs: Tensor
    """uint8 3 H W, or floating C H/cell W/cell."""
    cell_px: int
    masks: Bool[Tensor, "M H W"]
    clusters: Int[Tensor, "M"]
    """Counted from 0."""
    semantic: Int[Tensor, "H W"]
    """0 things, s stuff cluster s, IGNORE elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A batch on one canvas."""

    inputs: Tensor
    """B C h w, zeros where there is no photo."""
    sizes: Int[Tensor, "B 2"]
    objects: tuple[Objects, ...]


def mirror(example: Example) -> Example:
    """Left and right exchanged."""
    inputs, masks, semantic = (each.flip(-1) for each in (example.inputs, example.masks, example.semantic))
    return replace(example, inputs=inputs, masks=masks, semantic=semantic)


def paste_across(
    examples: tuple[Example, ...], pasting: Pasting, least_ratio: float, generator: np.random.Generator
) -> tuple[Example, ...]:
    """Each example with objects of another one of the batch.

    `any`: of the one as far from the end as it is from the beginning (CutLER's copy-paste). `semantic`: of one that
    has a cluster in common, and objects of such clusters alone (U2Seg, equation 4).
    """
    pasted = []
    for place, example in enumerate(examples):
        source = examples[-1 - place]
        if pasting == "semantic":
            source = _choose_kin(example, examples, generator)
        pasted.append(example if pasting == "none" else paste_objects(example, source, least_ratio, generator))
    return tuple(pasted)


def _choose_kin(example: Example, examples: tuple[Example, ...], generator: np.random.Generator) -> Example:
    """Another example with some of the same clusters, and only its objects of those; without objects if none has."""
    kin = []
    for other in examples:
        is_common = torch.isin(other.clusters, example.clusters)
        if other is not example and is_common.any():
            kin.append(replace(other, masks=other.masks[is_common], clusters=other.clusters[is_common]))
    return kin[int(generator.integers(len(kin)))] if kin else replace(example, masks=example.masks[:0])


def paste_objects(example: Example, source: Example, least_ratio: float, generator: np.random.Generator) -> Example:
    """The example with some of the source's objects, at a random size and place.

    CutLER's copy-paste (cutler/data/detection_utils.py and engine/train_loop.py): all but one of the objects at most,
    the whole source squeezed to a share of the example's size, one shift for all. As there, an object that would
    cover half of one that is there is left out. Unlike there, boxes are shifted as masks are, and where `inputs` are
    features sizes and shifts are whole cells.
    """
    count = len(source.masks)
    if not count:
        return example
    kept = 1 if count == 1 else int(generator.integers(1, count))
    chosen = torch.from_numpy(generator.permutation(count)[:kept]).to(source.masks.device)
    ratio, cell = generator.uniform(least_ratio, 1.0), example.cell_px
    rows, columns = (max(1, round(ratio * length / cell)) for length in example.masks.shape[1:])
    top, left = (
        int(generator.integers(length // cell - cells + 1))
        for length, cells in zip(example.masks.shape[1:], (rows, columns), strict=True)
    )
    frame = (slice(None), slice(top, top + rows), slice(left, left + columns))
    inputs, masks = torch.zeros_like(example.inputs), example.masks.new_zeros(kept, *example.masks.shape[1:])
    inputs[frame] = _resize(source.inputs, rows, columns)
    wide = tuple(slice(each.start * cell, each.stop * cell) for each in frame[1:])
    small = functional.interpolate(
        source.masks[chosen][None].to(torch.uint8), size=(rows * cell, columns * cell), mode="nearest-exact"
    )
    masks[(slice(None), *wide)] = small[0].bool()
    return _lay_over(example, inputs, masks, source.clusters[chosen])


def _resize(inputs: Tensor, rows: int, columns: int) -> Tensor:
    resized = functional.interpolate(
        inputs[None].float(), size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resized.round().clamp(0, 255).to(torch.uint8) if inputs.dtype == torch.uint8 else resized.to(inputs.dtype)


def _lay_over(example: Example, inputs: Tensor, masks: Bool[Tensor, "N H W"], clusters: Int[Tensor, "N"]) -> Example:
    """The example with what `masks` show of other inputs; its own masks lose that, and vanish if nothing is left."""
    flat, own = masks.flatten(1).float(), example.masks.flatten(1).float()
    with torch.autocast(flat.device.type, enabled=False):
        covered = flat @ own.T / own.sum(1).clamp(min=1.0)  # N M
    is_kept = (covered < _MOST_OVERLAP).all(1) & (flat.sum(1) > 0)
    masks, clusters = masks[is_kept], clusters[is_kept]
    pasted = masks.any(0)
    remaining = torch.cat([example.masks & ~pasted, masks])
    is_seen = remaining.flatten(1).any(1)
    share = functional.avg_pool2d(pasted[None].float(), example.cell_px)[0]
    return replace(
        example,
        inputs=torch.where(share >= 0.5, inputs, example.inputs),
        masks=remaining[is_seen],
        clusters=torch.cat([example.clusters, clusters])[is_seen],
        semantic=torch.where(pasted, 0, example.semantic),
    )


def lay_out(examples: tuple[Example, ...], multiple_px: int) -> Laid:
    """All on a canvas as large as the largest, its sides rounded up."""
    height, width = (
        -(-max(each.masks.shape[axis] for each in examples) // multiple_px) * multiple_px for axis in (1, 2)
    )
    inputs, objects = [], []
    for each in examples:
        below, right = height - each.masks.shape[1], width - each.masks.shape[2]
        inputs.append(functional.pad(each.inputs, (0, right // each.cell_px, 0, below // each.cell_px)))
        masks = functional.pad(each.masks, (0, right, 0, below))
        semantic = functional.pad(each.semantic, (0, right, 0, below), value=IGNORE)
        boxes = bound(masks[None])[0]
        objects.append(Objects(boxes=boxes, masks=masks, clusters=each.clusters, semantic=semantic))
    sizes = torch.tensor([each.masks.shape[1:] for each in examples], device=examples[0].inputs.device)
    return Laid(inputs=torch.stack(inputs), sizes=sizes, objects=tuple(objects))
