"""Published checkpoints of U2Seg, CutLER and CUPS, with detectron2's names, converted to runs."""

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
_RELATIVE_TOLERANCE = 1e-4

_STEP_KEYS = ("iteration", "global_step")
"""Keys of the step in detectron2 and Lightning."""


def import_cascade(source: str, family: str, clusters: int, out: Path, *, cache: Path = DEFAULT_CACHE) -> RunInfo:
    """Convert a published checkpoint, by path or URL, to a run.

    Raises CheckpointError, leaving an existing run, if the file is not such a network, belongs to another of the
    `FAMILIES` or has another number of thing clusters; ConfigError if `out` is not an imported run.
    """
    _require_replaceable(out)
    path = fetch_file(source, cache)
    content = read_checkpoint(path)
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
    step = _find_step(content)
    if step is not None:
        checkpoint["iteration"] = step
    info = RunInfo(
        network="panoptic_cascade", network_config=config, step=step or 0, provenance={"checkpoint": checkpoint}
    )
    with atomic_directory(out) as folder:
        write_run(folder, info, network)
    return info


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


def require_family(config: CascadeConfig, family: str, clusters: int) -> None:
    """Raise CheckpointError unless the network can belong to the family and has that many thing clusters."""
    if not FAMILIES[family].matches(config.thing_clusters, config.stuff_clusters):
        head = (
            f"a semantic head of {config.stuff_clusters + 1} classes" if config.stuff_clusters else "no semantic head"
        )
        likely = guess_family(config.thing_clusters, config.stuff_clusters)
        hint = f"it looks like {likely}: give --format {likely}" if likely else "it looks like no supported family"
        raise CheckpointError(
            f"not a {family} checkpoint: it has {config.thing_clusters} thing clusters and {head}; {hint}"
        )
    if config.thing_clusters != clusters:
        raise CheckpointError(
            f"it has {config.thing_clusters} thing clusters, not {clusters}: give --clusters {config.thing_clusters}"
        )


def _pop_normalization(state: StateDict, path: Path) -> None:
    """Remove the normalization from the state; raise CheckpointError unless it is ours."""
    found = {name: state.pop(name).flatten().double().tolist() for name in _NORMALIZATION if name in state}
    for scale in _SCALES:
        if all(_is_close(values, _NORMALIZATION[name], scale) for name, values in found.items()):
            return
    given = "; ".join(f"{name} {', '.join(f'{value:g}' for value in values[:3])}" for name, values in found.items())
    expected = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in _NORMALIZATION.items())
    raise CheckpointError(f"{path} does not normalize RGB as ImageNet: it has {given}, expected {expected}")


def _is_close(values: list[float], expected: tuple[float, ...], scale: float) -> bool:
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
        raise ConfigError(f"{out} exists and is not a run: choose another --out")
    if read_run_info(out).train_config:
        raise ConfigError(f"{out} is a trained run, not an imported one: choose another --out")


@dataclass(frozen=True, kw_only=True)
class CheckpointFamily:
    """Properties that all checkpoints of one project share."""

    title: str
    license: str
    """License of the published weights."""
    thing_clusters: int | None
    """None: any number."""
    stuff_clusters: int | None
    """0: no semantic head; None: any number from 1."""

    def matches(self, thing_clusters: int, stuff_clusters: int) -> bool:
        """Whether a checkpoint of this family can have these numbers of clusters."""
        matches_stuff = stuff_clusters > 0 if self.stuff_clusters is None else stuff_clusters == self.stuff_clusters
        return matches_stuff and self.thing_clusters in (None, thing_clusters)


FAMILIES = {
    "u2seg": CheckpointFamily(title="U2Seg", license="Apache-2.0", thing_clusters=None, stuff_clusters=27),
    "cutler": CheckpointFamily(title="CutLER", license="CC BY-NC-SA 4.0", thing_clusters=1, stuff_clusters=0),
    "cups": CheckpointFamily(title="CUPS", license="Apache-2.0", thing_clusters=None, stuff_clusters=None),
}
"""Families by their name on the command line; if several match, the first is the most likely."""


def guess_family(thing_clusters: int, stuff_clusters: int) -> str | None:
    """Guess the family from the numbers of clusters."""
    return next((name for name, family in FAMILIES.items() if family.matches(thing_clusters, stuff_clusters)), None)
