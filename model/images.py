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

from model.contract import InputSize
from model.errors import ImageTooLarge, InputError, InvalidImage, TooManyPixels

PAD_RGB = (124, 116, 104)
"""ImageNet's mean colour: zero once normalised."""
MAX_IMAGE_PIXELS = 50_000_000
_MAX_PAGES = 1_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no others: Pillow hands EPS to Ghostscript, for one
_ORIENTATION_TAG = 0x0112
_EXIF_TRANSPOSES = {
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
class DecodedImage:
    """A decoded picture, upright."""

    image: UInt8[np.ndarray, "H W 3"]
    num_frames: int
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
class Letterbox:
    """Where a picture lies on its canvas: at the top left, `placed_*` pixels large, both multiples of the stride."""

    height: int
    width: int
    resized_height: int
    resized_width: int
    input_size: InputSize
    stride_px: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width on the canvas, as a network is told them."""
        return self.resized_height, self.resized_width

    @property
    def map_height(self) -> int:
        """Rows of a stride-sized map that show the picture."""
        return self.resized_height // self.stride_px

    @property
    def map_width(self) -> int:
        """Columns of a stride-sized map that show the picture."""
        return self.resized_width // self.stride_px


def decode_image(content: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> DecodedImage:
    """The first frame, upright, as 8-bit RGB; transparent pixels are laid on white, 16-bit grey is scaled.

    Raises TooManyPixels from the header alone, before any pixel is decoded, and InvalidImage for anything that is
    not a whole picture.
    """
    if not content:
        raise InvalidImage("the image is empty (0 bytes): send a JPEG, PNG, WebP, GIF, BMP or TIFF file")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as source:
            _check_size(source, max_image_pixels)
            frames = _count_frames(source)
            source.seek(0)
            if (image := _decode_jpeg(source, content)) is not None:
                return DecodedImage(image=image, num_frames=frames, orientation=_read_orientation(source))
            rgb, orientation = _load_upright(source)
            return DecodedImage(image=np.array(rgb), num_frames=frames, orientation=orientation)
    except (InputError, MemoryError):  # that memory is short is not the caller's fault
        raise
    except UnidentifiedImageError as error:
        raise InvalidImage(
            f"{len(content)} bytes that are no picture we read: send a JPEG, PNG, WebP, GIF, BMP or TIFF file"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"the image has too many pixels: at most {max_image_pixels} are taken") from error
    except Exception as error:  # Pillow's parsers raise IndexError, TypeError, struct.error and more on broken files
        raise InvalidImage(f"the image is broken or cut short ({error}): send the whole file") from error


def read_image(path: Path) -> DecodedImage:
    """The picture in a file. Raises as `decode_image` does, the path before the message."""
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise InvalidImage(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise type(error)(f"{path}: {error}") from error


def letterbox_image(
    image: UInt8[np.ndarray, "H W 3"], input_sizes: Sequence[InputSize], stride_px: int
) -> tuple[UInt8[np.ndarray, "3 h w"], Letterbox]:
    """The picture on the canvas that suits it best, scaled to fill it one way, the rest ImageNet's mean colour.

    Both sides are rounded to multiples of the stride, so that the way back is one exact resize.
    """
    height, width = image.shape[:2]
    placement = plan_letterbox(height, width, input_sizes, stride_px)
    target = (placement.resized_width, placement.resized_height)
    shrinks = placement.resized_width * placement.resized_height < width * height
    # Linear aliases when it shrinks, area blocks when it grows (SERVING.md, section 3).
    scaled = cv2.resize(image, target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    laid = np.empty((placement.input_size.height_px, placement.input_size.width_px, 3), np.uint8)
    laid[:] = PAD_RGB
    laid[: placement.resized_height, : placement.resized_width] = scaled
    return np.ascontiguousarray(laid.transpose(2, 0, 1)), placement


def limit_size(photo: DecodedImage, longest_px: int) -> DecodedImage:
    """The photo with no side longer than this."""
    scale = longest_px / max(photo.height, photo.width)
    if scale >= 1.0:
        return photo
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return replace(photo, image=cv2.resize(photo.image, size, interpolation=cv2.INTER_AREA))


def plan_letterbox(height: int, width: int, input_sizes: Sequence[InputSize], stride_px: int) -> Letterbox:
    """Where a picture of this size lies: on the canvas on which it is largest, among equals the smallest."""

    def measure_scale(input_size: InputSize) -> float:
        return min(input_size.height_px / height, input_size.width_px / width)

    def fit(length: int, limit: int) -> int:
        return min(limit, max(1, round(length * measure_scale(canvas) / stride_px)) * stride_px)

    canvas = min(input_sizes, key=lambda each: (-measure_scale(each), each.height_px * each.width_px))
    return Letterbox(
        height=height,
        width=width,
        resized_height=fit(height, canvas.height_px),
        resized_width=fit(width, canvas.width_px),
        input_size=canvas,
        stride_px=stride_px,
    )


def resize_map(soft: Float[np.ndarray, "h w"], height: int, width: int) -> Float[np.ndarray, "H W"]:
    """A map in another size, bilinear between cell centres."""
    return cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: Int32[np.ndarray, "h w"], height: int, width: int) -> Int32[np.ndarray, "H W"]:
    """A label map in another size; each pixel takes the nearest label."""
    return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _check_size(source: Image.Image, max_image_pixels: int) -> None:
    width, height = source.size
    if width * height > max_image_pixels:
        raise TooManyPixels(
            f"the image has {width}x{height} = {width * height} pixels, at most {max_image_pixels} are taken"
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
    if orientation not in _EXIF_TRANSPOSES:
        return image
    return np.asarray(Image.fromarray(image).transpose(_EXIF_TRANSPOSES[orientation]))


def _count_frames(source: Image.Image) -> int:
    if source.format != "TIFF":
        return int(getattr(source, "n_frames", 1))
    # Pillow compares each page's place with all before: the 290,000 pages that 32 MB hold would take it 20 minutes.
    for page in range(1, _MAX_PAGES + 1):
        try:
            source.seek(page)
        except EOFError:
            return page
    raise ImageTooLarge(f"the TIFF has more than {_MAX_PAGES} pages: send the first one alone")


def _load_upright(source: Image.Image) -> tuple[Image.Image, int]:
    if source.format == "TIFF":  # Pillow turns it while it loads, and then forgets its orientation
        orientation = _read_orientation(source)
        source.load()
        return _convert_to_rgb(source), orientation
    source.load()  # first: reading a PNG's EXIF loads it too, and that must not swallow that the picture is broken
    orientation = _read_orientation(source)
    rgb = _convert_to_rgb(source)
    return (rgb.transpose(_EXIF_TRANSPOSES[orientation]) if orientation in _EXIF_TRANSPOSES else rgb), orientation


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
                raise InvalidImage("a floating-point image whose values are not within 0..255: send 8 or 16 bits")
            return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
        case _ if source.has_transparency_data:
            picture = source.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        case "RGB":
            return source
        case _:
            return source.convert("RGB")
