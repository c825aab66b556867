"""Atomic writes: files and folders appear complete or not at all."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

_MIN_FREE_BYTES = 4096


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file; when the block ends without error, it is synced and replaces `path`.

    Raises OSError that names `path`, whatever the block raised, if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with report_disk_full(path):
            yield temporary
            _sync(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write the complete content of a file, text in UTF-8, as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_temp_files(path: Path) -> None:
    """Delete temporary files that killed writers of `path` left. The caller is the only writer."""
    for each in path.parent.glob(f".{escape(path.name)}.*"):
        each.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends without error, it is synced and replaces `path`.

    Raises OSError that names `path`, whatever the block raised, if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with report_disk_full(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            temporary.chmod(0o755)
            if path.exists():
                retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
                os.replace(path, retired / "old")
                os.replace(temporary, path)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def list_by_suffix(folder: Path, suffixes: Container[str]) -> tuple[list[Path], dict[str, int]]:
    """Return the files of `list_files` with one of these lower-case suffixes, and the number of others by suffix."""
    files = list_files(folder)
    others = Counter(path.suffix for path in files if path.suffix.lower() not in suffixes)
    return [path for path in files if path.suffix.lower() in suffixes], dict(others)


def append_text(path: Path, text: str) -> None:
    """Append all of a text to a file, or nothing; an empty file is removed then.

    Raises OSError, which names the file if the disk is full.
    """
    content = text.encode()
    with report_disk_full(path), path.open("ab", buffering=0) as stream:
        size = stream.tell()
        try:
            if stream.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            stream.truncate(size)
            if not size:
                path.unlink()
            raise


@contextmanager
def report_disk_full(path: Path) -> Iterator[None]:
    """Raise OSError that names `path`, whatever the block raised, if a write failed for lack of space.

    Libraries raise errors of their own then, some of which (safetensors) only quote the system's message.
    """
    try:
        yield
    except Exception as error:
        is_named = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        is_quoted = os.strerror(errno.ENOSPC) in str(error)
        if is_named or is_quoted or shutil.disk_usage(path.parent).free < _MIN_FREE_BYTES:
            message = "no space left on the disk, free some and try again"
            raise OSError(errno.ENOSPC, message, str(path)) from error
        raise


def list_files(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted; links to folders are followed, and each folder is visited once.

    Links to nothing are included. Raises OSError for a folder that may not be read.
    """

    def fail(error: OSError) -> None:
        raise error

    files: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for directory, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders.sort()  # the walk, and with it which of two links to a folder is followed, is always the same
        paths = (Path(directory, name) for name in names)
        files += [path for path in paths if path.is_file() or path.is_symlink()]
    return sorted(files)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` file. Pickled objects are rejected.

    Raises ValueError, naming the file, if it is missing or invalid.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
