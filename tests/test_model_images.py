"""Decoding of unusual and hostile files; letterboxing and its inverse."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bad_images import draw_png_header, turn
from fake_service import save
from PIL import Image, ImageCms

from model.contract import InputSize
from model.errors import ImageTooLarge, InputError, InvalidImage
from model.images import (
    PAD_RGB,
    DecodedImage,
    decode_image,
    letterbox_image,
    limit_size,
    plan_letterbox,
    read_image,
    read_image_size,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)

# Row and column of the stored top left corner, by EXIF orientation (EXIF 2.3, section 4.6.4).
SEEN_AT = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


def draw_corner() -> Image.Image:
    """Blue, 24 wide and 16 high, with a red square of 8 in the top left corner: JPEG blocks keep both colors."""
    image = Image.new("RGB", (24, 16), BLUE)
    image.paste(RED, (0, 0, 8, 8))
    return image


def draw_noise(height: int = 24, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright_once(suffix: str, orientation: int) -> None:
    photo = decode_image(save(draw_corner(), suffix, exif=turn(orientation), quality=95))
    row, column = SEEN_AT[orientation]
    assert (photo.height, photo.width) == ((16, 24) if orientation < 5 else (24, 16))
    assert photo.orientation == orientation
    # JPEG and WebP are lossy, a few levels at quality 95.
    np.testing.assert_allclose(photo.image[row, column].astype(int), RED, atol=12)
    np.testing.assert_allclose(photo.image[-1 - row, -1 - column].astype(int), BLUE, atol=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # raised by Pillow
@pytest.mark.parametrize("exif", [turn(0), turn(9), turn(65_535), b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_an_orientation_that_does_not_exist_counts_as_upright(exif: Image.Exif | bytes) -> None:
    photo = decode_image(save(draw_corner(), "PNG", exif=exif))
    assert photo.orientation == 1
    assert tuple(photo.image[0, 0]) == RED


def test_16_bit_color_keeps_its_high_byte() -> None:
    content = cv2.imencode(".png", np.full((2, 2, 3), (0x1234, 0x5678, 0x9ABC), np.uint16))[1].tobytes()
    assert tuple(decode_image(content).image[0, 0]) == (0x9A, 0x56, 0x12)


@pytest.mark.parametrize(
    ("ink", "expected"), [((0, 0, 0, 0), WHITE), ((0, 255, 255, 0), RED), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_cmyk_is_converted_to_the_printed_color(ink: tuple[int, ...], expected: tuple[int, ...]) -> None:
    for suffix in ("JPEG", "TIFF"):
        photo = decode_image(save(Image.new("CMYK", (16, 16), ink), suffix))
        np.testing.assert_allclose(photo.image[8, 8].astype(int), expected, atol=3)  # JPEG is lossy


@pytest.mark.parametrize(("alpha", "expected"), [(0, WHITE), (255, RED), (51, (255, 204, 204))])
def test_transparency_is_blended_with_white(alpha: int, expected: tuple[int, ...]) -> None:
    photo = decode_image(save(Image.new("RGBA", (2, 2), (*RED, alpha)), "PNG"))
    assert tuple(photo.image[0, 0]) == expected


@pytest.mark.parametrize(("mode", "color"), [("RGB", RED), ("L", 7), ("1", 0)])
def test_a_color_marked_transparent_is_blended_with_white(mode: str, color: Any) -> None:
    content = save(Image.new(mode, (2, 2), color), "PNG", transparency=color)
    assert tuple(decode_image(content).image[0, 0]) == WHITE


@pytest.mark.parametrize("suffix", ["PNG", "GIF"])
def test_a_palette_is_converted_to_its_colors_and_blended_with_white(suffix: str) -> None:
    palette = draw_corner().quantize(4)
    for options, corner in (({}, RED), ({"transparency": palette.getpixel((0, 0))}, WHITE)):
        image = decode_image(save(palette, suffix, **options)).image
        assert (tuple(image[0, 0]), tuple(image[-1, -1])) == (corner, BLUE)


@pytest.mark.parametrize("suffix", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_decoded_and_frames_are_counted(suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE, WHITE)]
    options = {"lossless": True} if suffix == "WEBP" else {}
    photo = decode_image(save(frames[0], suffix, save_all=True, append_images=frames[1:], **options))
    assert photo.num_frames == 3
    assert np.unique(photo.image.reshape(-1, 3), axis=0).tolist() == [list(RED)]


@pytest.mark.parametrize("side_px", [7_072, 40_000])  # 50 and 1,600 megapixels
def test_too_many_pixels_in_the_header_are_rejected_before_decoding(side_px: int) -> None:
    with pytest.raises(ImageTooLarge, match="the limit is 50000000"):
        decode_image(draw_png_header(side_px, side_px))
    with pytest.raises(ImageTooLarge, match="24x16 = 384 pixels, the limit is 383"):
        decode_image(save(draw_corner(), "PNG"), max_image_pixels=383)


SUFFIXES = pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])


@SUFFIXES
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_invalid_not_a_crash(suffix: str, fraction: float) -> None:
    content = save(draw_noise(200, 300), suffix)
    with pytest.raises(InvalidImage, match=r"complete file|no supported image format"):
        decode_image(content[: int(len(content) * fraction)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # raised by Pillow
@SUFFIXES
def test_random_damage_gives_an_image_or_an_input_error(suffix: str) -> None:
    frames = [draw_noise(), draw_corner().resize((20, 24))]
    is_animated = suffix in ("GIF", "WEBP", "TIFF")
    content = save(frames[0], suffix, **({"save_all": True, "append_images": frames[1:]} if is_animated else {}))
    generator = np.random.default_rng(11)
    rejected = 0
    for _ in range(150):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[generator.integers(0, len(damaged), 4)] = generator.choice([0, 127, 128, 255], 4)
        cut = int(generator.integers(1, len(damaged))) if generator.random() < 0.4 else len(damaged)
        try:
            assert decode_image(damaged[:cut].tobytes()).image.dtype == np.uint8
        except InputError:
            rejected += 1
    assert rejected > 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"\(0 bytes\): send"),
        (b"\x00" * 4096, "no supported image format: send"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "no supported image format"),
        (b"\0\0\0\x18ftypheic" + bytes(12), "HEIC image"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "no supported image format"),
    ],
    ids=["empty", "zeros", "PostScript", "HEIC", "video"],
)
def test_bytes_that_are_not_an_image_are_invalid(content: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        decode_image(content)


@pytest.mark.parametrize("value", [-0.1, 255.1, 1e38, np.nan, np.inf])
def test_a_float_tiff_outside_8_bits_is_invalid(value: float) -> None:
    content = save(Image.fromarray(np.array([[0.0, value, value]] * 9, np.float32)), "TIFF")
    with pytest.raises(InvalidImage, match=r"0\.\.255"):
        decode_image(content)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.4, 1.5, 254.6]], np.float32), [0, 2, 255]),
        (np.array([[0, 10, 255]], np.uint16), [0, 10, 255]),
        (np.array([[0, 256, 65_535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 256, 65_535]], np.int32), [0, 1, 255]),
    ],
)
def test_gray_values_are_scaled_from_the_smallest_range_that_holds_them(
    values: np.ndarray, expected: list[int]
) -> None:
    assert decode_image(save(Image.fromarray(values), "TIFF")).image[0, :, 0].tolist() == expected


def make_profile(*, is_srgb: bool = False) -> bytes:
    """Return sRGB's ICC profile, or one in which red and blue are exchanged."""
    srgb: bytes = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb if is_srgb else srgb.replace(b"rXYZ", b"none").replace(b"bXYZ", b"rXYZ").replace(b"none", b"bXYZ")


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_colors_are_converted_from_an_icc_profile_to_srgb(suffix: str, orientation: int) -> None:
    given = Image.new("RGB", (24, 16), RED)
    for profile, expected in ((make_profile(), BLUE), (make_profile(is_srgb=True), RED), (b"no profile", RED)):
        photo = decode_image(save(given, suffix, icc_profile=profile, exif=turn(orientation), quality=95))
        assert photo.image.shape == ((16, 24, 3) if orientation == 1 else (24, 16, 3))
        np.testing.assert_allclose(photo.image[4, 4].astype(int), expected, atol=12)  # lossy


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_a_jpeg_may_lack_its_end_marker_and_nothing_else(mode: str, options: dict[str, Any]) -> None:
    content = save(draw_noise(64, 48).convert(mode), "JPEG", **options)
    complete = decode_image(content)
    for end in (-1, -2):
        photo = decode_image(content[:end])
        np.testing.assert_array_equal(photo.image, complete.image)
        assert photo.warnings == ("the end marker of the JPEG is missing",)
    assert complete.warnings == ()
    for end in (-3, -4, -20, -len(content) // 2):
        with pytest.raises(InvalidImage, match="complete file"):
            decode_image(content[:end])
        with pytest.raises(InvalidImage, match="complete file"):
            decode_image(content[:end] + b"\xff")


@pytest.mark.parametrize("suffix", ["AVIF", "JPEG2000", "HEIF"])
def test_photos_of_phones_and_cameras_are_read(suffix: str) -> None:
    pillow_heif = pytest.importorskip("pillow_heif") if suffix == "HEIF" else None
    if pillow_heif:
        pillow_heif.register_heif_opener()
    options = {} if suffix == "JPEG2000" else {"quality": 95, "exif": turn(6).tobytes()}
    photo = decode_image(save(draw_corner().resize((96, 64)), suffix, **options))
    row, column = SEEN_AT[6 if options else 1]
    assert photo.image.shape == ((96, 64, 3) if options else (64, 96, 3))
    np.testing.assert_allclose(photo.image[row, column].astype(int), RED, atol=12)  # lossy


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"subsampling": 1, "quality": 40}])
@pytest.mark.parametrize("size", [(24, 20), (17, 31), (1, 1)])
def test_a_jpeg_is_decoded_as_by_pillow(options: dict[str, Any], size: tuple[int, int]) -> None:
    content = save(draw_noise(*size), "JPEG", **options)
    np.testing.assert_array_equal(decode_image(content).image, np.asarray(Image.open(io.BytesIO(content))))


