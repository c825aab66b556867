import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.checkpoints.dino import load_encoder
from model.checkpoints.runs import load_run, read_run_info
from model.errors import CheckpointError, ConfigError, TrainingError
from model.files import hash_file
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from training.data.dataset import PseudoLabelDataset
from training.data.features import compute_features
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.evaluate import evaluate
from training.evaluation.matching.class_mapping import ClassMappingConfig
from training.evaluation.predictors import load_predictor
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.panoptic_cascade.config import CASCADE_PRESETS, CascadeTrainConfig
from training.panoptic_cascade.dataset import CascadeBatch, CascadeSample, pad_to_batch
from training.panoptic_cascade.task import (
    CascadeTask,
    extract_features,
    group_parameters,
    init_weights,
    read_encoder,
    recompute_bn_stats,
    schedule,
)
from training.train import train
from training.trainer.trainer import Trainer

TINY = CASCADE_PRESETS["tiny"]
FROM_CACHE = replace(TINY, backbone="vit", inputs="features")
SCALED_DOWN = {
    name: getattr(TINY, name)
    for name in (
        "stem_out_channels",
        "bottleneck_channels",
        "res2_out_channels",
        "fpn_channels",
        "box_fc_dim",
        "mask_conv_dim",
        "sem_seg_conv_dim",
        "short_sides_px",
        "longest_side_px",
        "batch",
        "proposals_per_level",
        "proposals",
    )
}


def begin(store: PseudoLabelDataset, run: Path, recipe: CascadeTrainConfig) -> Trainer[CascadeBatch]:
    return Trainer(CascadeTask(store, store.features, recipe), run)


def read_rows(run: Path) -> list[list[str]]:
    with (run / "history.csv").open(newline="") as stream:
        return list(csv.reader(stream))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset) -> Path:
    """A finished fit on cached features, its weights averaged."""
    run = tmp_path_factory.mktemp("cascade-fit") / "run"
    train(tiny_store, tiny_store.features, run, replace(FROM_CACHE, average_decay=0.9))
    return run


