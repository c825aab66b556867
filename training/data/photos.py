"""The unlabelled photos of a folder: decodable, unique, in a fixed order."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError, LabelStoreError
from model.files import atomic_write
from model.images import decode_image
from training.progress import track

logger = logging.getLogger(__name__)

_CACHE_VERSION = 1
_CachedEntry = tuple[int, int, str, int, int]
"""Size in bytes, time of change in nanoseconds, sha256, height, width."""
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, kw_only=True)
class PhotoFile:
    """One photo on disk."""

    path: Path
    name: str
    """Its path inside the folder, with forward slashes."""
    digest: str
    """The sha256 of its bytes: what caches know it by."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class PhotoScan:
    """What a folder holds."""

    photos: tuple[PhotoFile, ...]
    broken: tuple[str, ...]
    """`name: reason` of every photo that could not be decoded."""
    duplicates: int


def scan_photos(folder: Path, *, limit: int | None = None, memo: Path | None = None) -> PhotoScan:
    """Every photo below `folder` once, sorted by name; broken ones are reported and left out.

    With a `limit`, that many photos spread evenly over the sorted names. What the file `memo` says of a photo is
    believed while size and time of change are the same; it is written anew.
    Raises LabelStoreError if the folder is missing or holds no photo that can be read.
    """
    if not folder.is_dir():
        raise LabelStoreError(f"{folder} is not a folder of photos")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if limit is not None and limit < len(paths):
        paths = [paths[index * len(paths) // limit] for index in range(limit)]
    photos: dict[str, PhotoFile] = {}
    known, seen = _read_cache(memo), dict[str, _CachedEntry]()
    broken = []
    for path in track(paths, "scan"):
        name = path.relative_to(folder).as_posix()
        try:
            stamp = path.stat()
            memory = known.get(name)
            if memory is None or memory[:2] != (stamp.st_size, stamp.st_mtime_ns):
                memory = (stamp.st_size, stamp.st_mtime_ns, *_inspect(path))
        except (InputError, OSError) as error:
            logger.warning("skipped %s: %s", name, error)
            broken.append(f"{name}: {error}")
        else:
            seen[name] = memory
            _, _, digest, height, width = memory
            photos.setdefault(digest, PhotoFile(path=path, name=name, digest=digest, height=height, width=width))
    if memo and seen != known:
        with atomic_write(memo) as sibling:
            sibling.write_text(json.dumps({"format_version": _CACHE_VERSION, "photos": seen}))
    if not photos:
        raise LabelStoreError(f"{folder} holds no photo that can be read ({len(paths)} candidates)")
    return PhotoScan(
        photos=tuple(photos.values()), broken=tuple(broken), duplicates=len(paths) - len(broken) - len(photos)
    )


def _inspect(path: Path) -> tuple[str, int, int]:
    content = path.read_bytes()
    photo = decode_image(content)
    return hashlib.sha256(content).hexdigest(), photo.height, photo.width


def _read_cache(path: Path | None) -> dict[str, _CachedEntry]:
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if content["format_version"] == _CACHE_VERSION:
            return {name: tuple(memory) for name, memory in content["photos"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        logger.warning("%s cannot be read: all photos are looked at anew", path)
    return {}
