"""Checkpoints with detectron2's names: those of U2Seg, CutLER and CUPS become runs, and runs become checkpoints."""

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch

from model.checkpoints.runs import RUN_FILE, RunInfo, load_run, read_run_info, write_run
from model.checkpoints.state_dicts import StateDict, extract_tensors, fetch_file, load_strictly, read_checkpoint
from model.errors import CheckpointError, ConfigError
from model.files import atomic_directory, hash_file
from model.networks.interface import PIXEL_MEAN, PIXEL_STD
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade, infer_cascade_config

logger = logging.getLogger(__name__)

_PREFIX = re.compile(r"((module|model)\.)+")
"""Prefixes of distributed training and of CUPS' Lightning module."""

_NOT_WEIGHTS = re.compile(
    r"(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+"  # computed from the configuration
    r"|teacher_model\..+"  # CUPS' weight average; its loader uses the student, too
    r"|(sem_seg_head\.)?criterion\..+"  # of the loss
)
"""Tensors that detectron2's models may save and that no output depends on."""

_NORMALIZATION = {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
_SCALES = (1.0, 255.0)
"""detectron2 takes pixels of 0..255; CUPS takes 0..1 with matching mean and deviation: the same network."""

_STEP_KEYS = ("iteration", "global_step")
"""Keys of the step in detectron2 and Lightning."""

WEIGHTS_FILE = "model_final.pth"
CONFIG_FILE = "config.yaml"
_ORIGIN_KEY = "useg"
"""Key of what a run knows beyond weights and step, in checkpoints that `export_detectron2` wrote."""
_NORMS = {"batch": "BN", "frozen": "FrozenBN", "none": ""}


def import_cascade(source: str, family: str, clusters: int | None, out: Path) -> RunInfo:
    """Convert a checkpoint, by path or URL, to a run.

    Raises CheckpointError, leaving an existing run, if the file is not such a network, belongs to another of the
    `FAMILIES` or has another number of thing clusters than given; ConfigError if `out` is not an imported run.
    """
    _require_replaceable(out)
    path = fetch_file(source)
    content: Any = read_checkpoint(path)
    state = clean_state_dict(extract_tensors(content, path), path)
    try:
        config = infer_cascade_config(state)
        require_family(config, family, clusters)
        network = PanopticCascade(config, CascadeInferenceConfig())
        load_strictly(network, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    checkpoint: dict[str, Any] = {
        "file": Path(urlparse(source).path).name,
        "sha256": hash_file(path),
        "family": FAMILIES[family].title,
        "license": FAMILIES[family].license,
    }
    step = next((content[key] for key in _STEP_KEYS if type(content.get(key)) is int), None)
    if step is not None:
        checkpoint["iteration"] = step
    origin = json.loads(content.get(_ORIGIN_KEY, "{}"))
    info = RunInfo(
        network="panoptic_cascade",
        network_config=config,
        step=step or 0,
        side_px=origin.get("side_px", 0),
        provenance={"checkpoint": checkpoint, **origin.get("provenance", {})},
    )
    with atomic_directory(out) as folder:
        write_run(folder, info, network)
    return info


def export_detectron2(run: Path, out: Path) -> None:
    """Write a run of a panoptic cascade as a checkpoint and the configuration with which detectron2 builds its network.

    Raises ConfigError if it is another network, or has a ViT, which no configuration of detectron2 describes.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: choose another --out")
    info, network = load_run(run)
    if not isinstance(network, PanopticCascade) or network.config.backbone != "resnet50":
        raise ConfigError(f"{run} has no counterpart in detectron2: only a panoptic cascade with ResNet-50 has one")
    content = {
        "model": network.state_dict(),
        "__author__": "useg",
        "iteration": info.step,
        _ORIGIN_KEY: json.dumps({"side_px": info.side_px, "provenance": info.provenance}),
    }
    with atomic_directory(out) as folder:
        torch.save(content, folder / WEIGHTS_FILE)
        config = make_detectron2_config(network.config, network.inference, info.side_px)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")  # which is YAML, too


def make_detectron2_config(config: CascadeConfig, inference: CascadeInferenceConfig, side_px: int) -> dict[str, Any]:
    """Return the keys of detectron2's configuration that differ from its defaults.

    As U2Seg's configs/COCO-PanopticSegmentation, with the network's own sizes. `side_px` is as in `RunInfo`.
    """
    stages, levels = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
    proposals, detections = inference.proposals, inference.detections
    model = {
        "META_ARCHITECTURE": "PanopticFPN" if config.stuff_clusters else "GeneralizedRCNN",
        "WEIGHTS": WEIGHTS_FILE,
        "MASK_ON": True,
        **{name.upper(): list(values) for name, values in _NORMALIZATION.items()},
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "OUT_FEATURES": stages, "STRIDE_IN_1X1": False, "NORM": _NORMS[config.backbone_norm],
            "STEM_OUT_CHANNELS": config.stem_out_channels, "WIDTH_PER_GROUP": config.bottleneck_channels,
            "RES2_OUT_CHANNELS": config.res2_out_channels,
        },
        "FPN": {"IN_FEATURES": stages, "OUT_CHANNELS": config.fpn_channels, "NORM": _NORMS[config.fpn_norm]},
        "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
        "RPN": {
            "IN_FEATURES": [*levels, "p6"], "NMS_THRESH": proposals.nms_threshold,
            "PRE_NMS_TOPK_TEST": proposals.pre_nms_topk, "POST_NMS_TOPK_TEST": proposals.post_nms_topk,
        },
        "ROI_HEADS": {
            "NAME": "CascadeROIHeads", "IN_FEATURES": levels, "NUM_CLASSES": config.thing_clusters,
            "SCORE_THRESH_TEST": detections.score_threshold, "NMS_THRESH_TEST": detections.nms_threshold,
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "FC_DIM": config.box_fc_dim, "POOLER_RESOLUTION": 7,
            "CLS_AGNOSTIC_BBOX_REG": True,
        },
        "ROI_MASK_HEAD": {
            "NUM_CONV": 4, "CONV_DIM": config.mask_conv_dim, "CLS_AGNOSTIC_MASK": config.cls_agnostic_mask,
        },
        "SEM_SEG_HEAD": {"NUM_CLASSES": config.stuff_clusters + 1, "CONVS_DIM": config.sem_seg_conv_dim},
    }  # fmt: skip
    sizes = {"MIN_SIZE_TEST": side_px, "MAX_SIZE_TEST": side_px} if side_px else {}
    test = {"DETECTIONS_PER_IMAGE": detections.max_detections}
    return {"VERSION": 2, "MODEL": model, "INPUT": {"FORMAT": "RGB", **sizes}, "TEST": test}


def clean_state_dict(published: StateDict, path: Path) -> StateDict:
    """Return the weights with detectron2's names, without the rest; `path` is for error messages.

    Raises CheckpointError if the network normalizes pixels otherwise, or a tensor is not finite or occurs twice.
    """
    state: StateDict = {}
    dropped = []
    for original, tensor in published.items():
        name = _PREFIX.sub("", original, count=1) if _PREFIX.match(original) else original
        if _NOT_WEIGHTS.fullmatch(name):
            dropped.append(original)
        elif name in state:
            raise CheckpointError(f"{path} contains {name} twice, also as {original}")
        elif not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {original} is not finite")
        else:
            state[name] = tensor
    if dropped:
        logger.info("%s: ignored %s", path, ", ".join(dropped))
    _pop_normalization(state, path)
    return state


def require_family(config: CascadeConfig, family: str, clusters: int | None) -> None:
    """Raise CheckpointError unless the network can belong to the family and has that many thing clusters, if given."""
    things, stuff = config.thing_clusters, config.stuff_clusters
    if things not in FAMILIES[family].thing_clusters or stuff not in FAMILIES[family].stuff_clusters:
        raise CheckpointError(
            f"not a {family} checkpoint: it has {things} thing and {stuff} stuff clusters; use --format detectron2"
        )
    if clusters not in (None, things):
        raise CheckpointError(f"it has {things} thing clusters, not {clusters}: give --clusters {things}")


def _pop_normalization(state: StateDict, path: Path) -> None:
    """Remove the normalization from the state; raise CheckpointError unless it is ours."""
    found = {name: state.pop(name).flatten().double() for name in _NORMALIZATION if name in state}
    ours = {name: torch.tensor(values, dtype=torch.float64) for name, values in _NORMALIZATION.items()}
    for scale in _SCALES:
        if all(
            values.shape == ours[name].shape and torch.allclose(scale * values, ours[name], rtol=1e-4)
            for name, values in found.items()
        ):
            return
    given = "; ".join(f"{name} {', '.join(f'{each:g}' for each in found[name][:3].tolist())}" for name in found)
    expected = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in _NORMALIZATION.items())
    raise CheckpointError(f"{path} does not normalize RGB as ImageNet: it has {given}, expected {expected}")


def _require_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not (out / RUN_FILE).is_file():
        raise ConfigError(f"{out} exists and is not a run: choose another --out")
    if read_run_info(out).train_config:
        raise ConfigError(f"{out} is a trained run, not an imported one: choose another --out")


class CheckpointFamily(NamedTuple):
    """Properties that all checkpoints of one project share."""

    title: str
    license: str
    """License of the published weights; empty if it is not known."""
    thing_clusters: range
    stuff_clusters: range
    """0: no semantic head."""


_ANY = range(1 << 16)
FAMILIES = {
    "u2seg": CheckpointFamily("U2Seg", "Apache-2.0", _ANY, range(27, 28)),
    "cutler": CheckpointFamily("CutLER", "CC BY-NC-SA 4.0", range(1, 2), range(1)),
    "cups": CheckpointFamily("CUPS", "Apache-2.0", _ANY, _ANY[1:]),
    "detectron2": CheckpointFamily("detectron2", "", _ANY, _ANY),
}
"""Families by their name on the command line."""
