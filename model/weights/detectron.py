"""Published checkpoints in detectron2's names, U2Seg's, CutLER's and CUPS', to runs."""

import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from model.errors import CheckpointError, ConfigError
from model.files import hash_file, replace_directory
from model.network.cascade_shape import CascadeShape, infer_shape
from model.network.panoptic_cascade import PIXEL_MEAN, PIXEL_STD, CascadeLimits, PanopticCascade
from model.run import RUN_FILE, RunCard, read_run_card, write_run
from model.weights.checkpoints import DEFAULT_CACHE, State, fetch, find_tensors, load_exactly, read_content
from model.weights.families import FAMILIES, guess_family

logger = logging.getLogger(__name__)

_PREFIX = re.compile(r"((module|model)\.)+")
"""Of distributed training and of CUPS' Lightning module."""

_NO_WEIGHTS = re.compile(
    r"(proposal_generator\.)?anchor_generator\.cell_anchors\.\d+"  # made from the configuration
    r"|teacher_model\..+"  # CUPS' average of its own weights; its loader takes the student, too
    r"|(sem_seg_head\.)?criterion\..+"  # of the loss
)
"""Tensors that detectron2's models may save and that no answer depends on."""

_PIXELS = {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
_SCALES = (1.0, 255.0)
"""detectron2 takes pixels of 0..255; CUPS takes 0..1, with mean and deviation to match: the same network."""
_CLOSE = 1e-4

_STEP_KEYS = ("iteration", "global_step")
"""Where detectron2 and Lightning count."""


def import_cascade(source: str, family: str, clusters: int, out: Path, *, cache: Path = DEFAULT_CACHE) -> RunCard:
    """Make a run of a published checkpoint, by path or URL; returns its card.

    Raises CheckpointError, leaving what was there, if the file is no such network, is of another of the `FAMILIES` or
    has another number of thing clusters; ConfigError if `out` is something else than an imported run.
    """
    _require_replaceable(out)
    path = fetch(source, cache)
    content = read_content(path)
    state = clean(find_tensors(content, path), path)
    try:
        shape = infer_shape(state)
        check_family(shape, family, clusters)
        network = PanopticCascade(shape, CascadeLimits())
        load_exactly(network, state)
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
    card = RunCard(network="panoptic_cascade", shape=shape, step=step or 0, provenance={"checkpoint": checkpoint})
    with replace_directory(out) as folder:
        write_run(folder, card, network)
    return card


def clean(published: State, path: Path) -> State:
    """The weights alone, under detectron2's names; `path` is for messages.

    Raises CheckpointError if the network takes other pixels than ours, or a tensor is not finite or comes twice.
    """
    state: State = {}
    dropped = []
    for original, tensor in published.items():
        name = _PREFIX.sub("", original, count=1) if _PREFIX.match(original) else original
        if _NO_WEIGHTS.fullmatch(name):
            dropped.append(original)
        elif name in state:
            raise CheckpointError(f"{path} holds {name} twice, as {original} too")
        elif not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {original} is not finite")
        else:
            state[name] = tensor
    if dropped:
        logger.info("%s: left out %s", path, ", ".join(dropped))
    _take_pixels(state, path)
    return state


def check_family(shape: CascadeShape, family: str, clusters: int) -> None:
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


def _take_pixels(state: State, path: Path) -> None:
    """Remove the normalisation from the state; raise CheckpointError unless it is ours."""
    found = {name: state.pop(name).flatten().double().tolist() for name in _PIXELS if name in state}
    for scale in _SCALES:
        if all(_are_near(values, _PIXELS[name], scale) for name, values in found.items()):
            return
    told = "; ".join(f"{name} {', '.join(f'{value:g}' for value in values[:3])}" for name, values in found.items())
    expected = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in _PIXELS.items())
    raise CheckpointError(f"{path} takes other pixels than RGB in ImageNet's statistics: {told}, expected {expected}")


def _are_near(values: list[float], expected: tuple[float, ...], scale: float) -> bool:
    return len(values) == len(expected) and all(
        abs(scale * value - right) < _CLOSE * right for value, right in zip(values, expected, strict=True)
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
    if read_run_card(out).fit:
        raise ConfigError(f"{out} is a run that was fitted, not imported: choose another --out")
