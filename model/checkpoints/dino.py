"""Published encoders, DINO's and DINOv2's, converted to our names and files."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.checkpoints.state_dicts import (
    DEFAULT_CACHE,
    StateDict,
    describe_encoder_origin,
    fetch_file,
    infer_stored_encoder_config,
    load_strictly,
    read_encoder_state_dict,
)
from model.errors import CheckpointError, ConfigError
from model.files import atomic_write, hash_file
from model.networks.resnet import Norm, ResNet
from model.networks.vit import VisionTransformer

_RENAMES = (
    (re.compile(r"^bottom_up\."), ""),
    (re.compile(r"^layer([1-4])\."), lambda match: f"res{int(match[1]) + 1}."),
    (re.compile(r"\bdownsample\.0\."), "shortcut."),
    (re.compile(r"\bdownsample\.1\."), "shortcut.norm."),
    (re.compile(r"\bbn([1-3])\."), r"conv\1.norm."),
    (re.compile(r"^conv1\."), "stem.conv1."),
)
"""torchvision's names of a ResNet, in turn, to detectron2's, which are ours."""

_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class ImportedEncoder:
    """What was converted."""

    kind: str
    tensors: int
    sha256: str
    """Of the file as published."""
    origin: str


def import_encoder(source: str, out: Path, *, cache: Path = DEFAULT_CACHE) -> ImportedEncoder:
    """Write a safetensors file of a published ViT or ResNet-50, by path or URL, under our names.

    Raises CheckpointError, leaving what was there, if the file is neither; ConfigError if `out` is no such file.
    """
    if out.suffix != ".safetensors" or out.is_dir():
        raise ConfigError(f"{out}: an encoder is written to a file that ends in .safetensors")
    path = fetch_file(source, cache)
    published = read_encoder_state_dict(path)
    is_vit = "patch_embed.proj.weight" in published
    try:
        state = convert_vit(published) if is_vit else convert_resnet(published)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    digest = hash_file(path)
    with atomic_write(out) as sibling:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, sibling, {"converted_from": digest})
    kind = "vision transformer" if is_vit else "ResNet-50"
    return ImportedEncoder(kind=kind, tensors=len(state), sha256=digest, origin=describe_encoder_origin(digest))


def load_resnet_state_dict(source: str, *, norm: Norm = "batch", cache: Path = DEFAULT_CACHE) -> StateDict:
    """The weights of a ResNet-50 with norms of that kind, by path or URL, from torchvision's names or detectron2's."""
    return convert_resnet(read_encoder_state_dict(fetch_file(source, cache)), norm)


def convert_vit(published: StateDict) -> StateDict:
    """The state of a ViT, its position grid as published. Raises CheckpointError, by name, for what does not fit."""
    load_strictly(VisionTransformer(infer_stored_encoder_config(published)), published)
    return published


def convert_resnet(published: StateDict, norm: Norm = "batch") -> StateDict:
    """The state of a ResNet-50 under our names. Raises CheckpointError, by name, for what does not fit.

    Which convolution of a block carries the stride no tensor shows: it must be the 3x3, as in DINO and torchvision.
    """
    state = {_rename(name): tensor for name, tensor in published.items() if not name.endswith(_COUNTER)}
    try:
        stem, inner, outer = (len(state[f"{name}.weight"]) for name in ("stem.conv1", "res2.0.conv1", "res2.0.conv3"))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"no encoder we know: neither a ViT nor a ResNet-50, for want of {error}") from error
    network = ResNet(stem, inner, outer, norm)
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith(_COUNTER)}
    state |= counters  # of training alone, and not in every file
    load_strictly(network, state)
    return state


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name
