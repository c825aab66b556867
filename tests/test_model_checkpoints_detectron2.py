"""Published checkpoints become runs that answer as they did, or are refused with what does not fit."""

import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from torch import Tensor

from model.checkpoints.detectron2 import export_detectron2, import_cascade, require_family
from model.checkpoints.runs import RunInfo, load_run, read_run_info, write_run
from model.errors import CheckpointError, ConfigError
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade

TINY = replace(tiny.CASCADE, stuff_clusters=27)
CUTLER = replace(TINY, thing_clusters=1, stuff_clusters=0, cls_agnostic_mask=True, sem_seg_conv_dim=128)
CUPS = replace(TINY, stuff_clusters=11, backbone_norm="frozen", fpn_norm="frozen")


def draw_state(shape: CascadeConfig, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return PanopticCascade(shape, CascadeInferenceConfig()).state_dict()


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
def test_an_imported_network_computes_as_detectron2_does(
    tmp_path: Path, golden: Path, case: str, clusters: int, suffix: str
) -> None:
    source = golden / "detectron2" / f"{case.split('_')[0]}_model.pth"
    if suffix == ".pkl":
        source = save_arrays(torch.load(source, weights_only=True), tmp_path / "model.pkl")
    import_cascade(str(source), "u2seg", clusters, tmp_path / "run")
    card, network = load_run(tmp_path / "run")
    assert card.network == "panoptic_cascade"
    assert isinstance(network, PanopticCascade)
    assert network.inference == CascadeInferenceConfig()
    assert not network.training
    stored = reference.read_case(golden, case)
    with torch.inference_mode():
        answer = network(stored.pixels, stored.sizes)
    count = len(stored.arrays["det_scores"])
    assert answer.clusters[0, :count].tolist() == stored.arrays["det_classes"].tolist()
    reference.check_near(answer.scores[:, :count], stored.tensor("det_scores"), reference.SCORE_NOISE)
    reference.check_near(answer.boxes[:, :count], stored.tensor("det_boxes"), reference.BOX_NOISE_PX)
    assert not answer.scores[0, count:].any()


def test_the_run_describes_the_origin_of_its_weights(tmp_path: Path) -> None:
    torch.save({"model": draw_state(TINY), "iteration": 89999, "optimizer": {}}, tmp_path / "cocotrain_3.pth")
    url = (tmp_path / "cocotrain_3.pth").as_uri()
    import_cascade(url, "u2seg", 3, tmp_path / "run")
    card = read_run_info(tmp_path / "run")
    digest = card.provenance["checkpoint"].pop("sha256")
    assert len(bytes.fromhex(digest)) == 32
    assert asdict(card) == {
        "network": "panoptic_cascade", "network_config": asdict(TINY), "step": 89999, "encoder_file": "", "side_px": 0,
        "train_config": {},
        "provenance": {"checkpoint": {
            "file": "cocotrain_3.pth", "family": "U2Seg", "license": "Apache-2.0", "iteration": 89999,
        }},
    }  # fmt: skip


def test_other_tensors_that_detectron2_saves_are_ignored(tmp_path: Path) -> None:
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


def test_the_student_of_a_cups_checkpoint_is_imported(tmp_path: Path) -> None:
    # visinf/cups: Lightning's "model." before every name, and in self-training a copy under "teacher_model.model.".
    state, teacher = draw_state(CUPS), draw_state(CUPS, seed=1)
    content = {f"model.{name}": tensor for name, tensor in state.items()}
    content |= {f"teacher_model.model.{name}": tensor for name, tensor in teacher.items()}
    content |= {"model.pixel_mean": torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)}
    content |= {"model.pixel_std": torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)}
    torch.save({"state_dict": content, "global_step": 1500, "epoch": 2}, tmp_path / "cups.ckpt")
    card = import_cascade(str(tmp_path / "cups.ckpt"), "cups", 3, tmp_path / "run")
    assert (card.network_config, card.step) == (CUPS, 1500)
    _, network = load_run(tmp_path / "run")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "family", "clusters", "told"),
    [
        (TINY, "u2seg", 300, "it has 3 thing clusters, not 300: give --clusters 3"),
        (TINY, "cutler", 1, "not a cutler checkpoint: it has 3 thing and 27 stuff clusters; use --format"),
        (CUTLER, "u2seg", 1, "1 thing and 0 stuff clusters"),
        (CUTLER, "cups", 1, "1 thing and 0 stuff clusters"),
        (CUPS, "u2seg", 3, "3 thing and 11 stuff clusters"),
        (replace(CUTLER, thing_clusters=80), "cutler", 80, "80 thing and 0 stuff clusters"),
    ],
)  # fmt: skip
def test_another_family_or_number_of_clusters_is_refused_on_one_line(
    shape: CascadeConfig, family: str, clusters: int, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        require_family(shape, family, clusters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),  # detectron2's default: BGR, as in Caffe
        ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375)),
        ((123.675,), (58.395,)),
    ],
)
def test_another_normalization_is_refused(tmp_path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    pixels = {"pixel_mean": torch.tensor(mean), "pixel_std": torch.tensor(std)}
    with pytest.raises(
        CheckpointError, match=r"does not normalize RGB.*pixel_mean 1?[0-9.]+.*expected pixel_mean 123\.675"
    ):
        import_state({**draw_state(TINY), **pixels}, tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_named_with_the_file(tmp_path: Path) -> None:
    state = draw_state(TINY)
    del state["backbone.fpn_output3.norm.bias"]
    state["roi_heads.keypoint_head.weight"] = torch.zeros(1)
    state["roi_heads.box_predictor.2.bbox_pred.weight"] = torch.zeros(12, 8)
    with pytest.raises(CheckpointError) as caught:
        import_state(state, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model.pth'}: its tensors do not fit: Missing key(s)")
    assert ': "backbone.fpn_output3.norm.bias". Unexpected key(s)' in message
    assert (
        ': "roi_heads.keypoint_head.weight". size mismatch for roi_heads.box_predictor.2.bbox_pred.weight: ' in message
    )
    assert "torch.Size([12, 8])" in message


def test_nan_values_and_repeated_names_are_refused(tmp_path: Path) -> None:
    state = draw_state(TINY)
    twice = {**state, "model.roi_heads.box_head.0.fc1.bias": torch.zeros(8)}
    with pytest.raises(CheckpointError, match=r"contains roi_heads\.box_head\.0\.fc1\.bias twice"):
        import_state(twice, tmp_path)
    state["roi_heads.box_head.0.fc1.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"roi_heads\.box_head\.0\.fc1\.bias is not finite"):
        import_state(state, tmp_path)


def test_a_failed_import_leaves_the_existing_run(tmp_path: Path) -> None:
    run = import_state(draw_state(CUTLER), tmp_path, "cutler", 1)
    assert read_run_info(run).provenance["checkpoint"]["license"] == "CC BY-NC-SA 4.0"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(CheckpointError):
        import_state({**draw_state(TINY, seed=1), "more": torch.zeros(1)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.pth: not a panoptic cascade with detectron2's names"):
        import_state({"patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)}, tmp_path)
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
    with pytest.raises(ConfigError, match="exists and is not a run"):
        import_state(state, tmp_path)
    with pytest.raises(ConfigError, match="is a trained run, not an imported one"):
        import_cascade(str(tmp_path / "model.pth"), "u2seg", 3, tiny_run)


def write_drawn_run(folder: Path, config: CascadeConfig) -> Path:
    torch.manual_seed(0)
    network = PanopticCascade(config, CascadeInferenceConfig())
    for tensor in network.state_dict().values():  # statistics and norms that change what the network computes
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    info = RunInfo(
        network="panoptic_cascade", network_config=config, step=7, side_px=96, provenance={"photos": "drawn"}
    )
    write_run(folder, info, network)
    return folder


@pytest.mark.parametrize("config", [TINY, CUTLER, CUPS])
def test_an_export_for_detectron2_is_imported_again(tmp_path: Path, config: CascadeConfig) -> None:
    run = write_drawn_run(tmp_path / "run", config)
    export_detectron2(run, tmp_path / "exported")
    again = import_cascade(str(tmp_path / "exported" / "model_final.pth"), "detectron2", None, tmp_path / "again")
    info = read_run_info(run)
    provenance = {name: value for name, value in again.provenance.items() if name != "checkpoint"}
    assert (again.network_config, again.step, again.side_px, provenance) == (config, 7, 96, info.provenance)
    before, after = load_run(run)[1].state_dict(), load_run(tmp_path / "again")[1].state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(ConfigError, match="exported exists: choose another --out"):
        export_detectron2(run, tmp_path / "exported")


def test_a_mask_transformer_is_not_exported_for_detectron2(tmp_path: Path, tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="only a panoptic cascade with ResNet-50"):
        export_detectron2(tiny_run, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of detectron2 and what it imports
@pytest.mark.parametrize("config", [TINY, CUTLER, CUPS])
def test_detectron2_computes_what_the_exported_network_computes(tmp_path: Path, config: CascadeConfig) -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not on PyPI; docs/checkpoints.md says how to install it")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    run = write_drawn_run(tmp_path / "run", config)
    export_detectron2(run, tmp_path / "exported")
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "exported" / "config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    theirs = build_model(cfg).eval()
    missing = DetectionCheckpointer(theirs).load(str(tmp_path / "exported" / cfg.MODEL.WEIGHTS))
    assert missing["iteration"] == 7
    assert set(theirs.state_dict()) == set(load_run(run)[1].state_dict())
    pixels = torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = load_run(run)[1](pixels[None], torch.tensor([[128, 160]]))
        (found,) = theirs.inference([{"image": pixels, "height": 128, "width": 160}])
    instances = found["instances"]
    count = len(instances)
    assert count == int((output.scores > 0).sum()) > 0
    reference.check_near(output.scores[0, :count], instances.scores, reference.SCORE_NOISE)
    # Nearly tied detections may change places: compare each box with the nearest one of its cluster.
    is_same = output.clusters[0, :count, None] == instances.pred_classes
    distances = (output.boxes[0, :count, None] - instances.pred_boxes.tensor).abs().amax(2)
    assert distances.where(is_same, torch.inf).amin(1).max() <= reference.BOX_NOISE_PX
    if config.stuff_clusters:
        upsampled = torch.nn.functional.interpolate(output.semantic, scale_factor=4.0, mode="bilinear")
        reference.check_near(upsampled[0], found["sem_seg"], reference.SEMANTIC_NOISE)
