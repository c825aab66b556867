"""Checkpoint files load strictly, or are refused with the names of what does not fit."""

import argparse
import os
import pickle
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.dino import load_encoder, read_encoder_state_dict
from model.checkpoints.state_dicts import fetch_file, read_checkpoint, read_state_dict
from model.errors import CheckpointError
from model.networks.vit import EncoderConfig, VisionTransformer

DINO = EncoderConfig(embed_dim=64, depth=4, patch_px=16, grid_size=3, num_registers=0, has_layer_scale=False)
DINOV2 = EncoderConfig(embed_dim=64, depth=4, patch_px=14, grid_size=4, num_registers=2, has_layer_scale=True)
SHAPES = pytest.mark.parametrize("shape", [DINO, DINOV2], ids=["dino", "dinov2"])


def draw_state(config: EncoderConfig, seed: int = 1) -> dict[str, Tensor]:
    """Random weights with the published names, none at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in VisionTransformer(config).state_dict().items()}
    return {name: torch.randn(size, generator=generator) * 0.1 for name, size in shapes.items()}


def save(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def equals(encoder: VisionTransformer, state: dict[str, Tensor]) -> bool:
    loaded = encoder.state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@SHAPES
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_encoder_loads_by_path_frozen_and_exact(tmp_path: Path, shape: EncoderConfig, suffix: str) -> None:
    state = draw_state(shape)
    encoder = load_encoder(str(save(state, tmp_path / f"encoder{suffix}")), shape.grid_size * shape.patch_px)
    assert encoder.config == shape
    assert equals(encoder, state)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_parameter_names_are_those_of_dinov2() -> None:
    # facebookresearch/dinov2, hubconf.dinov2_vits14_reg: the names of its first block and of what is outside blocks.
    names = [name for name in draw_state(DINOV2) if not name.startswith(("blocks.1.", "blocks.2.", "blocks.3."))]
    block = [
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
        "ls2.gamma",
    ]  # fmt: skip
    outside = ["cls_token", "pos_embed", "register_tokens", "norm.weight", "norm.bias"]
    patches = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert sorted(names) == sorted([*outside, *patches, *(f"blocks.0.{name}" for name in block)])


@pytest.mark.parametrize("wrapper", ["teacher", "student", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["backbone.", "module.", "module.backbone."])
def test_weights_in_a_wrapper_with_a_prefix_are_found(tmp_path: Path, wrapper: str, prefix: str) -> None:
    torch.save({wrapper: {f"{prefix}a": torch.ones(2)}, "epoch": 7}, tmp_path / "run.pth")
    state = read_encoder_state_dict(tmp_path / "run.pth")
    assert list(state) == ["a"]
    assert state["a"].tolist() == [1.0, 1.0]
    assert list(read_state_dict(tmp_path / "run.pth")) == [f"{prefix}a"]


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "backbone.a": torch.ones(1)}, tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match=r"twice\.pth contains a twice"):
        read_encoder_state_dict(tmp_path / "twice.pth")


def test_float16_is_read_as_float32_and_integers_stay_integers(tmp_path: Path) -> None:
    save({"a": torch.tensor([0.5], dtype=torch.float16), "n": torch.tensor(3)}, tmp_path / "half.safetensors")
    state = read_state_dict(tmp_path / "half.safetensors")
    assert (state["a"].dtype, state["a"].item()) == (torch.float32, 0.5)
    assert (state["n"].dtype, state["n"].item()) == (torch.int64, 3)


def test_urls_are_downloaded_once_and_apart_whatever_their_file_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(draw_state(DINO, ord(folder)), tmp_path / folder / "model.safetensors")
    for folder in ("a", "b", "a", "b"):
        source = tmp_path / folder / "model.safetensors"
        encoder = load_encoder(source.as_uri(), 48)
        assert equals(encoder, draw_state(DINO, ord(folder)))
        source.unlink(missing_ok=True)


class HangUp(BaseHTTPRequestHandler):
    """Sends ten of 100 bytes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(bytes(10))

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


@pytest.fixture
def cut_off_url() -> Iterator[str]:
    """URL of a local server that closes connections early."""
    with TCPServer(("127.0.0.1", 0), HangUp) as server:  # HTTPServer would look up the host name
        server.timeout = 5.0
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/encoder.pth"
        server.shutdown()
        thread.join()


def test_a_truncated_download_is_refused_and_not_cached(tmp_path: Path, cut_off_url: str) -> None:
    with pytest.raises(CheckpointError, match="ended after 10 of 100 bytes"):
        fetch_file(cut_off_url, cache=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("encoder.pth", r"its SHA-256 is [0-9a-f]{64}, expected 00"), ("nowhere.pth", "could not be downloaded")],
)
def test_a_failed_download_or_other_content_is_not_kept(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "encoder.pth").write_bytes(b"another encoder")
    with pytest.raises(CheckpointError, match=message):
        fetch_file((tmp_path / name).as_uri(), "00", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://host/a.pth", r"ftp://host/a\.pth cannot be downloaded: expected a path, or one of http,"),
        ("nowhere.pth", r"nowhere\.pth does not exist"),
        (".", "is a folder, not a file"),
    ],
)
def test_a_source_without_a_file_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        fetch_file(source)