def test_a_fit_killed_between_checkpoints_gives_the_same_losses_as_one_that_was_not(
    tmp_path: Path, tiny_store: PseudoLabelDataset, fitted: Path
) -> None:
    run, recipe = tmp_path / "run", replace(FROM_CACHE, average_decay=0.9)
    killed = begin(tiny_store, run, recipe)
    batches = killed.batches()
    for _ in range(2):
        killed.advance(next(batches))
    killed.save()
    killed.advance(next(batches))  # a step that no checkpoint saw
    batches.close()
    (run / "history.csv").write_text((fitted / "history.csv").read_text())
    assert train(tiny_store, tiny_store.features, run, recipe).step == 4
    assert read_rows(run) == read_rows(fitted)
    whole, resumed = load_run(fitted)[1].state_dict(), load_run(run)[1].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_fit_may_be_cut_into_slices(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    steps = [train(tiny_store, tiny_store.features, tmp_path / "run", FROM_CACHE, limit_s=0.0).step for _ in range(3)]
    assert steps == [1, 2, 3]


def test_the_run_says_what_made_it_and_shows_its_losses(fitted: Path, tiny_store: PseudoLabelDataset) -> None:
    card = read_run_info(fitted)
    assert (card.network, card.step, card.network_config.thing_clusters, card.network_config.stuff_clusters) == (
        "panoptic_cascade",
        4,
        3,
        4,
    )
    assert card.train_config["backbone"] == "vit"
    assert card.provenance["encoder"]["sha256"] == tiny_store.read_config().encoder_hash
    assert "/" not in json.dumps(card.provenance)
    assert (fitted / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_rows(fitted)[0] == [
        "step", "objectness", "anchors", "classes", "boxes", "masks", "semantic", "total"
    ]  # fmt: skip


def test_the_encoder_stays_as_it_is_and_out_of_the_checkpoint(tiny_encoder: Path, fitted: Path) -> None:
    given, kept = load_file(tiny_encoder), load_file(fitted / "weights.safetensors")
    assert all(torch.equal(kept[f"backbone.net.{name}"], tensor) for name, tensor in given.items())
    assert not any("backbone.net." in name for name in load_file(fitted / "checkpoint.safetensors"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASCADE_PRESETS)
def test_every_preset_builds_and_steps(
    name: str, precision: str, tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    recipe = replace(CASCADE_PRESETS[name], **SCALED_DOWN, precision=precision)
    trainer = begin(tiny_store, tmp_path / "run", recipe)
    before = {key: value.clone() for key, value in trainer.trainee.module.state_dict().items()}
    batches = trainer.batches()
    losses = trainer.advance(next(batches))
    batches.close()
    assert losses["total"] > 0.0
    assert all(torch.isfinite(value).all() for value in trainer.trainee.module.state_dict().values())
    moved = [key for key, value in trainer.trainee.module.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("roi_heads.box_head.0") for key in moved)
    assert any(key.startswith("proposal_generator") for key in moved)


def test_the_published_schedules_are_the_published_ones() -> None:
    coco, imagenet, cutler = (CASCADE_PRESETS[f"paper-{name}"] for name in ("coco", "imagenet", "cutler"))
    assert [0.01 * schedule(step, coco) for step in (0, 500, 1000, 89_999)] == pytest.approx(
        [1e-5, 5.005e-3, 0.01, 0.01]
    )
    for recipe in (imagenet, cutler):
        assert recipe.steps == 160_000
        rates = [recipe.learning_rate * schedule(step, recipe) for step in (1000, 79_999, 80_000, 159_999)]
        assert rates == pytest.approx([0.01, 0.01, 2e-4, 2e-4])
    assert all((each.batch, each.momentum, each.weight_decay) == (16, 0.9, 5e-5) for each in (coco, imagenet, cutler))
    assert all(each.is_clipped_each and each.clip == 1.0 and each.drop_iou == 0.01 for each in (coco, imagenet, cutler))
    assert (coco.pasting, cutler.pasting, cutler.is_agnostic) == ("semantic", "any", True)


def test_norms_do_not_decay_and_a_frozen_encoder_is_not_trained(tiny_store: PseudoLabelDataset) -> None:
    trainee = CascadeTask(tiny_store, tiny_store.features, FROM_CACHE)
    decayed, free = group_parameters(trainee.module, 5e-5)
    names = {id(parameter): name for name, parameter in trainee.module.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-5, 0.0)
    assert all(".norm." in names[id(each)] or "simfp_2.1." in names[id(each)] for each in free["params"])
    listed = {names[id(each)] for group in (decayed, free) for each in group["params"]}
    assert listed == {name for name in names.values() if not name.startswith("backbone.net.")}


def test_a_class_agnostic_fit_has_one_cluster_and_no_stuff(tiny_store: PseudoLabelDataset) -> None:
    shape = CascadeTask(tiny_store, tiny_store.features, replace(TINY, is_agnostic=True)).module.shape
    assert (shape.thing_clusters, shape.stuff_clusters) == (1, 0)


def test_cached_features_make_the_levels_that_the_photo_makes(tiny_store: PseudoLabelDataset) -> None:
    network = CascadeTask(tiny_store, tiny_store.features, FROM_CACHE).module
    labels = tiny_store.read_config()
    # One colour: the encoder may see it at any size, 56 px when features are cached and 64 px on the canvas.
    colour = torch.tensor([200, 90, 30], dtype=torch.uint8)[:, None, None]
    maps = next(compute_features(load_encoder(labels.encoder, labels.side_px), colour.expand(1, 3, 56, 56)))[-1]
    nothing = {
        "masks": torch.zeros(0, 64, 64).bool(),
        "clusters": torch.zeros(0).long(),
        "semantic": torch.zeros(64, 64),
    }
    cached = CascadeSample(inputs=torch.from_numpy(maps).permute(2, 0, 1), cell_px=16, **nothing)
    live = CascadeSample(inputs=colour.expand(3, 64, 64), cell_px=1, **nothing)
    levels = [extract_features(network, pad_to_batch((each,), 32)) for each in (cached, live)]
    assert [each.shape[2] for each in levels[0]] == [16, 8, 4, 2, 1]
    for one, other in zip(*levels, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.02)  # features are cached as fp16


def test_batch_norms_of_a_finished_run_have_the_statistics_of_its_weights(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    trainer = begin(tiny_store, tmp_path / "run", replace(TINY, precise_batches=3))
    norm = trainer.trainee.module.backbone.bottom_up.stem.conv1.norm
    trainer.trainee.finish(trainer.trainee.module)
    assert norm.num_batches_tracked == 3
    first = norm.running_mean.clone()
    trainer.trainee.finish(trainer.trainee.module)
    torch.testing.assert_close(norm.running_mean, first)


def test_a_loss_that_is_not_finite_stops_the_fit_and_names_the_photos(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    trainer = begin(tiny_store, tmp_path / "run", FROM_CACHE)
    batches = trainer.batches()
    batch = next(batches)
    batches.close()
    for example in batch.examples:
        example.inputs[:] = torch.nan
    with pytest.raises(TrainingError, match=r"nan at step 0, on \d\.png, \d\.png"):
        trainer.advance(batch)


def test_an_encoder_that_changed_is_refused(tiny_store: PseudoLabelDataset) -> None:
    with pytest.raises(CheckpointError, match="not the encoder"):
        read_encoder(replace(tiny_store.read_config(), encoder_hash="0" * 64))


def test_published_weights_are_a_resnets_and_go_into_the_provenance(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    drawn = CascadeTask(tiny_store, tiny_store.features, replace(TINY, seed=5)).module.backbone.bottom_up
    save_file(drawn.state_dict(), tmp_path / "resnet.safetensors")
    trainee = CascadeTask(tiny_store, tiny_store.features, TINY, str(tmp_path / "resnet.safetensors"))
    taken = trainee.module.backbone.bottom_up.state_dict()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in drawn.state_dict().items())
    assert trainee.card.provenance["backbone"]["sha256"] == hash_file(tmp_path / "resnet.safetensors")
    for recipe in (FROM_CACHE, MASK_TRANSFORMER_PRESETS["tiny"]):
        with pytest.raises(ConfigError, match="for a cascade with one"):
            train(tiny_store, tiny_store.features, tmp_path / "run", recipe, backbone="resnet.pth")


def test_another_recipe_in_the_same_run_is_refused(tiny_store: PseudoLabelDataset, fitted: Path) -> None:
    with pytest.raises(ConfigError, match="begun with another drop_iou"):
        begin(tiny_store, fitted, replace(FROM_CACHE, average_decay=0.9, drop_iou=0.5))


def test_a_fitted_cascade_is_scored_like_any_run_on_the_square_it_was_made_for(fitted: Path, tiny_truth: Path) -> None:
    assert read_run_info(fitted).side_px == 64
    truth = DatasetSpec(folder=tiny_truth).read()
    report, _ = evaluate(load_predictor(fitted, threads=1), truth, ClassMappingConfig())
    assert report.summary.images == 4


def test_weights_are_drawn_as_the_reference_draws_them() -> None:
    torch.manual_seed(0)
    network = PanopticCascade(
        CascadeConfig(thing_clusters=40, fpn_channels=64, mask_conv_dim=64), CascadeInferenceConfig()
    )
    init_weights(network)
    state = network.state_dict()
    deviations = {
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
    assert {name: float(state[name].std()) for name in deviations} == pytest.approx(deviations, rel=0.05)
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith((".bias",)) and "norm" not in name)


def test_norms_stay_as_they_are() -> None:
    network = tiny.draw_cascade(stuff_clusters=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if ".norm." in name}
    init_weights(network)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_running_statistics_become_the_mean_over_the_batches() -> None:
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(99.0)
    batches = [torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1), torch.tensor([10.0, 14.0]).reshape(2, 1, 1, 1)]
    recompute_bn_stats(norm, lambda number: norm(batches[number]), 2)
    assert float(norm.running_mean) == pytest.approx((1.0 + 12.0) / 2)
    assert float(norm.running_var) == pytest.approx((2.0 + 8.0) / 2)  # torch's are unbiased
    assert norm.momentum == 0.1


def test_without_a_batch_norm_no_batch_is_asked_for() -> None:
    def refuse(number: int) -> None:
        raise AssertionError(number)

    recompute_bn_stats(nn.Sequential(nn.GroupNorm(1, 1), nn.LayerNorm(3)), refuse, 5)
