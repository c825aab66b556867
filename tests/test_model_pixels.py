"""Unusual files decode to the right colours, hostile ones are refused."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from model.errors import ImageTooLarge, ImageUnreadable, InputError
from model.pixels import decode_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112

# Where the stored top left corner is seen, by EXIF orientation (EXIF 2.3, section 4.6.4): row and column.
SEEN_AT = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


def save(picture: Image.Image, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, suffix, **options)
    return buffer.getvalue()


def draw_corner() -> Image.Image:
    """Blue, 24 wide and 16 high, with a red square of 8 in the top left corner: JPEG's blocks keep both colours."""
    picture = Image.new("RGB", (24, 16), BLUE)
    picture.paste(RED, (0, 0, 8, 8))
    return picture


def draw_noise(height: int = 24, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


def turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def draw_png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_counts_as_upright(value: int) -> None:
    photo = decode_image(save(draw_corner(), "PNG", exif=turn(value)))
    assert photo.orientation == 1
    assert tuple(photo.image[0, 0]) == RED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's remark, which is not ours to raise
@pytest.mark.parametrize("block", [b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00rubbish" * 9])
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_a_broken_exif_block_does_not_lose_a_good_picture(suffix: str, block: bytes) -> None:
    photo = decode_image(save(draw_corner(), suffix, exif=block, quality=95))
    assert photo.orientation == 1
    np.testing.assert_allclose(photo.image[2, 2].astype(int), RED, atol=12)  # lossy


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
@pytest.mark.parametrize(("stored", "expected"), [(0, 0), (257, 1), (32_768, 127), (65_535, 255)])
def test_16_bit_grey_is_scaled_and_not_clipped(suffix: str, stored: int, expected: int) -> None:
    photo = decode_image(save(Image.fromarray(np.full((3, 5), stored, np.uint16)), suffix))
    assert photo.image.shape == (3, 5, 3)
    assert np.unique(photo.image).tolist() == [expected]


def test_16_bit_colour_keeps_its_high_byte() -> None:
    content = cv2.imencode(".png", np.full((2, 2, 3), (0x1234, 0x5678, 0x9ABC), np.uint16))[1].tobytes()
    assert tuple(decode_image(content).image[0, 0]) == (0x9A, 0x56, 0x12)


def test_one_bit_pictures_become_black_and_white() -> None:
    bits = np.array([[True, False]])
    assert decode_image(save(Image.fromarray(bits), "PNG")).image[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("ink", "expected"), [((0, 0, 0, 0), WHITE), ((0, 255, 255, 0), RED), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_cmyk_becomes_the_colour_that_its_inks_print(ink: tuple[int, ...], expected: tuple[int, ...]) -> None:
    for suffix in ("JPEG", "TIFF"):
        photo = decode_image(save(Image.new("CMYK", (16, 16), ink), suffix))
        np.testing.assert_allclose(photo.image[8, 8].astype(int), expected, atol=3)  # JPEG is lossy


@pytest.mark.parametrize(("alpha", "expected"), [(0, WHITE), (255, RED), (51, (255, 204, 204))])
def test_transparency_is_laid_on_white(alpha: int, expected: tuple[int, ...]) -> None:
    photo = decode_image(save(Image.new("RGBA", (2, 2), (*RED, alpha)), "PNG"))
    assert tuple(photo.image[0, 0]) == expected


def test_transparent_grey_is_laid_on_white() -> None:
    assert tuple(decode_image(save(Image.new("LA", (2, 2), (0, 0)), "PNG")).image[0, 0]) == WHITE


@pytest.mark.parametrize(("mode", "colour"), [("RGB", RED), ("L", 7), ("1", 0)])
def test_a_colour_marked_transparent_is_laid_on_white(mode: str, colour: Any) -> None:
    content = save(Image.new(mode, (2, 2), colour), "PNG", transparency=colour)
    assert tuple(decode_image(content).image[0, 0]) == WHITE


@pytest.mark.parametrize("suffix", ["PNG", "GIF"])
def test_a_palette_gives_its_colours(suffix: str) -> None:
    image = decode_image(save(draw_corner().quantize(4), suffix)).image
    assert (tuple(image[0, 0]), tuple(image[-1, -1])) == (RED, BLUE)


@pytest.mark.parametrize("suffix", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_laid_on_white(suffix: str) -> None:
    picture = draw_corner().quantize(4)
    image = decode_image(save(picture, suffix, transparency=picture.getpixel((0, 0)))).image
    assert (tuple(image[0, 0]), tuple(image[-1, -1])) == (WHITE, BLUE)


@pytest.mark.parametrize("suffix", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken_and_the_frames_are_counted(suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if suffix == "WEBP" else {}
    photo = decode_image(save(frames[0], suffix, save_all=True, append_images=frames[1:], **options))
    assert photo.frames == 3
    assert np.unique(photo.image.reshape(-1, 3), axis=0).tolist() == [list(RED)]


def test_a_still_picture_has_one_frame() -> None:
    assert decode_image(save(draw_corner(), "BMP")).frames == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_a_picture_one_pixel_thin_is_decoded(size: tuple[int, int]) -> None:
    image = decode_image(save(Image.new("RGB", size, RED), "PNG")).image
    assert image.shape == (size[1], size[0], 3)
    assert tuple(image[-1, -1]) == RED


@pytest.mark.parametrize("side_px", [7_072, 10_000, 14_143, 40_000])  # 50, 100, 200 and 1,600 megapixels
def test_a_header_of_many_megapixels_is_refused_before_anything_is_decoded(side_px: int) -> None:
    with pytest.raises(ImageTooLarge, match="at most 50000000"):
        decode_image(draw_png_header(side_px, side_px))


def test_a_picture_over_the_callers_limit_is_refused_with_its_size() -> None:
    with pytest.raises(ImageTooLarge, match="24x16 = 384 pixels, at most 383"):
        decode_image(save(draw_corner(), "PNG"), limit_pixels=383)


def test_a_picture_exactly_at_the_limit_is_taken() -> None:
    assert decode_image(save(draw_corner(), "PNG"), limit_pixels=384).width == 24


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_unreadable_not_a_crash(suffix: str, share: float) -> None:
    content = save(draw_noise(200, 300), suffix)
    with pytest.raises(ImageUnreadable, match=r"whole file|no picture"):
        decode_image(content[: int(len(content) * share)])


def test_a_png_with_changed_pixels_is_unreadable_even_without_exif() -> None:
    content = bytearray(save(draw_noise(), "PNG"))
    content[len(content) // 2] ^= 0x55
    with pytest.raises(ImageUnreadable):
        decode_image(bytes(content))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about the damage
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_random_damage_gives_a_picture_or_an_input_error_and_nothing_else(suffix: str) -> None:
    frames = [draw_noise(), draw_corner().resize((20, 24))]
    is_animated = suffix in ("GIF", "WEBP", "TIFF")
    content = save(frames[0], suffix, **({"save_all": True, "append_images": frames[1:]} if is_animated else {}))
    generator = np.random.default_rng(11)
    refused = 0
    for _ in range(150):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[generator.integers(0, len(damaged), 4)] = generator.choice([0, 127, 128, 255], 4)
        cut = int(generator.integers(1, len(damaged))) if generator.random() < 0.4 else len(damaged)
        try:
            assert decode_image(damaged[:cut].tobytes()).image.dtype == np.uint8
        except InputError:
            refused += 1
    assert refused > 20


def test_zero_bytes_are_unreadable_and_say_so() -> None:
    with pytest.raises(ImageUnreadable, match="0 bytes"):
        decode_image(b"")


@pytest.mark.parametrize(
    "content", [b"hello", b"<html></html>" * 99, b"\x00" * 4096, b"\xff\xd8\xff", b"GIF89a", b"BM"]
)
def test_bytes_that_are_no_picture_are_unreadable(content: bytes) -> None:
    with pytest.raises(ImageUnreadable, match="send"):
        decode_image(content)


def test_postscript_is_never_handed_to_an_interpreter() -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageUnreadable, match="no picture we read"):
        decode_image(content)


def test_a_float_tiff_within_8_bits_is_rounded() -> None:
    photo = decode_image(save(Image.fromarray(np.array([[0.4, 254.6]], np.float32)), "TIFF"))
    assert photo.image[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("value", [-0.1, 255.1, 1e38, np.nan, np.inf])
def test_a_float_tiff_outside_8_bits_is_unreadable(value: float) -> None:
    content = save(Image.fromarray(np.array([[0.0, value, value]] * 9, np.float32)), "TIFF")
    with pytest.raises(ImageUnreadable, match=r"0\.\.255"):
        decode_image(content)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"subsampling": 1, "quality": 40}])
@pytest.mark.parametrize("size", [(24, 20), (17, 31), (1, 1)])
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(options: dict[str, Any], size: tuple[int, int]) -> None:
    content = save(draw_noise(*size), "JPEG", **options)
    np.testing.assert_array_equal(decode_image(content).image, np.asarray(Image.open(io.BytesIO(content))))


def test_of_a_jpeg_with_a_flaw_pillow_is_the_judge() -> None:
    content = save(draw_noise(64, 64), "JPEG")
    flawed = bytearray(content)
    flawed[len(content) // 2] ^= 0x55  # Pillow passes over a broken block, and over rubbish behind the end
    for each in (bytes(flawed), content + b"rubbish"):
        np.testing.assert_array_equal(decode_image(each).image, np.asarray(Image.open(io.BytesIO(each))))
