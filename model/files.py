"""Files written whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from zipfile import BadZipFile

import numpy as np


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary sibling to write; it takes `path`'s place, flushed to disk, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    sibling = Path(name)
    try:
        yield sibling
        _flush(sibling)
        sibling.chmod(0o644)
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)


def remove_temp_files(path: Path) -> None:
    """Delete what writers of a file that were killed have left beside it; for whoever alone may write it now."""
    for each in path.parent.glob(f".{escape(path.name)}.*"):
        each.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling directory to fill; it takes `path`'s place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield sibling
        for file in sibling.rglob("*"):
            if file.is_file():
                _flush(file)
        sibling.chmod(0o755)
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, retired / "old")
            os.replace(sibling, path)
            shutil.rmtree(retired)
        else:
            os.replace(sibling, path)
    finally:
        shutil.rmtree(sibling, ignore_errors=True)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, without pickles. Raises ValueError, naming the file, if it is missing or broken."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
