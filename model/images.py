"""Decoding of images, and letterboxing to the input size of a network and back."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float, Int32, Shaped, UInt8
from PIL import Image, ImageCms, UnidentifiedImageError

from model.contract import InputSize
from model.errors import ImageTooLarge, InputError, InvalidImage, TooManyPixels

PAD_RGB = (124, 116, 104)
"""ImageNet's mean color: zero once normalized."""
MAX_IMAGE_PIXELS = 50_000_000
_MAX_PAGES = 1_000
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpf"}
    | {".jpx", ".gif", ".bmp", ".tif", ".tiff"}
)
"""Suffixes of image files, in lower case."""
# A closed list: Pillow passes EPS to Ghostscript, for example.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_SUPPORTED = "send a JPEG, PNG, WebP, HEIC, AVIF, JPEG 2000, GIF, BMP or TIFF file"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_JPEG_END = b"\xff\xd9"
_TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION_TAG = 0x0112
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode of pixels, by the color space of an ICC profile."""
_SRGB_TOLERANCE = 3
"""Largest difference to sRGB, in 8-bit levels, of a profile that is taken for sRGB."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image, upright."""

    image: UInt8[np.ndarray, "H W 3"]
    num_frames: int
    """Frames in the file; only the first is decoded."""
    orientation: int
    """EXIF orientation that was applied, 1..8; 1 is upright."""
    warnings: tuple[str, ...] = ()
    """What was ignored or is missing in the file, in ASCII."""

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
    """Decode the first frame to upright 8-bit sRGB.

    Transparency is blended with white. Gray values of more than 8 bits are scaled from 0..1 if they are floats of at
    most 1, from 0..255 if none is above 255, else from 0..65535. Colors are converted from an embedded ICC profile.
    Raises TooManyPixels before any pixel is decoded, and InvalidImage if the content is not a complete image; only the
    end marker of a JPEG may be missing.
    """
    if not content:
        raise InvalidImage(f"the image is empty (0 bytes): {_SUPPORTED}")
    try:
        with Image.open(io.BytesIO(content), formats=_list_formats(content)) as source:
            check_pixels(*source.size, max_image_pixels)
            try:
                return _decode_opened(source, content)
            except OSError:
                if not _lacks_only_end_marker(source, content):
                    raise
        image = decode_image(content + _JPEG_END, max_image_pixels=max_image_pixels)
        return replace(image, warnings=(*image.warnings, "the end marker of the JPEG is missing"))
    except (InputError, MemoryError):  # running out of memory is not the client's fault
        raise
    except UnidentifiedImageError as error:
        raise InvalidImage(_describe_unidentified(content)) from error
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


def read_image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image file as `read_image` decodes it, from its header alone.

    Raises InvalidImage, with the path in front of the message.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
            stream.seek(0)
            with Image.open(stream, formats=_list_formats(start)) as source:
                width, height = source.size
                return (width, height) if _read_orientation(source) in _SIDEWAYS else (height, width)
    except Exception as error:  # as in `decode_image`
        raise InvalidImage(f"{path} is missing, corrupt or in no supported image format ({error})") from error


def letterbox_image(
    image: UInt8[np.ndarray, "H W 3"], input_sizes: Sequence[InputSize], stride_px: int
) -> tuple[UInt8[np.ndarray, "3 h w"], Letterbox]:
    """Resize an image to fit the best of the input sizes, and pad it with ImageNet's mean color."""
    height, width = image.shape[:2]
    letterbox = plan_letterbox(height, width, input_sizes, stride_px)
    resized = resize_image(image, letterbox.resized_height, letterbox.resized_width)
    return pad_image(resized, letterbox.input_size), letterbox