def test_a_jpeg_with_errors_is_decoded_by_pillow() -> None:
    content = save(draw_noise(64, 64), "JPEG")
    flawed = bytearray(content)
    flawed[len(content) // 2] ^= 0x55  # Pillow tolerates a corrupt block, and data after the end
    for each in (bytes(flawed), content + b"garbage"):
        np.testing.assert_array_equal(decode_image(each).image, np.asarray(Image.open(io.BytesIO(each))))


def test_shrinking_averages_the_pixels_it_merges() -> None:
    image = np.zeros((224, 224, 3), np.uint8)
    image[:, ::4] = 200  # every fourth column, which linear interpolation skips
    pixels, _ = letterbox_image(image, [InputSize.square(56)], stride_px=4)
    assert np.unique(pixels).tolist() == [50]


def test_letterboxes_of_random_sizes_are_multiples_of_the_stride_inside_the_square() -> None:
    generator = np.random.default_rng(5)
    for height, width in (10 ** generator.uniform(0, 4.3, (500, 2))).astype(int):
        stride = int(generator.choice([2, 4, 8]))
        side = stride * int(generator.integers(1, 150))
        letterbox = plan_letterbox(int(height), int(width), [InputSize.square(side)], stride)
        placed = (letterbox.resized_height, letterbox.resized_width)
        assert max(placed) == side
        assert min(placed) >= stride
        assert [length % stride for length in placed] == [0, 0]
        for length, original in zip(placed, (height, width), strict=True):
            # Rounding to the stride moves a side by half of it at most, unless it had vanished.
            assert length == stride or abs(length - original * side / max(height, width)) <= stride / 2 + 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (1, 40_000)])
