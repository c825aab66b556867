"""Published checkpoints in detectron2's names, U2Seg's, CutLER's and CUPS', to runs."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from model.checkpoints.runs import RUN_FILE, RunInfo, read_run_info, write_run
from model.checkpoints.state_dicts import (
    DEFAULT_CACHE,
    StateDict,
    extract_tensors,
    fetch_file,
    load_strictly,
    read_checkpoint,
)
from model.errors import CheckpointError, ConfigError
from model.files import atomic_directory, hash_file
from model.networks.interface import PIXEL_MEAN, PIXEL_STD
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade, infer_cascade_config

logger = logging.getLogger(__name__)

_PREFIX = re.compile(r"((module|model)\.)+")
"""Of distributed training and of CUPS' Lightning module."""

_NOT_WEIGHTS = re.compile(
    r"(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+"  # made from the configuration
    r"|teacher_model\..+"  # CUPS' average of its own weights; its loader takes the student, too
    r"|(sem_seg_head\.)?criterion\..+"  # of the loss
)
"""Tensors that detectron2's models may save and that no answer depends on."""

_NORMALIZATION = {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
_SCALES = (1.0, 255.0)
"""detectron2 takes pixels of 0..255; CUPS takes 0..1, with mean and deviation to match: the same network."""
_RELATIVE_TOLERANCE = 1e-4

_STEP_KEYS = ("iteration", "global_step")
"""Where detectron2 and Lightning count."""


def import_cascade(source: str, family: str, clusters: int, out: Path, *, cache: Path = DEFAULT_CACHE) -> RunInfo:
    """Make a run of a published checkpoint, by path or URL; returns its card.

    Raises CheckpointError, leaving what was there, if the file is no such network, is of another of the `FAMILIES` or
    has another number of thing clusters; ConfigError if `out` is something else than an imported run.
    """
    _require_replaceable(out)
    path = fetch_file(source, cache)
    content = read_checkpoint(path)
    state = clean_state_dict(extract_tensors(content, path), path)
    try:
        shape = infer_cascade_config(state)
        require_family(shape, family, clusters)
        network = PanopticCascade(shape, CascadeInferenceConfig())
        load_strictly(network, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    checkpoint: dict[str, Any] = {
        "file": Path(urlparse(source).path).name,
        "sha256": hash_file(path),
        "family": FAMILIES[family].title,
        "licence": FAMILIES[family].licence,
    }
    step = _find_step(content)
    if step is not None:
        checkpoint["iteration"] = step
    card = RunInfo(
        network="panoptic_cascade", network_config=shape, step=step or 0, provenance={"checkpoint": checkpoint}
    )
    with atomic_directory(out) as folder:
        write_run(folder, card, network)
    return card


def clean_state_dict(published: StateDict, path: Path) -> StateDict:
    """The weights alone, under detectron2's names; `path` is for messages.

    Raises CheckpointError if the network takes other pixels than ours, or a tensor is not finite or comes twice.
    """
    state: StateDict = {}
    dropped = []
    for original, tensor in published.items():
        name = _PREFIX.sub("", original, count=1) if _PREFIX.match(original) else original
        if _NOT_WEIGHTS.fullmatch(name):
            dropped.append(original)
        elif name in state:
            raise CheckpointError(f"{path} holds {name} twice, as {original} too")
        elif not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {original} is not finite")
        else:
            state[name] = tensor
    if dropped:
        logger.info("%s: left out %s", path, ", ".join(dropped))
    _pop_normalization(state, path)
    return state


def require_family(shape: CascadeConfig, family: str, clusters: int) -> None:
    """Raise CheckpointError unless a network of this shape can be of that family and has so many thing clusters."""
    if not FAMILIES[family].has(shape.thing_clusters, shape.stuff_clusters):
        head = f"a semantic head of {shape.stuff_clusters + 1} classes" if shape.stuff_clusters else "no semantic head"
        likely = guess_family(shape.thing_clusters, shape.stuff_clusters)
        hint = f"it looks like {likely}: give --as {likely}" if likely else "it looks like none of the families we read"
        raise CheckpointError(
            f"no {family} checkpoint: it has {shape.thing_clusters} thing clusters and {head}; {hint}"
        )
    if shape.thing_clusters != clusters:
        raise CheckpointError(
            f"it has {shape.thing_clusters} thing clusters, not {clusters}: give --clusters {shape.thing_clusters}"
        )


def _pop_normalization(state: StateDict, path: Path) -> None:
    """Remove the normalisation from the state; raise CheckpointError unless it is ours."""
    found = {name: state.pop(name).flatten().double().tolist() for name in _NORMALIZATION if name in state}
    for scale in _SCALES:
        if all(_are_near(values, _NORMALIZATION[name], scale) for name, values in found.items()):
            return
    told = "; ".join(f"{name} {', '.join(f'{value:g}' for value in values[:3])}" for name, values in found.items())
    expected = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in _NORMALIZATION.items())
    raise CheckpointError(f"{path} takes other pixels than RGB in ImageNet's statistics: {told}, expected {expected}")


def _are_near(values: list[float], expected: tuple[float, ...], scale: float) -> bool:
    return len(values) == len(expected) and all(
        abs(scale * value - right) < _RELATIVE_TOLERANCE * right for value, right in zip(values, expected, strict=True)
    )


def _find_step(content: object) -> int | None:
    if not isinstance(content, dict):
        return None
    return next((content[key] for key in _STEP_KEYS if type(content.get(key)) is int), None)


def _require_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not (out / RUN_FILE).is_file():
        raise ConfigError(f"{out} exists and is no run: choose another --out")
    if read_run_info(out).train_config:
        raise ConfigError(f"{out} is a run that was fitted, not imported: choose another --out")


@dataclass(frozen=True, kw_only=True)
class CheckpointFamily:
    """What all checkpoints of one project have in common."""

    title: str
    licence: str
    """Of the published weights."""
    thing_clusters: int | None
    """None: any number."""
    stuff_clusters: int | None
    """0: no semantic head; None: any number from 1."""

    def has(self, thing_clusters: int, stuff_clusters: int) -> bool:
        """Whether a checkpoint of this family can have these clusters."""
        is_stuff_right = stuff_clusters > 0 if self.stuff_clusters is None else stuff_clusters == self.stuff_clusters
        return is_stuff_right and self.thing_clusters in (None, thing_clusters)


FAMILIES = {
    "u2seg": CheckpointFamily(title="U2Seg", licence="Apache-2.0", thing_clusters=None, stuff_clusters=27),
    "cutler": CheckpointFamily(title="CutLER", licence="CC BY-NC-SA 4.0", thing_clusters=1, stuff_clusters=0),
    "cups": CheckpointFamily(title="CUPS", licence="Apache-2.0", thing_clusters=None, stuff_clusters=None),
}
"""By the word of the command line; where two fit, the first is the likelier."""


def guess_family(thing_clusters: int, stuff_clusters: int) -> str | None:
    """The family that a checkpoint with these clusters looks like."""
    return next((word for word, family in FAMILIES.items() if family.has(thing_clusters, stuff_clusters)), None)
