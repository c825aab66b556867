"""The media types we answer in, and the choice among them by an `Accept` header (RFC 9110, section 12.5.1)."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import NotAcceptable

MediaType = Literal[
    "application/json",
    "image/png",
    "image/jpeg",
    "application/geo+json",
    'image/png;profile="clusters"',
    "application/x-npz",
    "application/vnd.hf.image-segmentation+json",
    "application/zip",
    "multipart/mixed",
]
MEDIA_TYPES: tuple[MediaType, ...] = get_args(MediaType)
"""The first is the default; of equals, the earlier wins."""
MULTI_RESULT_MEDIA_TYPES: tuple[MediaType, ...] = ("application/json", "application/zip", "multipart/mixed")
"""Those that hold several pictures or tasks."""

_DEFAULT_PROFILES = {"image/png": "coco-panoptic"}
_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class _Range:
    name: str
    profile: str | None
    quality: float

    def rate_fit(self, name: str, profile: str | None) -> int:
        """How narrowly the range covers a type; 0 if it does not."""
        if self.profile is not None:
            return 4 if (self.name, self.profile) == (name, profile) else 0
        return {name: 3, f"{name.split('/')[0]}/*": 2, "*/*": 1}.get(self.name, 0)


def negotiate_media_type(accept: str, offered: tuple[MediaType, ...] = MEDIA_TYPES) -> MediaType:
    """The type that the caller likes best. Raises NotAcceptable, with what we speak, if it likes none.

    Of parameters, `q` and `profile` count; a range whose `q` is malformed counts as not acceptable.
    """
    if not accept.strip():
        return offered[0]
    ranges = [_read_range(part) for part in accept.split(",") if part.strip()]
    best = max(offered, key=lambda media: _quality_of(media, ranges))
    if _quality_of(best, ranges) <= 0.0:
        several = " for several pictures or tasks" if offered == MULTI_RESULT_MEDIA_TYPES else ""
        raise NotAcceptable(f"no answer fits 'Accept: {accept}'{several}: we speak {', '.join(offered)}")
    return best


def parse_media_type(media: str) -> tuple[str, str | None]:
    """The type without parameters, in lower case, and its profile."""
    name, *parameters = (piece.strip() for piece in media.split(";"))
    given = (piece.partition("=")[2].strip('" ') for piece in parameters if piece.lower().startswith("profile="))
    return name.lower(), next(given, None)


def _read_range(part: str) -> _Range:
    name, profile = parse_media_type(part)
    parameters = [piece.strip().lower() for piece in part.split(";")[1:]]
    quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
    return _Range(name=name, profile=profile, quality=float(quality) if _QUALITY.fullmatch(quality) else 0.0)


def _quality_of(media: MediaType, ranges: list[_Range]) -> float:
    """The quality of the most specific range that covers `media`, the last of equals."""
    name, profile = parse_media_type(media)
    profile = profile or _DEFAULT_PROFILES.get(name)
    covering = [each for each in ranges if each.rate_fit(name, profile)]
    return max(reversed(covering), key=lambda each: each.rate_fit(name, profile)).quality if covering else 0.0
