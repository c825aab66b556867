import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.networks.mask_transformer import AuxOutput, DecoderOutput
from training.mask_transformer.feature_dataset import Target
from training.mask_transformer.losses import (
    MatchedPairs,
    class_loss,
    compute_losses,
    is_in_labeled_area,
    mask_losses,
    match,
    measure_iou,
    semantic_loss,
)
from training.trainer.task import IGNORE_INDEX

CELLS = 8


def draw_target(*boxes: tuple[int, int, int, int], clusters: list[int]) -> Target:
    masks = torch.zeros(len(boxes), CELLS, CELLS)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    semantic = torch.ones(CELLS, CELLS, dtype=torch.int64)
    return Target(
        masks=masks,
        clusters=torch.tensor(clusters, dtype=torch.int64),
        weights=torch.ones(len(boxes)),
        semantic=semantic,
        known=torch.ones(CELLS, CELLS, dtype=torch.bool),
    )


def predict(target: Target, order: list[int], queries: int = 4, sharpness: float = 12.0) -> DecoderOutput:
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
    layers = (AuxOutput(class_logits=classes, mask_logits=masks),)
    return DecoderOutput(
        class_logits=classes, iou_logits=quality, mask_logits=masks, semantic_logits=semantic, aux_outputs=layers
    )


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
    cross, dice = mask_losses(logits, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.ones(1))
    assert float(cross) == pytest.approx(math.log(2))
    assert float(dice) == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


def test_a_pair_counts_by_the_weight_of_its_target() -> None:
    logits = torch.stack([torch.zeros(2, 2), torch.full((2, 2), 50.0)])
    masks = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    cross, dice = mask_losses(logits, masks, torch.tensor([0.25, 0.75]))
    assert float(cross) == pytest.approx(0.25 * math.log(2))
    assert float(dice) == pytest.approx(0.25 * (1 - 1 / (2 + 1)))
    assert float(mask_losses(logits[:0], masks[:0], torch.ones(0))[0]) == 0.0


def compare(logits: Tensor, weight: float, *known: bool, doubt: float = 0.0) -> float:
    """The class loss of queries of one picture, the first of them matched with cluster 0."""
    matches = MatchedPairs(
        images=torch.tensor([0]),
        queries=torch.tensor([0]),
        masks=torch.ones(1, 1, 1),
        clusters=torch.tensor([0]),
        weights=torch.tensor([weight]),
        vectors=None,
        is_known=torch.tensor([known]),
    )
    return float(class_loss(logits[None], matches, doubt))


def test_a_matched_query_counts_by_its_weight_and_others_by_a_tenth_or_not_at_all() -> None:
    even, none = torch.zeros(3), torch.tensor([0.0, 0.0, 50.0])
    logits = torch.stack([even, even, torch.tensor([50.0, 0.0, 0.0])])
    assert compare(logits, 0.5, True, True, False) == pytest.approx(math.log(3))
    assert compare(logits[:2], 0.5, True, True) == pytest.approx(math.log(3))
    wrong = 50.0 * (0.9 + 2 * 0.1 / 3)  # smoothed: all but the third of the tenth that its class deserves
    assert compare(logits, 0.5, True, True, True) == pytest.approx((0.6 * math.log(3) + 0.1 * wrong) / 0.7)
    assert compare(torch.stack([none, none]), 0.25, True, False) == pytest.approx(wrong)


def test_with_doubt_the_best_chance_of_an_object_is_the_weight_of_its_label() -> None:
    chances = torch.linspace(0.02, 0.98, 49)
    logits = torch.stack([chances.log(), (1.0 - chances).log()], 1)
    for weight in (0.2, 0.6):
        losses = [compare(each[None], weight, True, doubt=1.0) for each in logits]
        # Smoothing by a tenth brings it a tenth of the way to a half.
        assert float(chances[losses.index(min(losses))]) == pytest.approx(0.9 * weight + 0.05, abs=0.011)
        surest = [compare(each[None], weight, True) for each in logits]
        assert float(chances[surest.index(min(surest))]) == pytest.approx(0.95, abs=0.011)


