"""Published checkpoints become runs that answer as they did, or are refused with what does not fit."""

import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from model.errors import CheckpointError, ConfigError
from model.network.cascade_shape import CascadeShape
from model.network.panoptic_cascade import CascadeLimits, PanopticCascade
from model.run import load_run, read_run_card
from model.weights.detectron import check_family, import_cascade

TINY = CascadeShape(
    thing_clusters=3, stuff_clusters=27, stem_width=4, inner_width=4, outer_width=8, pyramid_width=8, box_width=8,
    mask_width=8, semantic_width=32,
)  # fmt: skip
CUTLER = replace(TINY, thing_clusters=1, stuff_clusters=0, is_mask_agnostic=True, semantic_width=128)
CUPS = replace(TINY, stuff_clusters=11, backbone_norm="frozen", pyramid_norm="frozen")


def draw_state(shape: CascadeShape, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return PanopticCascade(shape, CascadeLimits()).state_dict()


def save_arrays(content: dict[str, Any], path: Path) -> Path:
    """As detectron2's model zoo."""
    arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody", "matching_heuristics": True}))
    return path


def import_state(state: dict[str, Tensor], folder: Path, family: str = "u2seg", clusters: int = 3) -> Path:
    torch.save({"model": state}, folder / "model.pth")
    import_cascade(str(folder / "model.pth"), family, clusters, folder / "run")
    return folder / "run"


@pytest.mark.golden
@pytest.mark.parametrize(("case", "clusters", "suffix"), [("bn_image0", 12, ".pth"), ("frozen_image0", 5, ".pkl")])
def test_an_imported_network_answers_as_detectron2_did(
    tmp_path: Path, golden: Path, case: str, clusters: int, suffix: str
) -> None:
    source = golden / "detectron2" / f"{case.split('_')[0]}_model.pth"
    if suffix == ".pkl":
        source = save_arrays(torch.load(source, weights_only=True), tmp_path / "model.pkl")
    import_cascade(str(source), "u2seg", clusters, tmp_path / "run")
    card, network = load_run(tmp_path / "run")
    assert card.network == "panoptic_cascade"
    assert isinstance(network, PanopticCascade)
    assert network.limits == CascadeLimits()
    assert not network.training
    stored = reference.read_case(golden, case)
    with torch.inference_mode():
        answer = network(stored.pixels, stored.sizes)
    count = len(stored.arrays["det_scores"])
    assert answer.clusters[0, :count].tolist() == stored.arrays["det_classes"].tolist()
    reference.check_near(answer.scores[:, :count], stored.tensor("det_scores"), reference.SCORE_NOISE)
    reference.check_near(answer.boxes[:, :count], stored.tensor("det_boxes"), reference.BOX_NOISE_PX)
    assert not answer.scores[0, count:].any()


def test_the_run_says_where_its_weights_come_from(tmp_path: Path) -> None:
    torch.save({"model": draw_state(TINY), "iteration": 89999, "optimizer": {}}, tmp_path / "cocotrain_3.pth")
    url = (tmp_path / "cocotrain_3.pth").as_uri()
    import_cascade(url, "u2seg", 3, tmp_path / "run", cache=tmp_path / "cache")
    card = read_run_card(tmp_path / "run")
    digest = card.provenance["checkpoint"].pop("sha256")
    assert len(bytes.fromhex(digest)) == 32
    assert asdict(card) == {
        "network": "panoptic_cascade", "shape": asdict(TINY), "step": 89999, "encoder_file": "", "side_px": 0,
        "fit": {},
        "provenance": {"checkpoint": {
            "file": "cocotrain_3.pth", "family": "U2Seg", "licence": "Apache-2.0", "iteration": 89999,
        }},
    }  # fmt: skip


def test_what_detectron2_saves_beside_weights_is_left_out(tmp_path: Path) -> None:
    state = draw_state(TINY)
    beside = {
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1),
        "pixel_std": torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
        "anchor_generator.cell_anchors.4": torch.zeros(3, 4),
        "sem_seg_head.criterion.weight": torch.ones(28),
    }
    wrapped = {f"module.{name}": tensor for name, tensor in {**state, **beside}.items()}
    _, network = load_run(import_state(wrapped, tmp_path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_cups_checkpoint_gives_the_student(tmp_path: Path) -> None:
    # visinf/cups: Lightning's "model." before every name, and in self-training a copy under "teacher_model.model.".
    state, teacher = draw_state(CUPS), draw_state(CUPS, seed=1)
    content = {f"model.{name}": tensor for name, tensor in state.items()}
    content |= {f"teacher_model.model.{name}": tensor for name, tensor in teacher.items()}
    content |= {"model.pixel_mean": torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)}
    content |= {"model.pixel_std": torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)}
    torch.save({"state_dict": content, "global_step": 1500, "epoch": 2}, tmp_path / "cups.ckpt")
    card = import_cascade(str(tmp_path / "cups.ckpt"), "cups", 3, tmp_path / "run")
    assert (card.shape, card.step) == (CUPS, 1500)
    _, network = load_run(tmp_path / "run")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_cutler_checkpoint_has_one_cluster_and_its_own_licence(tmp_path: Path) -> None:
    run = import_state(draw_state(CUTLER), tmp_path, "cutler", 1)
    card, network = load_run(run)
    assert card.shape == CUTLER
    assert card.provenance["checkpoint"]["licence"] == "CC BY-NC-SA 4.0"
    assert not hasattr(network, "sem_seg_head")