class Intruder:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"weights": Intruder(trace)}, tmp_path / "evil.pth")
    for name in ("bare.pth", "bare.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Intruder(trace), protocol=2))
    for name in ("evil.pth", "bare.pth", "bare.pkl"):
        with pytest.raises(CheckpointError, match=rf"{name} is not a readable checkpoint: .*(posix|nt)\.mkdir"):
            read_state_dict(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["broken.pth", "broken.ckpt", "broken.pkl", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02", b"\xff" * 64], ids=str)
def test_a_file_of_another_format_is_refused_on_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is not a readable checkpoint") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [torch.ones(2), [torch.ones(2)], {"model": torch.ones(2)}], ids=["tensor", "list", "nested"]
)
def test_a_checkpoint_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        read_state_dict(tmp_path / "odd.pth")


@pytest.mark.parametrize("side_px", [-14, 0, 13, 57])
def test_a_side_that_is_not_a_multiple_of_the_patch_is_refused(tmp_path: Path, side_px: int) -> None:
    path = save(draw_state(DINOV2), tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=f"side {side_px} px is not a multiple of the encoder's patch, 14 px"):
        load_encoder(str(path), side_px)


@pytest.mark.parametrize(
    ("start", "replacement", "message"),
    [
        ("patch_embed.proj.weight", {}, "not a DINO or DINOv2 encoder.*patch_embed"),
        ("blocks.", {}, "not a DINO or DINOv2 encoder"),
        ("pos_embed", {"pos_embed": torch.zeros(1, 13, 64)}, "13 positions are not a class token and a square grid"),
    ],
)
def test_a_state_dict_of_another_network_is_refused(
    tmp_path: Path, start: str, replacement: dict[str, Tensor], message: str
) -> None:
    state = {name: tensor for name, tensor in draw_state(DINO).items() if not name.startswith(start)}
    path = save(state | replacement, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_encoder(str(path), 48)


def test_a_training_checkpoint_of_dino_gives_its_teacher(tmp_path: Path) -> None:
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
    assert equals(load_encoder(str(tmp_path / "full.pth"), 48), state)
    del content["teacher"]
    torch.save(content, tmp_path / "student.pth")
    assert equals(load_encoder(str(tmp_path / "student.pth"), 48), student)


def test_a_teacher_of_dinov2_is_read_without_heads_and_chunks(tmp_path: Path) -> None:
    # facebookresearch/dinov2, models/vision_transformer.py, BlockChunk: blocks lie in chunks, counted through.
    state = draw_state(DINOV2, 1)
    heads = {"dino_head.mlp.0.bias": torch.ones(3), "ibot_head.last_layer.weight_v": torch.ones(1)}
    teacher = {f"backbone.{chunk(name)}": tensor for name, tensor in state.items()}
    assert "backbone.blocks.1.3.norm1.weight" in teacher
    torch.save({"teacher": {**teacher, "backbone.mask_token": torch.zeros(1, 64), **heads}}, tmp_path / "teacher.pth")
    assert equals(load_encoder(str(tmp_path / "teacher.pth"), 56), state)


def chunk(name: str) -> str:
    """Put two blocks into each chunk."""
    first, *rest = name.split(".")
    return ".".join([first, str(int(rest[0]) // 2), *rest]) if first == "blocks" else name


class Options(dict[str, Any]):
    """Like yacs' CfgNode, a dict with attributes."""

    def __init__(self, **content: object) -> None:
        super().__init__(content)
        self.__dict__["__immutable__"] = True


def test_the_configuration_in_a_cups_checkpoint_is_read_as_dicts(tmp_path: Path) -> None:
    # visinf/cups, pl_model_pseudo.py saves its yacs options, dicts of dicts, among the hyperparameters.
    options = Options(SYSTEM=Options(GPUS=4))
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {"config": options}}, tmp_path / "plain.ckpt")
    rename_options(tmp_path / "plain.ckpt", b"yacs.config\nCfgNode\n", tmp_path / "cups.ckpt")
    content: Any = read_checkpoint(tmp_path / "cups.ckpt")
    assert content["hyper_parameters"]["config"] == {"SYSTEM": {"GPUS": 4}}
    assert read_state_dict(tmp_path / "cups.ckpt")["a"].tolist() == [1.0]


def rename_options(source: Path, name: bytes, target: Path) -> None:
    """Copy torch's archive with another type name for our options."""
    ours = f"{Options.__module__}\nOptions\n".encode()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for entry in archive.namelist():
            content = archive.read(entry)
            assert not entry.endswith("data.pkl") or content.count(ours) == 1
            copy.writestr(entry, content.replace(ours, name))


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
    with pytest.raises(CheckpointError, match=r"claim\.pth is not a readable checkpoint"):
        read_state_dict(tmp_path / "claim.pth")