def test_a_mask_is_known_if_at_least_half_of_it_is_and_an_empty_one_is() -> None:
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[0, :2] = True
    low = torch.full((1, 4, 4, 4), -5.0)
    low[0, 0, 0] = 5.0
    low[0, 1, 1:3] = 5.0
    low[0, 2, 1:4] = 5.0
    assert is_in_labeled_area(low.flatten(2), known).tolist() == [[True, True, False, True]]


def test_a_query_that_drew_what_has_no_label_is_free_and_learns_nothing_of_classes() -> None:
    target = draw_target((0, 4, 0, 4), clusters=[2])
    target.known[:] = False
    target.known[:4] = True
    prediction = predict(target, [1])
    prediction.mask_logits[0, 0, 5:, :] = 12.0
    prediction.mask_logits[0, 3, :4, 4:] = 12.0
    logits = prediction.class_logits.requires_grad_()
    compute_losses(prediction._replace(aux_outputs=()), (target,)).classes.backward()
    gradient = logits.grad
    assert gradient is not None
    assert gradient[0].abs().sum(1).gt(0).tolist() == [False, True, True, True]  # query 2 drew nothing


def test_a_prediction_of_few_bits_is_compared_in_full() -> None:
    target = draw_target((0, 4, 0, 4), (4, 8, 2, 7), clusters=[2, 0])
    full = predict(target, [3, 1], sharpness=2.0)
    half = full._replace(masks=full.masks.bfloat16(), classes=full.classes.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute_losses(half, (target,))
    assert losses.total.dtype == torch.float32
    assert torch.equal(losses.total, compute_losses(full, (target,)).total)  # 2 and 0 need few bits


def test_an_embedding_costs_one_less_its_cosine_by_the_weight_of_its_target() -> None:
    target = replace(
        draw_target((0, 4, 0, 4), (4, 8, 2, 7), clusters=[2, 0]),
        vectors=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        weights=torch.tensor([0.25, 0.75]),
    )
    embeddings = torch.zeros(1, 4, 2)
    embeddings[0, 3] = torch.tensor([0.0, 5.0])  # of target 0, a right angle away
    embeddings[0, 1] = torch.tensor([3.0, 3.0])
    losses = compute_losses(predict(target, [3, 1])._replace(embeddings=embeddings), (target,))
    expected = 0.25 * 1.0 + 0.75 * (1.0 - math.sqrt(0.5))
    assert losses.as_floats()["embedding"] == pytest.approx(expected)
    without = compute_losses(predict(target, [3, 1]), (target,))
    assert "embedding" not in without.as_floats()
    assert float(losses.total) == pytest.approx(float(without.total) + expected)


def test_iou_of_half_overlapping_masks_is_a_third() -> None:
    logits = torch.tensor([[[5.0, 5.0, -5.0]]])
    assert float(measure_iou(logits, torch.tensor([[[0.0, 1.0, 1.0]]]))) == pytest.approx(1 / 3)


def test_ignored_cells_cost_nothing() -> None:
    target = draw_target(clusters=[])
    target.semantic[:] = IGNORE_INDEX
    target.semantic[0, 0] = 2
    logits = torch.zeros(1, 3, CELLS, CELLS)
    assert float(semantic_loss(logits, (target,))) == pytest.approx(math.log(3))
    target.semantic[0, 0] = IGNORE_INDEX
    assert float(semantic_loss(logits, (target,))) == 0.0


def test_the_scores_to_watch_are_no_part_of_the_sum() -> None:
    target = draw_target((0, 4, 0, 4), clusters=[2])
    semantic = target.semantic.clone()
    semantic[:4] = IGNORE_INDEX
    semantic[4:6] = 2  # half of what is known is another class than the prediction's
    losses = compute_losses(
        predict(draw_target((0, 4, 0, 2), clusters=[2]), [1]), (replace(target, semantic=semantic),)
    )
    assert (float(losses.iou), float(losses.stuff)) == (0.5, 0.5)
    terms = losses.as_floats()
    assert terms["total"] == pytest.approx(sum(terms[name] for name in terms if name not in ("total", "iou", "stuff")))
