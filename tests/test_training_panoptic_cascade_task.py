"""Training a panoptic cascade: presets, resuming, initialization and batch-norm statistics."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints.runs import read_run_info
from model.errors import CheckpointError, ConfigError
from model.files import hash_file
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from training.data.dataset import PseudoLabelDataset
from training.evaluation.class_mapping import ClassMappingConfig
from training.evaluation.cluster_matching import MatchingConfig
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.evaluate import evaluate
from training.evaluation.predictors import load_predictor
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig
from training.panoptic_cascade.dataset import CascadeBatch
from training.panoptic_cascade.task import (
    CascadeTask,
    cascade_param_groups,
    init_weights,
    load_encoder_state,
    multistep_lr_factor,
)
from training.train import train
from training.trainer.trainer import Trainer

TINY = CASCADE_PRESETS["tiny"]
VIT = replace(TINY, backbone="vit")
WITH_EMA = replace(VIT, ema_decay=0.9)
SMALL_FIELDS = (
    *("stem_out_channels", "bottleneck_channels", "res2_out_channels", "fpn_channels", "box_fc_dim", "mask_conv_dim"),
    *("sem_seg_conv_dim", "min_sizes", "max_size", "batch_size", "rpn_pre_nms_topk", "rpn_post_nms_topk"),
)


def make_trainer(dataset: PseudoLabelDataset, run: Path, config: CascadeTrainConfig) -> Trainer[CascadeBatch]:
    return Trainer(CascadeTask(dataset, config), run)


def read_rows(run: Path) -> list[list[str]]:
    with (run / "losses.csv").open(newline="") as stream:
        return list(csv.reader(stream))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset) -> Path:
    """A finished run on a frozen ViT, with averaged weights; read-only."""
    run = tmp_path_factory.mktemp("cascade") / "run"
    train(tiny_store, tiny_store.features, run, WITH_EMA)
    return run


def test_a_run_has_provenance_and_losses(finished_run: Path, tiny_store: PseudoLabelDataset) -> None:
    info = read_run_info(finished_run)
    assert (info.network, info.step) == ("panoptic_cascade", 4)
    assert (info.network_config.thing_clusters, info.network_config.stuff_clusters) == (3, 4)
    assert info.train_config["backbone"] == "vit"
    assert info.provenance["encoder"]["sha256"] == tiny_store.read_config().encoder_hash
    assert "/" not in json.dumps(info.provenance)
    assert read_rows(finished_run)[0] == [
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
    coco, imagenet, cutler = (CASCADE_PRESETS[name] for name in ("u2seg-coco", "u2seg-imagenet", "cutler"))
    rates = [0.01 * multistep_lr_factor(step, coco) for step in (0, 500, 1000, 89_999)]
    assert rates == pytest.approx([1e-5, 5.005e-3, 0.01, 0.01])
    for config in (imagenet, cutler):
        assert config.max_steps == 160_000
        rates = [0.01 * multistep_lr_factor(step, config) for step in (1000, 79_999, 80_000, 159_999)]
        assert rates == pytest.approx([0.01, 0.01, 2e-4, 2e-4])
    for each in (coco, imagenet, cutler):
        assert (each.batch_size, each.momentum, each.weight_decay) == (16, 0.9, 5e-5)
        assert (each.clip_per_parameter, each.grad_clip_norm, each.droploss_iou_threshold) == (True, 1.0, 0.01)
    assert (coco.copy_paste, cutler.copy_paste, cutler.cls_agnostic) == ("same-class", "any", True)


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
            train(tiny_store, tiny_store.features, tmp_path / "run", config, backbone_weights="resnet.pth")


def test_a_trained_cascade_can_be_evaluated(finished_run: Path, tiny_truth: Path) -> None:
    dataset = DatasetSpec(folder=tiny_truth).read()
    config = ClassMappingConfig(matching=MatchingConfig(method="majority"))
    report, _ = evaluate(load_predictor(finished_run, threads=1), dataset, config)
    assert report.summary.images == 4


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