def resize_image(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Resize an image: bilinear interpolation aliases if it shrinks, area interpolation shows blocks if it grows."""
    is_smaller = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR)


def pad_image(image: UInt8[np.ndarray, "h w 3"], size: InputSize) -> UInt8[np.ndarray, "3 H W"]:
    """Place an image at the top left of an input, and pad it with ImageNet's mean color."""
    padded = np.empty((size.height_px, size.width_px, 3), np.uint8)
    padded[:] = PAD_RGB
    padded[: image.shape[0], : image.shape[1]] = image
    return np.ascontiguousarray(padded.transpose(2, 0, 1))


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


def check_pixels(width: int, height: int, max_image_pixels: int) -> None:
    """Raise TooManyPixels for an image above the limit."""
    if width * height > max_image_pixels:
        raise TooManyPixels(
            f"the image has {width}x{height} = {width * height} pixels, the limit is {max_image_pixels}"
        )


def _list_formats(content: bytes) -> tuple[str, ...]:
    is_heif = content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS
    return (*_FORMATS, "HEIF") if is_heif and _register_heif() else _FORMATS


@cache
def _register_heif() -> bool:
    """Make Pillow read HEIC. Returns False if pillow-heif (extra `heic`) is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    return True


def _describe_unidentified(content: bytes) -> str:
    """Return why Pillow does not know the format."""
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        reason = "is corrupt" if _register_heif() else "needs a package that is missing: pip install 'useg[heic]'"
        return f"the HEIC image {reason}"
    if content.startswith(_TIFF_HEADERS):
        return "the TIFF is corrupt or of a kind that is not supported: convert it to 8-bit RGB"
    return f"{len(content)} bytes in no supported image format: {_SUPPORTED}"


def _decode_opened(source: Image.Image, content: bytes) -> DecodedImage:
    num_frames = _count_frames(source)
    warnings = (f"only the first of {num_frames} frames was read",) if num_frames > 1 else ()
    image = _decode_jpeg(source, content)
    is_turned = source.format == "TIFF"  # Pillow rotates it while loading, and then drops its orientation
    if image is None and not is_turned:
        source.load()  # first, as reading the EXIF of a PNG loads it too and would hide that the file is corrupt
    orientation = _read_orientation(source)
    image = np.array(_convert_to_rgb(source)) if image is None else image
    upright = image if is_turned else _turn_upright(image, orientation)
    return DecodedImage(image=upright, num_frames=num_frames, orientation=orientation, warnings=warnings)


def _decode_jpeg(source: Image.Image, content: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decode a color JPEG: the same bytes as Pillow in two thirds of its time.

    Returns None for any other file, and for a JPEG with errors, which Pillow then decodes or rejects.
    """
    if source.format not in ("JPEG", "MPO") or source.mode != "RGB":
        return None
    try:
        image: UInt8[np.ndarray, "H W 3"] = simplejpeg.decode_jpeg(content, strict=True)
    except ValueError:
        return None
    profile = source.info.get("icc_profile")
    if not profile or _make_srgb_transform(profile) is None:
        return image
    return np.asarray(_convert_profile(Image.fromarray(image), profile))


def _lacks_only_end_marker(source: Image.Image, content: bytes) -> bool:
    """Whether a JPEG has all its pixels, and only the two bytes of its end marker are missing."""
    if source.format not in ("JPEG", "MPO") or content.endswith(_JPEG_END):
        return False
    try:
        simplejpeg.decode_jpeg(content + _JPEG_END, strict=True)
    except ValueError:
        return False
    return True


def _count_frames(source: Image.Image) -> int:
    if source.format != "TIFF":
        return int(getattr(source, "n_frames", 1))
    # Pillow compares the offset of each page with all before: for the 290,000 pages of a 32 MB file, 20 minutes.
    for page in range(1, _MAX_PAGES + 1):
        try:
            source.seek(page)
        except EOFError:
            source.seek(0)
            return page
    raise ImageTooLarge(f"the TIFF has more than {_MAX_PAGES} pages: send only the first one")


def _turn_upright(image: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "H W 3"]:
    """Apply an EXIF orientation (EXIF 2.3, section 4.6.4)."""
    if orientation in _SIDEWAYS:
        image = cv2.transpose(image)
    if orientation in (2, 3, 6, 7):
        image = cv2.flip(image, 1)
    return cv2.flip(image, 0) if orientation in (3, 4, 7, 8) else image


def _read_orientation(source: Image.Image) -> int:
    try:
        value = source.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow raises many types for a corrupt EXIF block; the image itself may be fine
        return 1
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _convert_to_rgb(source: Image.Image) -> Image.Image:
    profile = source.info.get("icc_profile")
    match source.mode:
        case "I;16" | "I;16B" | "I;16L" | "I;16N" | "I" | "F":
            rgb = Image.fromarray(_scale_to_8_bits(np.asarray(source))).convert("RGB")
        case "CMYK":
            return _convert_profile(source, profile).convert("RGB")
        case _ if source.has_transparency_data:
            rgba = source.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            rgb = Image.alpha_composite(white, rgba).convert("RGB")
        case _:
            rgb = source.convert("RGB")
    return _convert_profile(rgb, profile)


def _scale_to_8_bits(values: Shaped[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Scale gray values by the rule of `decode_image`. Raises InvalidImage for values outside these ranges."""
    is_float = np.issubdtype(values.dtype, np.floating)
    low, high = float(values.min()), float(values.max())
    scales = (1, 255) if is_float else (255, 65_535)
    scale = next((scale for scale in scales if low >= 0.0 and high <= scale), None)  # none if a value is not finite
    if scale is None:
        expected = "0..1 or 0..255" if is_float else "0..65535"
        raise InvalidImage(f"an image of values from {low:.6g} to {high:.6g}, expected {expected}: send 8 or 16 bits")
    return (values * np.float32(255 / scale)).round().astype(np.uint8)


def _convert_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert the colors of an RGB or CMYK image to sRGB; unchanged if the profile is invalid or for another mode."""
    found = _make_srgb_transform(profile) if profile else None
    if found is None:
        return image
    mode, transform = found
    if mode == "L" and image.mode == "RGB":
        image = image.getchannel(0)
    return ImageCms.applyTransform(image, transform) or image if image.mode == mode else image


@lru_cache(maxsize=16)
def _make_srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """Return the mode of the pixels to convert and the transform; None if the profile is sRGB, or not readable."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES[given.profile.xcolor_space]
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, KeyError, OSError, ValueError):
        return None
    if mode != "RGB":
        return mode, transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colors), transform)
    difference = np.abs(np.asarray(converted, np.int16) - colors)
    return None if difference.max() <= _SRGB_TOLERANCE else (mode, transform)
