import math

import pytest
import torch

from model.network.mask_transformer import Layer, Prediction
from training.fitting.data import IGNORE, Target
from training.fitting.losses import compare_masks, compare_semantic, compute_losses, match, measure_iou

CELLS = 8


def draw_target(*boxes: tuple[int, int, int, int], clusters: list[int]) -> Target:
    masks = torch.zeros(len(boxes), CELLS, CELLS)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    semantic = torch.ones(CELLS, CELLS, dtype=torch.int64)
    return Target(masks=masks, clusters=torch.tensor(clusters, dtype=torch.int64), semantic=semantic)


def predict(target: Target, order: list[int], queries: int = 4, sharpness: float = 12.0) -> Prediction:
    """A near perfect prediction: target i drawn by query order[i], the other queries empty and "none"."""
    masks = torch.full((1, queries, CELLS, CELLS), -sharpness)
    classes = torch.zeros(1, queries, 4)
    classes[..., -1] = sharpness
    for mask, cluster, query in zip(target.masks, target.clusters, order, strict=True):
        masks[0, query] = (mask * 2 - 1) * sharpness
        classes[0, query, -1] = 0.0
        classes[0, query, cluster] = sharpness
    semantic = torch.zeros(1, 3, CELLS, CELLS)
    semantic[:, 1] = sharpness
    quality = torch.full((1, queries), sharpness)
    layers = (Layer(classes=classes, masks=masks),)
    return Prediction(classes=classes, quality=quality, masks=masks, semantic=semantic, layers=layers)


def test_every_target_is_matched_to_the_query_that_drew_it() -> None:
    target = draw_target((0, 4, 0, 4), (4, 8, 2, 7), clusters=[2, 0])
    matches = match(predict(target, [3, 1]), (target,))
    pairs = dict(zip(matches.queries.tolist(), matches.clusters.tolist(), strict=True))
    assert pairs == {3: 2, 1: 0}
    assert matches.masks[matches.queries.tolist().index(1)].sum() == 20


def test_a_perfect_prediction_costs_little_and_a_wrong_one_much() -> None:
    target = draw_target((0, 4, 0, 4), clusters=[2])
    right = compute_losses(predict(target, [1]), (target,))
    assert float(right.mask) < 1e-3
    assert float(right.dice) < 1e-3
    assert float(right.quality) < 1e-3
    assert float(right.semantic) < 1e-3
    wrong = predict(draw_target((4, 8, 4, 8), clusters=[0]), [1])
    assert float(compute_losses(wrong, (target,)).total) > 10 * float(right.total)


def test_a_photo_without_things_still_teaches_none_and_semantics() -> None:
    target = draw_target(clusters=[])
    losses = compute_losses(predict(target, []), (target,))
    assert float(losses.mask) == 0.0
    assert math.isfinite(float(losses.total))


def test_mask_losses_by_hand() -> None:
    logits = torch.zeros(1, 2, 2)
    cross, dice = compare_masks(logits, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), count=1)
    assert float(cross) == pytest.approx(math.log(2))
    assert float(dice) == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


def test_iou_of_half_overlapping_masks_is_a_third() -> None:
    logits = torch.tensor([[[5.0, 5.0, -5.0]]])
    assert float(measure_iou(logits, torch.tensor([[[0.0, 1.0, 1.0]]]))) == pytest.approx(1 / 3)


def test_ignored_cells_cost_nothing() -> None:
    target = draw_target(clusters=[])
    target.semantic[:] = IGNORE
    target.semantic[0, 0] = 2
    logits = torch.zeros(1, 3, CELLS, CELLS)
    assert float(compare_semantic(logits, (target,))) == pytest.approx(math.log(3))
    target.semantic[0, 0] = IGNORE
    assert float(compare_semantic(logits, (target,))) == 0.0
