"""Reading state dicts from checkpoint files, local or downloaded, and loading them strictly."""

import hashlib
import logging
import re
import shutil
import textwrap
import urllib.request
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from model.checkpoints.safe_pickle import read_pickle
from model.errors import CheckpointError
from model.files import atomic_write, hash_file

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

DEFAULT_CACHE = Path("~/.cache/useg")
"""Folder of downloaded files."""

_WRAPPERS = ("teacher", "student", "model", "state_dict")
"""Keys under which training frameworks store weights; DINO publishes the teacher."""


class _Ignored:
    """Replaces objects that are not weights, and the functions that make them."""

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Discard the state."""


_IGNORED_TYPES: dict[str, type] = {
    "yacs.config.CfgNode": OrderedDict,  # configuration of CUPS; torch fills only plain dicts
    "argparse.Namespace": _Ignored,  # options of DINO
    "numpy.dtype": _Ignored,  # learning rates of DINO
    "numpy.core.multiarray.scalar": _Ignored,
    "numpy._core.multiarray.scalar": _Ignored,
}
"""Other types in published checkpoints, and what replaces them; the named types are never instantiated."""

_MAX_PROBLEMS_LENGTH = 2000
_SCHEMES = ("http", "https", "file")
_TIMEOUT_S = 60.0


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors of a checkpoint by name, unwrapped, floating-point ones as float32."""
    return extract_tensors(read_checkpoint(path), path)


def extract_tensors(content: Any, path: Path) -> StateDict:
    """Return the tensors in what `read_checkpoint` returned; `path` is for error messages.

    NumPy arrays become tensors, floating-point tensors float32. Raises CheckpointError if there is no dict of them.
    """
    for wrapper in _WRAPPERS:
        if isinstance(content, dict):
            content = content.get(wrapper, content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, expected tensors by name")
    found = {str(name): value for name, value in content.items() if isinstance(value, Tensor | np.ndarray)}
    tensors: StateDict = {}
    for name, value in found.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not _is_dense(tensor):
            raise CheckpointError(f"{path} is not a readable checkpoint: {name} claims more values than the file has")
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def read_checkpoint(path: Path) -> object:
    """Read a safetensors file, detectron2's `.pkl` of arrays, or what `torch.load(weights_only=True)` reads.

    Raises CheckpointError, naming what was refused, if the file is truncated, or contains code or unknown types.
    """
    if not path.is_file() or not path.stat().st_size:
        reason = "it is empty" if path.is_file() else "not a file"
        raise CheckpointError(f"{path} is not a readable checkpoint: {reason}")
    if path.suffix == ".pkl":
        return read_pickle(path)
    ignored: list[Any] = [(replacement, name) for name, replacement in _IGNORED_TYPES.items()]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(ignored):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many types for hostile or truncated files, some without text
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{type(error).__name__} {error}".splitlines()[0].split(". ")[0]
        if refused:
            reason = f"it refers to {refused[1]}, which no weights need; nothing of it was run"
        raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error


def load_strictly(module: nn.Module, state: StateDict) -> None:
    """Load all tensors, or raise CheckpointError with the names of missing, unexpected and misshapen ones."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problems = textwrap.shorten(str(error).partition("\n")[2], _MAX_PROBLEMS_LENGTH)
        raise CheckpointError(f"its tensors do not fit: {problems}") from error


def fetch_file(source: str, sha256: str = "", cache: Path = DEFAULT_CACHE) -> Path:
    """Return the local path of a path or URL; a URL is downloaded into `cache` once.

    Raises CheckpointError if there is no such file, or if a download fails or its content has another hash than given.
    """
    parsed = urlparse(source)
    if parsed.scheme not in _SCHEMES:
        if "://" in source:
            raise CheckpointError(f"{source} cannot be downloaded: expected a path, or one of {', '.join(_SCHEMES)}")
        path = Path(source).expanduser()
        if not path.is_file():
            raise CheckpointError(f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist")
        return path
    digest = hashlib.sha256(source.encode()).hexdigest()  # many different encoders are called model.safetensors
    path = cache.expanduser() / f"{digest[:16]}-{Path(parsed.path).name}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _download(source, path, sha256)
        except (OSError, HTTPException, ValueError) as error:
            raise CheckpointError(f"{source} could not be downloaded: {error}") from error
    return path


def _download(url: str, path: Path, sha256: str) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "useg"})
    with FileLock(f"{path}.lock"):
        if path.is_file():  # by another process meanwhile
            return
        logger.info("downloading %s", url)
        with atomic_write(path) as temporary:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response, temporary.open("wb") as stream:
                length = response.headers["Content-Length"]
                expected = None if length is None else int(length)
                with tqdm.wrapattr(response, "read", total=expected, desc=path.stem, disable=None) as content:
                    shutil.copyfileobj(content, stream)
            size = temporary.stat().st_size
            if expected not in (None, size):
                raise OSError(f"the connection ended after {size} of {expected} bytes: try again")
            if sha256 and (found := hash_file(temporary)) != sha256:
                raise OSError(f"its SHA-256 is {found}, expected {sha256}: try again")


def _is_dense(tensor: Tensor) -> bool:
    """Whether all values are in memory: sparse, meta and expanded tensors can claim any size."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
