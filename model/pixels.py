"""Bytes to oriented RGB, to the canvas a network takes, and back: beside `enlargement`, the project's only resizes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float, Int32, UInt8
from PIL import Image, UnidentifiedImageError

from model.contract import Canvas
from model.errors import ImageTooLarge, ImageUnreadable, InputError, TooManyPixels

PAD_RGB = (124, 116, 104)
"""ImageNet's mean colour: zero once normalised."""
LIMIT_PIXELS = 50_000_000
_MOST_PAGES = 1_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no others: Pillow hands EPS to Ghostscript, for one
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_16_BIT = 65_535


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A decoded picture, upright."""

    image: UInt8[np.ndarray, "H W 3"]
    frames: int
    """Frames in the file; only the first is decoded."""
    orientation: int
    """The EXIF orientation that was applied, 1..8; 1 is upright."""

    @property
    def height(self) -> int:
        return int(self.image.shape[0])

    @property
    def width(self) -> int:
        return int(self.image.shape[1])


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a picture lies on its canvas: at the top left, `placed_*` pixels large, both multiples of the stride."""

    height: int
    width: int
    placed_height: int
    placed_width: int
    canvas: Canvas
    stride_px: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width on the canvas, as a network is told them."""
        return self.placed_height, self.placed_width

    @property
    def map_height(self) -> int:
        """Rows of a stride-sized map that show the picture."""
        return self.placed_height // self.stride_px

    @property
    def map_width(self) -> int:
        """Columns of a stride-sized map that show the picture."""
        return self.placed_width // self.stride_px


def decode_image(content: bytes, *, limit_pixels: int = LIMIT_PIXELS) -> Photo:
    """The first frame, upright, as 8-bit RGB; transparent pixels are laid on white, 16-bit grey is scaled.

    Raises TooManyPixels from the header alone, before any pixel is decoded, and ImageUnreadable for anything that is
    not a whole picture.
    """
    if not content:
        raise ImageUnreadable("the image is empty (0 bytes): send a JPEG, PNG, WebP, GIF, BMP or TIFF file")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as source:
            _check_size(source, limit_pixels)
            frames = _count_frames(source)
            source.seek(0)
            if (image := _decode_jpeg(source, content)) is not None:
                return Photo(image=image, frames=frames, orientation=_read_orientation(source))
            rgb, orientation = _load_upright(source)
            return Photo(image=np.array(rgb), frames=frames, orientation=orientation)
    except (InputError, MemoryError):  # that memory is short is not the caller's fault
        raise
    except UnidentifiedImageError as error:
        raise ImageUnreadable(
            f"{len(content)} bytes that are no picture we read: send a JPEG, PNG, WebP, GIF, BMP or TIFF file"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"the image has too many pixels: at most {limit_pixels} are taken") from error
    except Exception as error:  # Pillow's parsers raise IndexError, TypeError, struct.error and more on broken files
        raise ImageUnreadable(f"the image is broken or cut short ({error}): send the whole file") from error


def read_photo(path: Path) -> Photo:
    """The picture in a file. Raises as `decode_image` does, the path before the message."""
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise ImageUnreadable(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise type(error)(f"{path}: {error}") from error


def place(
    image: UInt8[np.ndarray, "H W 3"], canvases: Sequence[Canvas], stride_px: int
) -> tuple[UInt8[np.ndarray, "3 h w"], Placement]:
    """The picture on the canvas that suits it best, scaled to fill it one way, the rest ImageNet's mean colour.

    Both sides are rounded to multiples of the stride, so that the way back is one exact resize.
    """
    height, width = image.shape[:2]
    placement = plan_placement(height, width, canvases, stride_px)
    target = (placement.placed_width, placement.placed_height)
    shrinks = placement.placed_width * placement.placed_height < width * height
    # Linear aliases when it shrinks, area blocks when it grows (SERVING.md, section 3).
    scaled = cv2.resize(image, target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    laid = np.empty((placement.canvas.height_px, placement.canvas.width_px, 3), np.uint8)
    laid[:] = PAD_RGB
    laid[: placement.placed_height, : placement.placed_width] = scaled
    return np.ascontiguousarray(laid.transpose(2, 0, 1)), placement


def shrink(photo: Photo, longest_px: int) -> Photo:
    """The photo with no side longer than this."""
    scale = longest_px / max(photo.height, photo.width)
    if scale >= 1.0:
        return photo
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return replace(photo, image=cv2.resize(photo.image, size, interpolation=cv2.INTER_AREA))


def plan_placement(height: int, width: int, canvases: Sequence[Canvas], stride_px: int) -> Placement:
    """Where a picture of this size lies: on the canvas on which it is largest, among equals the smallest."""

    def measure_scale(canvas: Canvas) -> float:
        return min(canvas.height_px / height, canvas.width_px / width)

    def fit(length: int, limit: int) -> int:
        return min(limit, max(1, round(length * measure_scale(canvas) / stride_px)) * stride_px)

    canvas = min(canvases, key=lambda each: (-measure_scale(each), each.height_px * each.width_px))
    return Placement(
        height=height,
        width=width,
        placed_height=fit(height, canvas.height_px),
        placed_width=fit(width, canvas.width_px),
        canvas=canvas,
        stride_px=stride_px,
    )


def resize_map(soft: Float[np.ndarray, "h w"], height: int, width: int) -> Float[np.ndarray, "H W"]:
    """A map in another size, bilinear between cell centres."""
    return cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: Int32[np.ndarray, "h w"], height: int, width: int) -> Int32[np.ndarray, "H W"]:
    """A label map in another size; each pixel takes the nearest label."""
    return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _check_size(source: Image.Image, limit_pixels: int) -> None:
    width, height = source.size
    if width * height > limit_pixels:
        raise TooManyPixels(
            f"the image has {width}x{height} = {width * height} pixels, at most {limit_pixels} are taken"
        )


def _decode_jpeg(source: Image.Image, content: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """The pixels of a JPEG file in colour, upright, byte for byte as Pillow's in two thirds of its time.

    None for any other file, and for one with the least flaw: Pillow is the judge of those.
    """
    if source.format not in ("JPEG", "MPO") or source.mode != "RGB":
        return None
    try:
        image: UInt8[np.ndarray, "H W 3"] = simplejpeg.decode_jpeg(content, strict=True)
    except ValueError:
        return None
    orientation = _read_orientation(source)
    if orientation not in _UPRIGHT:
        return image
    return np.asarray(Image.fromarray(image).transpose(_UPRIGHT[orientation]))


def _count_frames(source: Image.Image) -> int:
    if source.format != "TIFF":
        return int(getattr(source, "n_frames", 1))
    # Pillow compares each page's place with all before: the 290,000 pages that 32 MB hold would take it 20 minutes.
    for page in range(1, _MOST_PAGES + 1):
        try:
            source.seek(page)
        except EOFError:
            return page
    raise ImageTooLarge(f"the TIFF has more than {_MOST_PAGES} pages: send the first one alone")


def _load_upright(source: Image.Image) -> tuple[Image.Image, int]:
    if source.format == "TIFF":  # Pillow turns it while it loads, and then forgets its orientation
        orientation = _read_orientation(source)
        source.load()
        return _convert_to_rgb(source), orientation
    source.load()  # first: reading a PNG's EXIF loads it too, and that must not swallow that the picture is broken
    orientation = _read_orientation(source)
    rgb = _convert_to_rgb(source)
    return (rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb), orientation


def _read_orientation(source: Image.Image) -> int:
    try:
        value = source.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block must not lose a good picture; Pillow raises many kinds
        return 1
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _convert_to_rgb(source: Image.Image) -> Image.Image:
    match source.mode:
        case "I;16" | "I;16B" | "I;16L" | "I;16N" | "I":
            wide = np.asarray(source, dtype=np.int64).clip(0, _MAX_16_BIT)
            return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
        case "F":
            values = np.asarray(source)
            if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > 255.0:
                raise ImageUnreadable("a floating-point image whose values are not within 0..255: send 8 or 16 bits")
            return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
        case _ if source.has_transparency_data:
            picture = source.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        case "RGB":
            return source
        case _:
            return source.convert("RGB")
