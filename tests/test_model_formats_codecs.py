"""RLE, PNG and polygon encoders against reference implementations."""

import io

import cv2
import numpy as np
import pytest
from coco_reference import encode_by_pycocotools
from PIL import Image

from model.formats.coco import encode_label_map, encode_mask
from model.formats.image_files import encode_png
from model.formats.polygons import MIN_IOU, Polygon, mask_to_polygons


def draw_map(generator: np.random.Generator, max_labels: int) -> np.ndarray:
    """Return noise or blocks."""
    height, width = (int(length) for length in generator.integers(1, 60, 2))
    labels = generator.integers(0, max_labels, (height, width)).astype(np.int32)
    if generator.random() < 0.5:
        return labels
    return np.asarray(cv2.resize(labels[::5, ::5].astype(np.float64), (width, height), interpolation=0)).astype(
        np.int32
    )


@pytest.mark.parametrize("max_labels", [2, 4, 300, 70_000])
def test_random_maps_are_encoded_as_by_pycocotools(max_labels: int) -> None:
    generator = np.random.default_rng(max_labels)
    for _ in range(60):
        labels = draw_map(generator, max_labels)
        ids = [*np.unique(labels)[:6].tolist(), 99_999]
        assert encode_label_map(labels, ids) == [encode_by_pycocotools(labels == each) for each in ids]


def test_a_mask_inside_an_image_is_encoded_as_by_pycocotools() -> None:
    generator = np.random.default_rng(47)
    for _ in range(120):
        bits = draw_map(generator, 2).astype(bool)
        top, left, below, right = (int(each) for each in generator.integers(0, 4, 4))
        whole = np.pad(bits, ((top, below), (left, right)))
        assert encode_mask(bits, top, left, whole.shape) == encode_by_pycocotools(whole)


NOISE = np.random.default_rng(53)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (31, 17), (40, 60, 3), (1, 1, 3)])
def test_a_png_is_lossless(shape: tuple[int, ...]) -> None:
    image = NOISE.integers(0, 256, shape, np.uint8)
    content = encode_png(image)
    read = Image.open(io.BytesIO(content))
    read.load()
    assert read.mode == ("L" if len(shape) == 2 else "RGB")
    np.testing.assert_array_equal(np.asarray(read), image)
    np.testing.assert_array_equal(
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED),
        image[..., ::-1] if read.mode == "RGB" else image,
    )


def test_a_constant_map_compresses_to_few_bytes() -> None:
    assert len(encode_png(np.full((1000, 1000, 3), 7, np.uint8))) < 20_000


def test_a_non_contiguous_view_is_encoded_correctly() -> None:
    image = NOISE.integers(0, 256, (8, 9, 3), np.uint8)
    turned = image.transpose(1, 0, 2)[::-1]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(turned)))), turned)


def draw(text: str) -> np.ndarray:
    """Return a mask from rows of # and dots."""
    return np.array([[letter == "#" for letter in row] for row in text.split()])


def is_inside(x: float, y: float, ring: np.ndarray) -> bool:
    """Whether a ray from the point crosses the ring an odd number of times."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(ring[:-1].tolist(), ring[1:].tolist(), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            crossings += 1
    return crossings % 2 == 1


def draw_polygons(polygons: list[Polygon], height: int, width: int) -> np.ndarray:
    """Return the pixels whose center lies in an outer ring and in none of its holes."""
    mask = np.zeros((height, width), bool)
    for y, x in np.ndindex(height, width):
        center = (x + 0.5, y + 0.5)
        mask[y, x] = any(
            is_inside(*center, part.outer) and not any(is_inside(*center, hole) for hole in part.holes)
            for part in polygons
        )
    return mask


def signed_area(ring: np.ndarray) -> float:
    """Return the area by the shoelace formula, positive for a ring that is clockwise on the screen."""
    x, y = ring.astype(float).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def test_holes_belong_to_their_component_and_the_largest_is_first() -> None:
    mask = draw("###.###### #.#.#....# ###.#.##.# ....#.##.# ....#....# ....######")
    parts = [(signed_area(part.outer), list(map(signed_area, part.holes))) for part in mask_to_polygons(mask)]
    assert parts == [(36, [-16]), (9, [-1]), (4, [])]


@pytest.mark.parametrize("mask", ["#. .#", ".# #."])
def test_pixels_that_touch_at_a_corner_are_two_polygons(mask: str) -> None:
    parts = mask_to_polygons(draw(mask))
    assert [signed_area(part.outer) for part in parts] == [1, 1]


def test_holes_that_touch_at_a_corner_are_one() -> None:
    (polygon,) = mask_to_polygons(draw("#### #.## ##.# ####"), top=5, left=7)
    assert [signed_area(hole) for hole in polygon.holes] == [-2]
    assert polygon.outer.tolist() == [[7, 5], [11, 5], [11, 9], [7, 9], [7, 5]]


def test_polygons_of_random_masks_reach_the_minimum_iou() -> None:
    generator = np.random.default_rng(59)
    for number in range(60):
        height, width = (int(length) for length in generator.integers(1, 22, 2))
        mask = generator.random((height, width)) < generator.choice([0.1, 0.5, 0.9])
        if number % 2:
            small = mask[: max(1, height // 3), : max(1, width // 3)].astype(np.uint8)
            mask = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
        if not mask.any():
            continue
        polygons = mask_to_polygons(mask)
        drawn = draw_polygons(polygons, height, width)
        assert (drawn & mask).sum() >= MIN_IOU * (drawn | mask).sum()
        parts, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
        gaps, _ = cv2.connectedComponents(np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=8)
        assert len(polygons) == parts - 1
        assert sum(len(polygon.holes) for polygon in polygons) == gaps - 2  # one gap is the background


def test_the_polygon_of_a_disc_is_simplified() -> None:
    mask = np.hypot(*(np.indices((200, 200)) - 100)) < 90
    (polygon,) = mask_to_polygons(mask)
    assert len(polygon.outer) < 180  # the border has 508 vertical pixel edges
    assert signed_area(polygon.outer) == pytest.approx(mask.sum(), rel=0.01)
