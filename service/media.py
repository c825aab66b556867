"""The media types we answer in, and the choice among them by an `Accept` header (RFC 9110, section 12.5.1)."""

import re
from typing import Literal, get_args

from model.errors import AnswerUnsupported

Media = Literal["application/json", "image/png", "image/jpeg"]
MEDIA: tuple[Media, ...] = get_args(Media)
"""The first is the default and wins ties."""

_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)


def choose_media(accept: str) -> Media:
    """The type that the caller likes best. Raises AnswerUnsupported, with what we speak, if it likes none.

    Other parameters than `q` are ignored; a range whose `q` is malformed counts as not acceptable.
    """
    if not accept.strip():
        return MEDIA[0]
    ranges = dict(_read_range(part) for part in accept.split(",") if part.strip())
    best = max(MEDIA, key=lambda media: _rate(media, ranges))
    if _rate(best, ranges) <= 0.0:
        raise AnswerUnsupported(f"no answer fits 'Accept: {accept}': we speak {', '.join(MEDIA)}")
    return best


def _read_range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
    return name, float(quality) if _QUALITY.fullmatch(quality) else 0.0


def _rate(media: Media, ranges: dict[str, float]) -> float:
    """The quality of the most specific range that covers `media`."""
    covering = (media, f"{media.split('/')[0]}/*", "*/*")
    return next((ranges[each] for each in covering if each in ranges), 0.0)
