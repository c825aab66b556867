"""The unlabelled photos of a folder: decodable, unique, in a fixed order."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError, LabelStoreError
from model.pixels import decode_image
from training.progress import show

logger = logging.getLogger(__name__)

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
class Scan:
    """What a folder holds."""

    photos: tuple[PhotoFile, ...]
    broken: tuple[str, ...]
    """`name: reason` of every photo that could not be decoded."""
    duplicates: int


def scan_photos(folder: Path, *, limit: int | None = None) -> Scan:
    """Every photo below `folder` once, sorted by name; broken ones are reported and left out.

    With a `limit`, that many photos spread evenly over the sorted names.
    Raises LabelStoreError if the folder is missing or holds no photo that can be read.
    """
    if not folder.is_dir():
        raise LabelStoreError(f"{folder} is not a folder of photos")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if limit is not None and limit < len(paths):
        paths = [paths[index * len(paths) // limit] for index in range(limit)]
    photos: dict[str, PhotoFile] = {}
    broken = []
    for path in show(paths, "scan"):
        name = path.relative_to(folder).as_posix()
        try:
            found = _inspect(path, name)
        except (InputError, OSError) as error:
            logger.warning("skipped %s: %s", name, error)
            broken.append(f"{name}: {error}")
        else:
            photos.setdefault(found.digest, found)
    if not photos:
        raise LabelStoreError(f"{folder} holds no photo that can be read ({len(paths)} candidates)")
    return Scan(photos=tuple(photos.values()), broken=tuple(broken), duplicates=len(paths) - len(broken) - len(photos))


def _inspect(path: Path, name: str) -> PhotoFile:
    content = path.read_bytes()
    photo = decode_image(content)
    digest = hashlib.sha256(content).hexdigest()
    return PhotoFile(path=path, name=name, digest=digest, height=photo.height, width=photo.width)
