"""What trainings save beside their weights is read past, and never made."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import CheckpointError
from model.network.vit import EncoderShape, VisionTransformer
from model.weights.checkpoints import load_encoder, read_content, read_state

DINO = EncoderShape(width=64, depth=4, patch_px=16, grid=3, registers=0, has_layer_scale=False)
DINOV2 = EncoderShape(width=64, depth=4, patch_px=14, grid=4, registers=2, has_layer_scale=True)


def draw_state(shape: EncoderShape, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(tensor.shape) for name, tensor in VisionTransformer(shape).state_dict().items()}


def check_equal(encoder: VisionTransformer, state: dict[str, Tensor]) -> None:
    assert {name: tensor.tolist() for name, tensor in encoder.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


def test_a_whole_training_of_dino_gives_its_teacher(tmp_path: Path) -> None:
    # facebookresearch/dino, main_dino.py: options and learning rates of NumPy beside student, teacher and their heads.
    state, student = draw_state(DINO, 1), draw_state(DINO, 2)
    heads = {"head.mlp.0.weight": torch.ones(3), "head.last_layer.weight_g": torch.ones(1)}
    content = {
        "student": {f"module.backbone.{name}": tensor for name, tensor in student.items()},
        "teacher": {**{f"backbone.{name}": tensor for name, tensor in state.items()}, **heads},
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3)}]},
        "args": argparse.Namespace(arch="vit_small", lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(content, tmp_path / "full.pth")
    check_equal(load_encoder(str(tmp_path / "full.pth"), 48), state)
    del content["teacher"]
    torch.save(content, tmp_path / "student.pth")
    check_equal(load_encoder(str(tmp_path / "student.pth"), 48), student)


def test_a_teacher_of_dinov2_loses_its_heads_and_chunks(tmp_path: Path) -> None:
    # facebookresearch/dinov2, models/vision_transformer.py, BlockChunk: blocks lie in chunks, counted through.
    state = draw_state(DINOV2, 1)
    heads = {"dino_head.mlp.0.bias": torch.ones(3), "ibot_head.last_layer.weight_v": torch.ones(1)}
    teacher = {f"backbone.{chunk(name)}": tensor for name, tensor in state.items()}
    assert "backbone.blocks.1.3.norm1.weight" in teacher
    torch.save({"teacher": {**teacher, "backbone.mask_token": torch.zeros(1, 64), **heads}}, tmp_path / "teacher.pth")
    check_equal(load_encoder(str(tmp_path / "teacher.pth"), 56), state)


def chunk(name: str) -> str:
    """Two blocks to a chunk."""
    first, *rest = name.split(".")
    return ".".join([first, str(int(rest[0]) // 2), *rest]) if first == "blocks" else name


class Options(dict[str, Any]):
    """As yacs' CfgNode: a dict with attributes of its own."""

    def __init__(self, **content: object) -> None:
        super().__init__(content)
        self.__dict__["__immutable__"] = True


def test_options_of_cups_are_read_past(tmp_path: Path) -> None:
    # visinf/cups, pl_model_pseudo.py saves its yacs options, dicts of dicts, among the hyperparameters.
    options = Options(SYSTEM=Options(GPUS=4))
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {"config": options}}, tmp_path / "plain.ckpt")
    rename_options(tmp_path / "plain.ckpt", b"yacs.config\nCfgNode\n", tmp_path / "cups.ckpt")
    content: Any = read_content(tmp_path / "cups.ckpt")
    assert content["hyper_parameters"]["config"] == {"SYSTEM": {"GPUS": 4}}
    assert read_state(tmp_path / "cups.ckpt")["a"].tolist() == [1.0]


def test_other_types_beside_the_weights_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "config": Options(GPUS=4)}, tmp_path / "plain.ckpt")
    rename_options(tmp_path / "plain.ckpt", b"somewhere\nElse\n", tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt holds no readable weights: it names somewhere\.Else, which"):
        read_content(tmp_path / "odd.ckpt")


def rename_options(source: Path, name: bytes, target: Path) -> None:
    """A copy of torch's archive whose pickle names another type for our options."""
    ours = f"{Options.__module__}\nOptions\n".encode()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for entry in archive.namelist():
            content = archive.read(entry)
            assert not entry.endswith("data.pkl") or content.count(ours) == 1
            copy.writestr(entry, content.replace(ours, name))


def test_detectrons_arrays_are_read_as_tensors(tmp_path: Path) -> None:
    content = {"model": {"a": np.array([[0.5, 2.0]])}, "__author__": "Detectron2", "matching_heuristics": True}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
    state = read_state(tmp_path / "zoo.pkl")
    assert (state["a"].dtype, state["a"].tolist()) == (torch.float32, [[0.5, 2.0]])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, dtype=torch.float16).expand(10**12),
        torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**12,), check_invariants=True),
        torch.empty(10**12, device="meta"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"huge": tensor}, tmp_path / "claim.pth")
    with pytest.raises(CheckpointError, match=r"claim\.pth holds no readable weights"):
        read_state(tmp_path / "claim.pth")