def test_a_one_pixel_thin_image_is_letterboxed(shape: tuple[int, int]) -> None:
    pixels, _ = letterbox_image(np.full((*shape, 3), RED, np.uint8), [InputSize.square(64)], stride_px=4)
    assert pixels[:, 0, 0].tolist() == list(RED)


PAPER = [
    InputSize(height_px=800, width_px=1088),
    InputSize(height_px=1088, width_px=800),
    InputSize.square(800),
]


@pytest.mark.parametrize(
    ("height", "width", "input_size", "size"),
    [
        (480, 640, (800, 1088), (800, 1068)),  # 4 : 3 is 1066.7 wide; 4 divides 1068
        (640, 480, (1088, 800), (1068, 800)),
        (500, 500, (800, 800), (800, 800)),  # equally large in each: the smallest
        (400, 1200, (800, 1088), (364, 1088)),  # 362.7 high
        (4000, 3000, (1088, 800), (1068, 800)),
    ],
)
def test_the_input_size_that_shows_the_image_largest_is_chosen(
    height: int, width: int, input_size: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels, letterbox = letterbox_image(np.full((height, width, 3), RED, np.uint8), PAPER, stride_px=4)
    assert pixels.shape[1:] == input_size
    assert letterbox.size == size
    assert pixels[:, size[0] - 1, size[1] - 1].tolist() == list(RED)
    if size != input_size:
        assert pixels[:, -1, -1].tolist() == list(PAD_RGB)


def test_limit_size_shrinks_to_the_longest_side_and_never_enlarges() -> None:
    photo = DecodedImage(image=np.full((30, 60, 3), RED, np.uint8), num_frames=2, orientation=6)
    small = limit_size(photo, 20)
    assert (small.width, small.height, small.num_frames, small.orientation) == (20, 10, 2, 6)
    assert small.image[5, 5].tolist() == list(RED)
    assert limit_size(photo, 60) is photo
    assert limit_size(DecodedImage(image=np.zeros((1, 500, 3), np.uint8), num_frames=1, orientation=1), 50).height == 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("suffix", ["jpg", "png", "heic", "avif"])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 48)).save(tmp_path / f"photo.{suffix}", exif=exif)
    decoded = read_image(tmp_path / f"photo.{suffix}")
    assert read_image_size(tmp_path / f"photo.{suffix}") == (decoded.height, decoded.width)
