"""Scan of a folder for unlabeled photos: decodable, without duplicates, in a fixed order."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from model.errors import DatasetError, InputError
from model.files import list_by_suffix, replace_file
from model.images import SUFFIXES, decode_image
from model.progress import track

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_CACHE_VERSION = 1
_CachedEntry = tuple[int, int, str, int, int]
"""Size in bytes, modification time in nanoseconds, SHA-256, height, width."""
_ENTRIES = TypeAdapter(dict[str, _CachedEntry])


@dataclass(frozen=True, kw_only=True)
class PhotoFile:
    """One photo on disk."""

    path: Path
    name: str
    """Path relative to the scanned folder, with forward slashes."""
    digest: str
    """SHA-256 of the file's bytes; the key of all caches."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class PhotoScan:
    """The photos of a folder."""

    photos: tuple[PhotoFile, ...]
    skipped: tuple[str, ...]
    """`name: reason` of each photo that could not be decoded."""
    duplicates: int
    """Photos left out because another one has the same content."""
    other_files: dict[str, int]
    """Number of files left out because they are no photos, by suffix."""


def scan_photos(folder: Path, *, max_photos: int | None = None, cache_file: Path | None = None) -> PhotoScan:
    """Return every photo below `folder` once, sorted by name; unreadable photos are logged and left out.

    Links to folders are followed. With `max_photos`, that many photos are taken, evenly spread over the sorted names.
    Photos that `cache_file` knows with the same size and modification time are not decoded again; it is updated.
    Raises DatasetError if the folder is missing or has no readable photo.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder of photos")
    paths, other_files = list_by_suffix(folder, SUFFIXES)
    if other_files:
        logger.warning("left out files that are no photos, by suffix: %s", other_files)
    if max_photos is not None:
        paths = spread(paths, max_photos)
    photos: dict[str, PhotoFile] = {}
    known, seen = _read_cache(cache_file), dict[str, _CachedEntry]()
    skipped = []
    for path in track(paths, "scan"):
        name = path.relative_to(folder).as_posix()
        try:
            stat = path.stat()
            entry = known.get(name)
            if entry is None or entry[:2] != (stat.st_size, stat.st_mtime_ns):
                entry = (stat.st_size, stat.st_mtime_ns, *_inspect(path, name))
        except (InputError, OSError) as error:
            logger.warning("skipped %s: %s", name, error)
            skipped.append(f"{name}: {error}")
        else:
            seen[name] = entry
            _, _, digest, height, width = entry
            photos.setdefault(digest, PhotoFile(path=path, name=name, digest=digest, height=height, width=width))
    if cache_file and seen != known:
        replace_file(cache_file, json.dumps({"format_version": _CACHE_VERSION, "photos": seen}))
    if not photos:
        raise DatasetError(f"{folder} has no readable photo ({len(paths)} candidates)")
    duplicates = len(paths) - len(skipped) - len(photos)
    return PhotoScan(
        photos=tuple(photos.values()), skipped=tuple(skipped), duplicates=duplicates, other_files=other_files
    )


def spread(items: Sequence[Item], max_count: int) -> list[Item]:
    """Return `max_count` evenly spread items; all of them if there are fewer."""
    count = min(max_count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def hash_photos(photos: Sequence[PhotoFile]) -> str:
    """Return one SHA-256 over the names and contents of all photos, in order."""
    joined = "\n".join(f"{photo.name} {photo.digest}" for photo in photos)
    return hashlib.sha256(joined.encode()).hexdigest()


def _inspect(path: Path, name: str) -> tuple[str, int, int]:
    content = path.read_bytes()
    photo = decode_image(content)
    for warning in photo.warnings:
        logger.warning("%s: %s", name, warning)
    return hashlib.sha256(content).hexdigest(), photo.height, photo.width


def _read_cache(path: Path | None) -> dict[str, _CachedEntry]:
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if content["format_version"] == _CACHE_VERSION:
            return _ENTRIES.validate_python(content["photos"])
    except (OSError, ValueError, TypeError, KeyError):
        logger.warning("%s is unreadable: all photos are inspected again", path)
    return {}