@pytest.mark.parametrize(
    ("shape", "family", "clusters", "told"),
    [
        (TINY, "u2seg", 300, "it has 3 thing clusters, not 300: give --clusters 3"),
        (TINY, "cutler", 1, "no cutler checkpoint: it has 3 thing clusters and a semantic head of 28 classes; it looks "
         "like u2seg: give --as u2seg"),
        (CUTLER, "u2seg", 1, "1 thing clusters and no semantic head; it looks like cutler"),
        (CUTLER, "cups", 1, "it looks like cutler"),
        (CUPS, "u2seg", 3, "a semantic head of 12 classes; it looks like cups"),
        (replace(CUTLER, thing_clusters=80), "cutler", 80, "80 thing clusters and no semantic head.*like none"),
    ],
)  # fmt: skip
def test_another_family_or_count_is_refused_in_one_line(
    shape: CascadeShape, family: str, clusters: int, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        check_family(shape, family, clusters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),  # detectron2's default: BGR, as in Caffe
        ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),
        ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375)),
        ((123.675,), (58.395,)),
    ],
)
def test_a_network_for_other_pixels_is_refused(tmp_path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    pixels = {"pixel_mean": torch.tensor(mean), "pixel_std": torch.tensor(std)}
    with pytest.raises(
        CheckpointError, match=r"other pixels than RGB.*pixel_mean 1?[0-9.]+.*expected pixel_mean 123\.675"
    ):
        import_state({**draw_state(TINY), **pixels}, tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_named_with_the_file(tmp_path: Path) -> None:
    state = draw_state(TINY)
    del state["backbone.fpn_output3.norm.bias"]
    state["roi_heads.keypoint_head.weight"] = torch.zeros(1)
    state["roi_heads.box_predictor.2.bbox_pred.weight"] = torch.zeros(12, 8)
    with pytest.raises(CheckpointError) as caught:
        import_state(state, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'model.pth'}: 3 tensors do not fit: missing backbone.fpn_output3.norm.bias; "
        "unexpected roi_heads.keypoint_head.weight; misshapen roi_heads.box_predictor.2.bbox_pred.weight: (12, 8) for "
        "(4, 8)"
    )


def test_numbers_that_are_none_and_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    state = draw_state(TINY)
    twice = {**state, "model.roi_heads.box_head.0.fc1.bias": torch.zeros(8)}
    with pytest.raises(CheckpointError, match=r"holds roi_heads\.box_head\.0\.fc1\.bias twice"):
        import_state(twice, tmp_path)
    state["roi_heads.box_head.0.fc1.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"roi_heads\.box_head\.0\.fc1\.bias is not finite"):
        import_state(state, tmp_path)


def test_an_encoder_is_no_checkpoint_of_a_cascade(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.pth: no panoptic cascade in detectron2's names"):
        import_state({"patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)}, tmp_path)


def test_a_failing_import_leaves_what_was_there(tmp_path: Path) -> None:
    run = import_state(draw_state(TINY), tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(CheckpointError):
        import_state({**draw_state(TINY, seed=1), "more": torch.zeros(1)}, tmp_path)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "run"]


def test_only_an_imported_run_is_replaced(tmp_path: Path, tiny_run: Path) -> None:
    state = draw_state(TINY, seed=1)
    run = import_state(draw_state(TINY), tmp_path)
    assert import_state(state, tmp_path) == run
    assert torch.equal(
        load_run(run)[1].state_dict()["sem_seg_head.predictor.bias"], state["sem_seg_head.predictor.bias"]
    )
    (run / "run.json").unlink()
    with pytest.raises(ConfigError, match="exists and is no run"):
        import_state(state, tmp_path)
    with pytest.raises(ConfigError, match="was fitted, not imported"):
        import_cascade(str(tmp_path / "model.pth"), "u2seg", 3, tiny_run)
