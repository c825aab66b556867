"""Training a panoptic cascade: samples, presets, resuming, initialization and batch-norm statistics."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_reference import annotate
from run_logs import read_csv_log
from safetensors.torch import save_file
from tiny import write_labeled

from model.checkpoints.runs import read_run_info
from model.errors import CheckpointError, ConfigError
from model.files import hash_file
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig
from training.panoptic_cascade.dataset import (
    CascadeBatch,
    CascadeDataset,
    CascadeSample,
    copy_paste_batch,
    copy_paste_pair,
    pad_to_batch,
)
from training.panoptic_cascade.task import (
    CascadeTask,
    cascade_param_groups,
    init_weights,
    load_encoder_state,
)
from training.train import train
from training.trainer.config import RunOptions
from training.trainer.loggers import LOSSES_FILE
from training.trainer.task import IGNORE_INDEX, PhotoSampler
from training.trainer.trainer import Trainer

TINY = CASCADE_PRESETS["tiny"]
VIT = replace(TINY, backbone="vit")
WITH_EMA = replace(VIT, ema_decay=0.9)
SMALL_FIELDS = (
    *("stem_out_channels", "bottleneck_channels", "res2_out_channels", "fpn_channels", "box_fc_dim", "mask_conv_dim"),
    *("sem_seg_conv_dim", "min_sizes", "max_size", "batch_size", "rpn_pre_nms_topk", "rpn_post_nms_topk"),
)


def make_trainer(dataset: PseudoLabelDataset, run: Path, config: CascadeTrainConfig) -> Trainer[CascadeBatch]:
    return Trainer(CascadeTask(dataset, config), RunOptions(out=run))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset) -> Path:
    """A finished run on a frozen ViT, with averaged weights; read-only."""
    run = tmp_path_factory.mktemp("cascade") / "run"
    train(tiny_store, RunOptions(out=run), WITH_EMA)
    return run


def test_a_run_has_provenance_and_losses(finished_run: Path, tiny_store: PseudoLabelDataset) -> None:
    info = read_run_info(finished_run)
    assert (info.network, info.step) == ("panoptic_cascade", 4)
    assert (info.network_config.thing_clusters, info.network_config.stuff_clusters) == (3, 4)
    assert info.train_config["backbone"] == "vit"
    assert info.provenance["encoder"]["sha256"] == tiny_store.read_config().encoder_hash
    assert "/" not in json.dumps(info.provenance)
    assert list(read_csv_log(finished_run / LOSSES_FILE)) == [
        "step", "objectness", "anchors", "classes", "boxes", "masks", "semantic", "total"
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASCADE_PRESETS)
def test_a_step_with_every_preset_changes_the_weights(
    name: str, precision: str, tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    small = {field: getattr(TINY, field) for field in SMALL_FIELDS}
    trainer = make_trainer(tiny_store, tmp_path / "run", replace(CASCADE_PRESETS[name], **small, precision=precision))
    module = trainer.task.module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    batches = trainer.batches()
    losses = trainer.train_step(next(batches))
    batches.close()
    assert losses["total"] > 0.0
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    changed = [key for key, value in module.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("roi_heads.box_head.0") for key in changed)
    assert any(key.startswith("proposal_generator") for key in changed)


def test_published_schedules() -> None:
    coco, imagenet = (CASCADE_PRESETS[name] for name in ("u2seg-coco", "u2seg-imagenet"))
    rates = [0.01 * coco.lr_factor(step) for step in (0, 500, 1000, 89_999)]
    assert rates == pytest.approx([1e-5, 5.005e-3, 0.01, 0.01])
    rates = [0.01 * imagenet.lr_factor(step) for step in (1000, 79_999, 80_000, 159_999)]
    assert rates == pytest.approx([0.01, 0.01, 2e-4, 2e-4])


def test_weight_decay_skips_norms_and_a_frozen_encoder_is_not_trained(tiny_store: PseudoLabelDataset) -> None:
    module = CascadeTask(tiny_store, VIT).module
    decayed, others = cascade_param_groups(module, 5e-5)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-5, 0.0)
    assert all(".norm." in names[id(each)] or "simfp_2.1." in names[id(each)] for each in others["params"])
    trained = {names[id(each)] for group in (decayed, others) for each in group["params"]}
    assert trained == {name for name in names.values() if not name.startswith("backbone.net.")}


def test_batch_norm_statistics_are_recomputed_for_the_final_weights(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    task = make_trainer(tiny_store, tmp_path / "run", replace(TINY, precise_bn_iters=3)).task
    norm = task.module.backbone.bottom_up.stem.conv1.norm
    task.on_train_end(task.module)
    assert norm.num_batches_tracked == 3
    first = norm.running_mean.clone()
    task.on_train_end(task.module)
    torch.testing.assert_close(norm.running_mean, first)
    assert norm.momentum == 0.1


def test_a_changed_encoder_is_rejected(tiny_store: PseudoLabelDataset) -> None:
    with pytest.raises(CheckpointError, match="not the encoder"):
        load_encoder_state(replace(tiny_store.read_config(), encoder_hash="0" * 64))


def test_backbone_weights_are_loaded_into_a_resnet_and_recorded(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    resnet = CascadeTask(tiny_store, replace(TINY, seed=5)).module.backbone.bottom_up
    save_file(resnet.state_dict(), tmp_path / "resnet.safetensors")
    task = CascadeTask(tiny_store, TINY, str(tmp_path / "resnet.safetensors"))
    loaded = task.module.backbone.bottom_up.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in resnet.state_dict().items())
    assert task.run_info.provenance["backbone"]["sha256"] == hash_file(tmp_path / "resnet.safetensors")
    for config in (VIT, MASK_TRANSFORMER_PRESETS["tiny"]):
        with pytest.raises(ConfigError, match="need a panoptic cascade with --backbone resnet50"):
            train(tiny_store, RunOptions(out=tmp_path / "run"), config, "resnet.pth")


def test_initial_weights_have_detectron2s_standard_deviations() -> None:
    torch.manual_seed(0)
    config = CascadeConfig(thing_clusters=40, fpn_channels=64, mask_conv_dim=64)
    network = PanopticCascade(config, CascadeInferenceConfig())
    init_weights(network)
    state = network.state_dict()
    expected = {
        "proposal_generator.rpn_head.conv.weight": 0.01,
        "roi_heads.box_predictor.2.cls_score.weight": 0.01,
        "roi_heads.box_predictor.0.bbox_pred.weight": 0.001,
        "roi_heads.mask_head.predictor.weight": 0.001,
        "roi_heads.mask_head.mask_fcn2.weight": (2 / (9 * 64)) ** 0.5,  # He, by fan-out
        "backbone.bottom_up.res3.1.conv2.weight": (2 / (9 * 128)) ** 0.5,
        "sem_seg_head.p3.0.weight": (2 / (9 * 128)) ** 0.5,
        "backbone.fpn_output3.weight": (1 / (9 * 64)) ** 0.5,  # uniform, by fan-in
        "roi_heads.box_head.1.fc1.weight": (1 / (49 * 64)) ** 0.5,
    }
    assert {name: float(state[name].std()) for name in expected} == pytest.approx(expected, rel=0.05)
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith((".bias",)) and "norm" not in name)


DATA_CONFIG = replace(CASCADE_PRESETS["tiny"], min_sizes=(28,), max_size=100)


def write_photo(folder: Path, name: str) -> LabeledPhoto:
    """A 28x56 photo with a bright left half, which is thing 2; the right is stuff 3, void in the two last columns."""
    image, label_map = np.full((28, 56, 3), 10, np.uint8), np.full((28, 56), 2, np.int32)
    image[:, :28], label_map[:, :28], label_map[:, 54:] = 250, 1, 0
    return write_labeled(folder, name, image, label_map, {1: 2, 2: 8})


def make_dataset(folder: Path, config: CascadeTrainConfig = DATA_CONFIG, names: str = "a") -> CascadeDataset:
    """Two overlapping instances per photo: the left half, and the left two thirds."""
    masks = np.zeros((2, 28, 56), bool)
    masks[0, :, :28] = True
    masks[1, :, :38] = True
    return CascadeDataset(
        sampler=PhotoSampler(photos=[write_photo(folder, name) for name in names], seed=0),
        instances={name: [annotate(masks[0], 2), annotate(masks[1], 5)] for name in names},
        thing_clusters=5,
        config=config,
    )


def test_samples_have_whole_masks_and_stuff_mirrored_or_not(tmp_path: Path) -> None:
    sides = set()
    for sample in make_dataset(tmp_path).load_batch(0, 16).samples:
        assert sample.pixels.shape == (3, 28, 56)
        assert sample.clusters.tolist() == [1, 4]
        assert sample.masks.flatten(1).sum(1).tolist() == [28 * 28, 28 * 38]
        is_left = bool(sample.masks[0, 0, 0])
        sides.add(is_left)
        bright, dark, void = (0, 50, 55) if is_left else (55, 5, 0)
        assert sample.pixels[0, 5, bright] == 250
        assert sample.pixels[0, 5, dark] == 10
        assert sample.semantic[3, [bright, dark, void]].tolist() == [0, 3, IGNORE_INDEX]
    assert sides == {True, False}


def test_photos_and_labels_are_resized_to_one_of_the_sizes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, replace(DATA_CONFIG, min_sizes=(14, 56), max_size=84))
    samples = dataset.load_batch(0, 16).samples
    # With a short side of 56, the long side would be 112.
    assert {tuple(each.masks.shape[1:]) for each in samples} == {(14, 28), (42, 84)}
    for each in samples:
        assert each.pixels.shape[1:] == each.masks.shape[1:] == each.semantic.shape
        assert each.masks[0].float().mean() == 0.5


def draw_sample(
    color: int, *boxes: tuple[int, int, int, int], clusters: list[int] | None = None, size: tuple[int, int] = (40, 60)
) -> CascadeSample:
    """A photo of one color and stuff 1 with instances of twice the color; boxes are top, left, bottom, right."""
    pixels = torch.full((3, *size), color, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    semantic = torch.ones(size, dtype=torch.int64)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
        pixels[:, mask] = 2 * color
        semantic[mask] = 0
    numbers = torch.tensor(clusters or list(range(len(boxes))), dtype=torch.int64)
    return CascadeSample(pixels=pixels, masks=masks, clusters=numbers, semantic=semantic)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_pasted_instance_brings_its_pixels_mask_and_cluster() -> None:
    source = draw_sample(100, (0, 0, 40, 60), clusters=[7])
    for seed in range(10):
        pasted = copy_paste_pair(draw_sample(10), source, 0.3, rng(seed))
        assert pasted.clusters.tolist() == [7]
        mask = pasted.masks[0]
        height, width = (len(torch.nonzero(mask.any(axis))) for axis in (1, 0))
        assert mask.sum() == height * width  # the whole source, scaled equally on both sides
        assert 12 <= height <= 40
        assert abs(height / 40 - width / 60) < 0.03
        assert (pasted.pixels[:, mask] == 200).all()
        assert (pasted.pixels[:, ~mask] == 10).all()
        assert torch.equal(pasted.semantic == 0, mask)


def test_pasted_instances_occlude_others() -> None:
    pasted = copy_paste_pair(draw_sample(10, (0, 0, 40, 60)), draw_sample(100, (0, 0, 20, 30)), 0.5, rng(0))
    assert len(pasted.masks) == 2
    assert not (pasted.masks[0] & pasted.masks[1]).any()
    assert (pasted.masks[0] | pasted.masks[1]).all()


def test_an_instance_that_would_cover_half_of_another_is_not_pasted() -> None:
    sample = draw_sample(10, (19, 29, 21, 31), (0, 0, 4, 4))
    pasted = copy_paste_pair(sample, draw_sample(100, (0, 0, 40, 60)), 1.0, rng(0))
    assert torch.equal(pasted.masks, sample.masks)
    assert torch.equal(pasted.pixels, sample.pixels)


def test_instances_come_from_the_opposite_sample_or_from_one_of_the_same_class() -> None:
    first, second = draw_sample(10, clusters=[]), draw_sample(20, (0, 0, 9, 9), clusters=[3])
    third = draw_sample(30, (10, 10, 20, 20), (0, 40, 20, 60), clusters=[3, 5])
    batch = (first, second, third)
    any_class = copy_paste_batch(batch, "any", 1.0, rng(0))
    assert set(any_class[0].clusters.tolist()) <= {3, 5}
    assert any_class[0].clusters.numel() == 1
    assert any_class[2].clusters.tolist() == [3, 5]  # the first has no instances
    same_class = copy_paste_batch(batch, "same-class", 1.0, rng(0))
    assert same_class[0].clusters.tolist() == []  # no common cluster
    assert set(same_class[1].clusters.tolist()) == {3}  # never the third's instance of cluster 5
    assert sorted(set(same_class[2].clusters.tolist())) == [3, 5]
    assert copy_paste_batch(batch, "none", 1.0, rng(0)) == batch


def test_samples_of_different_sizes_are_padded_with_ignored_pixels() -> None:
    padded = pad_to_batch((draw_sample(10, (2, 3, 9, 20)), draw_sample(20, size=(70, 33))), 32)
    assert padded.pixels.shape == (2, 3, 96, 64)
    assert padded.sizes.tolist() == [[40, 60], [70, 33]]
    assert padded.targets[0].boxes.tolist() == [[3.0, 2.0, 20.0, 9.0]]
    assert (padded.pixels[0, :, 40:] == 0).all()
    assert (padded.targets[0].semantic[40:] == IGNORE_INDEX).all()
    assert (padded.targets[1].semantic[:70, :33] == 1).all()
    assert padded.targets[1].boxes.shape == (0, 4)
