"""Sixty files that were made to be awkward, drawn by code: what they are, and what a service should make of them."""

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from fake_service import RED, draw_halves, save
from PIL import Image

Verdict = Literal["read", "unreadable", "too many pixels"]
HALVES = draw_halves()
GIF_FRAME = b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x01\x00\x00"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def draw_png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that promises a size, with whatever chunks follow."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def draw_png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""
    return draw_png(width, height, chunk(b"IDAT", zlib.compress(b"")))


def draw_bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 12, 0, 0, 54) + header + bytes(12)


def draw_tiff(width: int, height: int, next_directory: int = 0) -> bytes:
    """One directory of a grey picture whose pixels are not there."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", next_directory)


def draw_tiff_of_pages(pages: int) -> bytes:
    """As many directories of a grey pixel, one after the other."""
    page = draw_tiff(1, 1)[8:-4]
    places = [8 + (len(page) + 4) * number for number in range(1, pages)]
    return draw_tiff(1, 1)[:8] + b"".join(page + struct.pack("<I", place) for place in [*places, 0])


def draw_jpeg_header(side: int) -> bytes:
    frame = struct.pack(">HBHHB", 17, 8, side, side, 3) + bytes((1, 17, 0, 2, 17, 0, 3, 17, 0))
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xd9"


def turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animate(suffix: str, **options: Any) -> bytes:
    frames = [Image.new("RGB", (56, 28), colour) for colour in ("blue", "green")]
    return save(HALVES, suffix, save_all=True, append_images=frames, **options)


def zip_up(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", content)
    return buffer.getvalue()


def list_readable() -> Iterator[tuple[str, bytes]]:
    png, jpeg = save(HALVES), save(HALVES, "JPEG")
    yield "one pixel", save(Image.new("RGB", (1, 1), RED))
    yield "one column", save(Image.new("RGB", (1, 20_000), RED))
    yield "one row", save(Image.new("RGB", (20_000, 1), RED))
    for mode in ("L", "LA", "P", "1", "RGBA", "I;16"):
        yield f"PNG of mode {mode}", save(HALVES.convert("L").convert(mode) if mode == "I;16" else HALVES.convert(mode))
    for mode in ("CMYK", "L"):
        yield f"JPEG of mode {mode}", save(HALVES.convert(mode), "JPEG")
    yield "progressive JPEG", save(HALVES, "JPEG", progressive=True)
    yield "worst JPEG", save(HALVES, "JPEG", quality=1)
    for orientation in range(10):
        yield f"EXIF orientation {orientation}", save(HALVES, "JPEG", exif=turn(orientation))
    yield "broken EXIF", save(HALVES, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    yield "broken colour profile", save(HALVES, "JPEG", icc_profile=b"no profile")
    yield "bytes after the end", jpeg + b"more" * 1000
    yield "animated GIF", animate("GIF")
    yield "animated PNG", animate("PNG")
    yield "animated WebP", animate("WEBP", lossless=True)
    yield "lossy WebP", save(HALVES, "WEBP", quality=1)
    yield "TIFF of many pages", animate("TIFF")
    yield "TIFF in LZW", save(HALVES, "TIFF", compression="tiff_lzw")
    yield "TIFF of floats", save(Image.fromarray(np.full((28, 56), 250.0, np.float32)), "TIFF")
    yield "BMP", save(HALVES, "BMP")
    yield "PNG with a long comment", png[:33] + chunk(b"tEXt", b"Comment\0" + b"x" * 100_000) + png[33:]


def list_unreadable() -> Iterator[tuple[str, bytes]]:
    png, jpeg = save(HALVES), save(HALVES, "JPEG")
    yield "nothing", b""
    yield "a letter", b"Dear service,\nthis is a letter.\n"
    yield "HTML", b"<!doctype html><img src='http://127.0.0.1/a.png'>"
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    yield "PDF", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF"
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    yield "ZIP", zip_up(png)
    yield "gzip", gzip.compress(png)
    yield "zeros", bytes(10_000)
    yield "noise", np.random.default_rng(0).bytes(10_000)
    yield "beginning of a JPEG", jpeg[:3]
    yield "half a JPEG", jpeg[: len(jpeg) // 2]
    yield "half a PNG", png[: len(png) // 2]
    yield "PNG without pixels", draw_png(20, 20)
    yield "PNG with pixels that are no deflate", draw_png(20, 20, chunk(b"IDAT", b"no deflate"))
    yield "PNG without width", draw_png(0, 20, chunk(b"IDAT", zlib.compress(b"")))
    yield "PNG with a wrong sum", png[:29] + b"\0\0\0\0" + png[33:]
    yield (
        "PNG whose comment inflates to 100 MB",
        draw_png(
            20, 20, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 1)), chunk(b"IDAT", zlib.compress(b""))
        ),
    )
    yield "beginning of a GIF", save(HALVES, "GIF")[:20]
    yield "half a WebP", save(HALVES, "WEBP", lossless=True)[:30]
    yield "TIFF without pixels", draw_tiff(20, 20)
    yield "TIFF whose pages go round", draw_tiff(20, 20, next_directory=8)
    yield "TIFF of numbers that are none", save(Image.fromarray(np.full((28, 56), np.nan, np.float32)), "TIFF")
    yield "ICO", save(HALVES, "ICO", sizes=[(16, 16)])
    yield "PPM", save(HALVES, "PPM")


def list_bombs() -> Iterator[tuple[str, bytes]]:
    yield "PNG of 40,000 x 40,000", draw_png(40_000, 40_000, chunk(b"IDAT", zlib.compress(b"")))
    yield (
        "PNG of 1,600 megapixels in 4.7 MB",
        draw_png(40_000, 40_000, chunk(b"IDAT", zlib.compress(bytes(4_700_000), 0)), colour=0),
    )
    yield "JPEG of 65,000 x 65,000", draw_jpeg_header(65_000)
    yield "GIF of 65,535 x 65,535", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + GIF_FRAME + b";"
    yield "BMP of 40,000 x 40,000", draw_bmp(40_000, 40_000)
    yield "TIFF of 40,000 x 40,000", draw_tiff(40_000, 40_000)


def draw_unusual_images() -> dict[str, tuple[bytes, Verdict]]:
    """All of them by name."""
    groups: tuple[tuple[Verdict, Iterator[tuple[str, bytes]]], ...] = (
        ("read", list_readable()),
        ("unreadable", list_unreadable()),
        ("too many pixels", list_bombs()),
    )
    return {name: (content, verdict) for verdict, files in groups for name, content in files}
