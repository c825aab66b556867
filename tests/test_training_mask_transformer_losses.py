"""Losses of the mask transformer, with values known by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_logs import read_csv_log
from tiny import SIDE_PX
from torch import Tensor

from model.checkpoints.runs import load_run
from model.networks.interface import normalize
from model.networks.mask_transformer import AuxOutput, DecoderOutput, MaskTransformer
from training.data.dataset import PseudoLabelDataset
from training.data.features import FeatureCache, load_padded, open_cache
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.mask_transformer.losses import (
    MatchedPairs,
    class_loss,
    mask_losses,
    mask_transformer_losses,
)
from training.mask_transformer.samples import Targets
from training.train import train
from training.trainer.config import RunOptions
from training.trainer.loggers import LOSSES_FILE
from training.trainer.task import IGNORE_INDEX

SIDE = 8


def draw_target(*boxes: tuple[int, int, int, int], clusters: list[int]) -> Targets:
    masks = torch.zeros(len(boxes), SIDE, SIDE)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return Targets(
        pixels=torch.zeros(1, 3, 4 * SIDE, 4 * SIDE, dtype=torch.uint8),
        masks=masks,
        image_indices=torch.zeros(len(boxes), dtype=torch.int64),
        clusters=torch.tensor(clusters, dtype=torch.int64),
        weights=torch.ones(len(boxes)),
        semantic=torch.ones(1, SIDE, SIDE, dtype=torch.int64),
        is_labeled=torch.ones(1, SIDE, SIDE, dtype=torch.bool),
    )


def predict(target: Targets, order: list[int], queries: int = 4, sharpness: float = 12.0) -> DecoderOutput:
    """A nearly perfect output: target i is predicted by query order[i], the other queries are empty and no-object."""
    masks = torch.full((1, queries, SIDE, SIDE), -sharpness)
    classes = torch.zeros(1, queries, 4)
    classes[..., -1] = sharpness
    for mask, cluster, query in zip(target.masks, target.clusters, order, strict=True):
        masks[0, query] = (mask * 2 - 1) * sharpness
        classes[0, query, -1] = 0.0
        classes[0, query, cluster] = sharpness
    semantic = torch.zeros(1, 3, SIDE, SIDE)
    semantic[:, 1] = sharpness
    quality = torch.full((1, queries), sharpness)
    layers = (AuxOutput(class_logits=classes, mask_logits=masks),)
    return DecoderOutput(
        class_logits=classes, iou_logits=quality, mask_logits=masks, semantic_logits=semantic, aux_outputs=layers
    )


def test_a_perfect_output_has_small_losses_and_a_wrong_one_large_ones() -> None:
    target = draw_target((0, 4, 0, 4), (4, 8, 2, 7), clusters=[2, 0])
    right = mask_transformer_losses(predict(target, [3, 1]), target)
    for name in ("mask", "dice", "quality", "semantic"):
        assert float(right.terms[name]) < 1e-3
    wrong = predict(draw_target((4, 8, 4, 8), (0, 4, 4, 8), clusters=[0, 2]), [1, 3])
    assert float(mask_transformer_losses(wrong, target).total) > 10 * float(right.total)


def test_mask_losses_by_hand() -> None:
    logits = torch.zeros(1, 2, 2)
    cross_entropy, dice = mask_losses(logits, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.ones(1))
    assert float(cross_entropy) == pytest.approx(math.log(2))
    assert float(dice) == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


def compute_class_loss(logits: Tensor, weight: float, *is_labeled: bool, no_object_from_score: float = 0.0) -> float:
    """The class loss of the queries of one image, the first of which is matched with cluster 0."""
    pairs = MatchedPairs(
        images=torch.tensor([0]),
        queries=torch.tensor([0]),
        masks=torch.ones(1, 1, 1),
        clusters=torch.tensor([0]),
        weights=torch.tensor([weight]),
        is_in_labeled_area=torch.tensor([is_labeled]),
    )
    return float(class_loss(logits[None], pairs, no_object_from_score))


def test_unmatched_queries_have_a_tenth_of_the_weight_or_none_in_unlabeled_areas() -> None:
    even, no_object = torch.zeros(3), torch.tensor([0.0, 0.0, 50.0])
    logits = torch.stack([even, even, torch.tensor([50.0, 0.0, 0.0])])
    assert compute_class_loss(logits, 0.5, True, True, False) == pytest.approx(math.log(3))
    assert compute_class_loss(logits[:2], 0.5, True, True) == pytest.approx(math.log(3))
    wrong = 50.0 * (0.9 + 2 * 0.1 / 3)  # label smoothing: a third of the tenth belongs to the predicted class
    expected = (0.6 * math.log(3) + 0.1 * wrong) / 0.7
    assert compute_class_loss(logits, 0.5, True, True, True) == pytest.approx(expected)
    assert compute_class_loss(torch.stack([no_object, no_object]), 0.25, True, False) == pytest.approx(wrong)


@pytest.mark.parametrize("weight", [0.2, 0.6])
def test_no_object_from_score_makes_the_weight_the_best_object_probability(weight: float) -> None:
    probabilities = torch.linspace(0.02, 0.98, 49)
    logits = torch.stack([probabilities.log(), (1.0 - probabilities).log()], 1)
    losses = [compute_class_loss(each[None], weight, True, no_object_from_score=1.0) for each in logits]
    # Label smoothing by a tenth moves it a tenth of the way to one half.
    best = float(probabilities[losses.index(min(losses))])
    assert best == pytest.approx(0.9 * weight + 0.05, abs=0.011)
    without = [compute_class_loss(each[None], weight, True) for each in logits]
    assert float(probabilities[without.index(min(without))]) == pytest.approx(0.95, abs=0.011)


def test_an_unmatched_query_on_unlabeled_pixels_gets_no_class_gradient() -> None:
    target = draw_target((0, 4, 0, 4), clusters=[2])
    target.is_labeled[:] = False
    target.is_labeled[0, :4] = True
    output = predict(target, [1])
    output.mask_logits[0, 0, 5:, :] = 12.0
    output.mask_logits[0, 3, :4, 4:] = 12.0
    logits = output.class_logits.requires_grad_()
    mask_transformer_losses(output._replace(aux_outputs=()), target).terms["classes"].backward()
    gradient = logits.grad
    assert gradient is not None
    assert gradient[0].abs().sum(1).gt(0).tolist() == [False, True, True, True]  # the mask of query 2 is empty


def test_losses_are_computed_in_fp32() -> None:
    target = draw_target((0, 4, 0, 4), (4, 8, 2, 7), clusters=[2, 0])
    full = predict(target, [3, 1], sharpness=2.0)
    half = full._replace(mask_logits=full.mask_logits.bfloat16(), class_logits=full.class_logits.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        losses = mask_transformer_losses(half, target)
    assert losses.total.dtype == torch.float32
    assert torch.equal(losses.total, mask_transformer_losses(full, target).total)  # bf16 holds 2 and 0 exactly


def test_metrics_are_not_part_of_the_total() -> None:
    target = draw_target((0, 4, 0, 4), clusters=[2])
    semantic = target.semantic.clone()
    semantic[0, :4] = IGNORE_INDEX
    semantic[0, 4:6] = 2  # half of the labeled pixels have another class than the prediction
    output = predict(draw_target((0, 4, 0, 2), clusters=[2]), [1])
    losses = mask_transformer_losses(output, replace(target, semantic=semantic))
    assert {name: float(value) for name, value in losses.metrics.items()} == {"iou": 0.5, "stuff": 0.5}
    terms = losses.as_floats()
    assert terms["total"] == pytest.approx(sum(terms[name] for name in terms if name not in ("total", "iou", "stuff")))


TINY = MASK_TRANSFORMER_PRESETS["tiny"]
PIXELS = replace(
    TINY,
    inputs="pixels",
    crop_prob=1.0,
    copy_paste_prob=1.0,
    target_source="instances",
    droploss=True,
)


@pytest.fixture
def cache(tiny_store: PseudoLabelDataset) -> FeatureCache:
    config = tiny_store.read_config()
    return open_cache(tiny_store.features, config.encoder_hash, config.side_px)


@pytest.fixture
def network(tiny_run: Path) -> MaskTransformer:
    network = load_run(tiny_run)[1]
    assert isinstance(network, MaskTransformer)
    return network


def test_training_on_pixels_needs_no_features_and_is_reproducible(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    for name in ("first", "second"):
        assert train(tiny_store, RunOptions(out=tmp_path / name, features=tmp_path / "missing"), PIXELS).step == 4
    first = read_csv_log(tmp_path / "first" / LOSSES_FILE)
    assert first == read_csv_log(tmp_path / "second" / LOSSES_FILE)
    load_run(tmp_path / "first")


def test_training_in_bf16_is_close_to_fp32(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    totals = []
    for precision in ("fp32", "bf16"):
        config = replace(PIXELS, max_steps=1, precision=precision)
        train(tiny_store, RunOptions(out=tmp_path / precision, features=tmp_path / "missing"), config)
        totals.append(read_csv_log(tmp_path / precision / LOSSES_FILE)["total"][0])
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)  # bf16 has eight bits; matches may differ


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = MaskTransformerTrainConfig(max_steps=100, warmup_ratio=0.1)
    factors = [config.lr_factor(step) for step in (0, 9, 55, 99)]
    assert factors == pytest.approx([0.1, 1.0, 0.5, 0.0], abs=0.01)


def test_a_decoder_on_cached_features_agrees_with_the_network_on_the_photo(
    tiny_store: PseudoLabelDataset, network: MaskTransformer, cache: FeatureCache
) -> None:
    photos = tiny_store.read_photos()[:3]
    maps = [torch.from_numpy(np.array(cache.read(photo.digest))).flatten(1, 2) for photo in photos]
    pixels = torch.from_numpy(np.stack([load_padded(SIDE_PX, photo) for photo in photos]))
    with torch.inference_mode():
        output = network.decoder(torch.stack(maps, 1).float(), normalize(pixels))
        raw = network(pixels, torch.full((3, 2), SIDE_PX))
    # The cache holds features in fp16.
    torch.testing.assert_close(output.semantic_logits, raw.semantic, atol=0.02, rtol=0.02)
    torch.testing.assert_close(output.mask_logits.sigmoid(), raw.masks, atol=0.01, rtol=0.0)
    assert (output.semantic_logits[0] - output.semantic_logits[1]).abs().max() > 0.1  # photos differ
