"""Decoding of images, and letterboxing to the input size of a network and back."""

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
"""ImageNet's mean color: zero once normalized."""
MAX_IMAGE_PIXELS = 50_000_000
_MAX_PAGES = 1_000
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # a closed list: Pillow passes EPS to Ghostscript, for example
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
_MAX_UINT16 = 65_535


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image, upright."""

    image: UInt8[np.ndarray, "H W 3"]
    num_frames: int
    """Frames in the file; only the first is decoded."""
    orientation: int
    """EXIF orientation that was applied, 1..8; 1 is upright."""

    @property
    def height(self) -> int:
        return int(self.image.shape[0])

    @property
    def width(self) -> int:
        return int(self.image.shape[1])


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Geometry of an image that is resized, placed at the top left of a network input and padded.

    The resized sides are multiples of the stride, so that the inverse is one exact resize.
    """

    height: int
    width: int
    resized_height: int
    resized_width: int
    input_size: InputSize
    stride_px: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image within the input, as networks take them."""
        return self.resized_height, self.resized_width

    @property
    def map_height(self) -> int:
        """Rows of an output map that cover the image."""
        return self.resized_height // self.stride_px

    @property
    def map_width(self) -> int:
        """Columns of an output map that cover the image."""
        return self.resized_width // self.stride_px


def decode_image(content: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> DecodedImage:
    """Decode the first frame to upright 8-bit RGB; transparency is blended with white, 16-bit gray is scaled.

    Raises TooManyPixels before any pixel is decoded, and InvalidImage if the content is not a complete image.
    """
    if not content:
        raise InvalidImage("the image is empty (0 bytes): send a JPEG, PNG, WebP, GIF, BMP or TIFF file")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as source:
            _check_size(source, max_image_pixels)
            num_frames = _count_frames(source)
            source.seek(0)
            if (image := _decode_jpeg(source, content)) is not None:
                return DecodedImage(image=image, num_frames=num_frames, orientation=_read_orientation(source))
            rgb, orientation = _load_upright(source)
            return DecodedImage(image=np.array(rgb), num_frames=num_frames, orientation=orientation)
    except (InputError, MemoryError):  # running out of memory is not the client's fault
        raise
    except UnidentifiedImageError as error:
        raise InvalidImage(
            f"{len(content)} bytes in no supported image format: send a JPEG, PNG, WebP, GIF, BMP or TIFF file"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"the image has too many pixels: the limit is {max_image_pixels}") from error
    except Exception as error:  # Pillow's parsers raise IndexError, TypeError, struct.error and more on broken files
        raise InvalidImage(f"the image is corrupt or truncated ({error}): send the complete file") from error


def read_image(path: Path) -> DecodedImage:
    """Decode an image file. Raises as `decode_image` does, with the path in front of the message."""
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise InvalidImage(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise type(error)(f"{path}: {error}") from error


def letterbox_image(
    image: UInt8[np.ndarray, "H W 3"], input_sizes: Sequence[InputSize], stride_px: int
) -> tuple[UInt8[np.ndarray, "3 h w"], Letterbox]:
    """Resize an image to fit the best of the input sizes, and pad it with ImageNet's mean color."""
    height, width = image.shape[:2]
    letterbox = plan_letterbox(height, width, input_sizes, stride_px)
    target = (letterbox.resized_width, letterbox.resized_height)
    is_smaller = letterbox.resized_width * letterbox.resized_height < width * height
    # Bilinear interpolation aliases when it shrinks; area interpolation shows blocks when it enlarges.
    resized = cv2.resize(image, target, interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR)
    padded = np.empty((letterbox.input_size.height_px, letterbox.input_size.width_px, 3), np.uint8)
    padded[:] = PAD_RGB
    padded[: letterbox.resized_height, : letterbox.resized_width] = resized
    return np.ascontiguousarray(padded.transpose(2, 0, 1)), letterbox


def plan_letterbox(height: int, width: int, input_sizes: Sequence[InputSize], stride_px: int) -> Letterbox:
    """Return the letterbox in the input size that shows the image largest; among equals, the smallest."""

    def compute_scale(size: InputSize) -> float:
        return min(size.height_px / height, size.width_px / width)

    def resize_side(length: int, limit: int) -> int:
        return min(limit, max(1, round(length * compute_scale(best) / stride_px)) * stride_px)

    best = min(input_sizes, key=lambda size: (-compute_scale(size), size.height_px * size.width_px))
    return Letterbox(
        height=height,
        width=width,
        resized_height=resize_side(height, best.height_px),
        resized_width=resize_side(width, best.width_px),
        input_size=best,
        stride_px=stride_px,
    )


def limit_size(image: DecodedImage, longest_px: int) -> DecodedImage:
    """Shrink an image so that its longest side is at most `longest_px`."""
    scale = longest_px / max(image.height, image.width)
    if scale >= 1.0:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return replace(image, image=cv2.resize(image.image, size, interpolation=cv2.INTER_AREA))


def resize_map(values: Float[np.ndarray, "h w"], height: int, width: int) -> Float[np.ndarray, "H W"]:
    """Resize a map of values, bilinearly between cell centers."""
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: Int32[np.ndarray, "h w"], height: int, width: int) -> Int32[np.ndarray, "H W"]:
    """Resize a label map; each pixel takes the nearest label."""
    return cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _check_size(source: Image.Image, max_image_pixels: int) -> None:
    width, height = source.size
    if width * height > max_image_pixels:
        raise TooManyPixels(
            f"the image has {width}x{height} = {width * height} pixels, the limit is {max_image_pixels}"
        )


def _decode_jpeg(source: Image.Image, content: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decode a color JPEG, upright: the same bytes as Pillow in two thirds of its time.

    Returns None for any other file, and for a JPEG with errors, which Pillow then decodes or rejects.
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
    # Pillow compares the offset of each page with all before: for the 290,000 pages of a 32 MB file, 20 minutes.
    for page in range(1, _MAX_PAGES + 1):
        try:
            source.seek(page)
        except EOFError:
            return page
    raise ImageTooLarge(f"the TIFF has more than {_MAX_PAGES} pages: send only the first one")


def _load_upright(source: Image.Image) -> tuple[Image.Image, int]:
    if source.format == "TIFF":  # Pillow rotates it while loading, and then drops its orientation
        orientation = _read_orientation(source)
        source.load()
        return _convert_to_rgb(source), orientation
    source.load()  # first, as reading the EXIF of a PNG loads it too and would hide that the file is corrupt
    orientation = _read_orientation(source)
    rgb = _convert_to_rgb(source)
    return (rgb.transpose(_EXIF_TRANSPOSES[orientation]) if orientation in _EXIF_TRANSPOSES else rgb), orientation


def _read_orientation(source: Image.Image) -> int:
    try:
        value = source.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow raises many types for a corrupt EXIF block; the image itself may be fine
        return 1
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _convert_to_rgb(source: Image.Image) -> Image.Image:
    match source.mode:
        case "I;16" | "I;16B" | "I;16L" | "I;16N" | "I":
            gray = np.asarray(source, dtype=np.int64).clip(0, _MAX_UINT16)
            return Image.fromarray((gray // 257).astype(np.uint8)).convert("RGB")
        case "F":
            values = np.asarray(source)
            if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > 255.0:
                raise InvalidImage("a floating-point image with values outside 0..255: send 8 or 16 bits")
            return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
        case _ if source.has_transparency_data:
            rgba = source.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return Image.alpha_composite(white, rgba).convert("RGB")
        case "RGB":
            return source
        case _:
            return source.convert("RGB")
