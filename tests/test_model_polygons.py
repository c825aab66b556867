"""Polygons hold every part and hole of a mask, and drawn again they are the mask."""

import cv2
import numpy as np
import pytest

from model.polygons import LEAST_IOU, Polygon, trace_polygons


def draw(text: str) -> np.ndarray:
    """A mask from rows of # and dots."""
    return np.array([[letter == "#" for letter in row] for row in text.split()])


def is_inside(x: float, y: float, ring: np.ndarray) -> bool:
    """The textbook's ray: how often the ring crosses it."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(ring[:-1].tolist(), ring[1:].tolist(), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            crossings += 1
    return crossings % 2 == 1


def draw_polygons(polygons: list[Polygon], height: int, width: int) -> np.ndarray:
    """Pixels whose centre lies in an outer ring and in none of its holes."""
    mask = np.zeros((height, width), bool)
    for y, x in np.ndindex(height, width):
        centre = (x + 0.5, y + 0.5)
        mask[y, x] = any(
            is_inside(*centre, part.outer) and not any(is_inside(*centre, hole) for hole in part.holes)
            for part in polygons
        )
    return mask


def measure_area(ring: np.ndarray) -> float:
    """Half of the shoelace sum: positive where the ring goes clockwise on the screen, y growing downwards."""
    x, y = ring.astype(float).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def test_one_pixel_is_a_square_around_it() -> None:
    (polygon,) = trace_polygons(np.ones((1, 1), bool), top=5, left=7)
    assert polygon.outer.tolist() == [[7, 5], [8, 5], [8, 6], [7, 6], [7, 5]]
    assert polygon.holes == ()


def test_a_frame_has_a_hole_that_turns_the_other_way() -> None:
    (polygon,) = trace_polygons(draw("#### #..# #..# ####"))
    (hole,) = polygon.holes
    assert measure_area(polygon.outer) == 16
    assert measure_area(hole) == -4
    assert sorted(map(tuple, hole[:-1].tolist())) == [(1, 1), (1, 3), (3, 1), (3, 3)]


def test_each_part_has_its_own_holes() -> None:
    mask = draw("###.###### #.#.#....# ###.#.##.# ....#.##.# ....#....# ....######")
    parts = {measure_area(part.outer): part for part in trace_polygons(mask)}
    assert {area: [measure_area(hole) for hole in part.holes] for area, part in parts.items()} == {
        4: [],
        9: [-1],
        36: [-16],
    }


@pytest.mark.parametrize("mask", ["#. .#", ".# #."])
def test_pixels_that_touch_at_a_corner_are_two_parts(mask: str) -> None:
    parts = trace_polygons(draw(mask))
    assert [measure_area(part.outer) for part in parts] == [1, 1]


def test_holes_that_touch_at_a_corner_are_one() -> None:
    (polygon,) = trace_polygons(draw("#### #.## ##.# ####"))
    assert [measure_area(hole) for hole in polygon.holes] == [-2]


def test_random_masks_are_drawn_again_with_the_promised_overlap() -> None:
    generator = np.random.default_rng(59)
    for number in range(60):
        height, width = (int(length) for length in generator.integers(1, 22, 2))
        mask = generator.random((height, width)) < generator.choice([0.1, 0.5, 0.9])
        if number % 2:
            small = mask[: max(1, height // 3), : max(1, width // 3)].astype(np.uint8)
            mask = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
        if not mask.any():
            continue
        polygons = trace_polygons(mask)
        drawn = draw_polygons(polygons, height, width)
        assert (drawn & mask).sum() >= LEAST_IOU * (drawn | mask).sum()
        parts, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
        gaps, _ = cv2.connectedComponents(np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=8)
        assert len(polygons) == parts - 1
        assert sum(len(polygon.holes) for polygon in polygons) == gaps - 2  # one gap is what lies around everything


def test_a_disc_has_far_fewer_points_than_its_border_has_pixels() -> None:
    mask = np.hypot(*(np.indices((200, 200)) - 100)) < 90
    (polygon,) = trace_polygons(mask)
    assert len(polygon.outer) < 180  # its border has 508 edges of pixels to the left and right alone
    assert measure_area(polygon.outer) == pytest.approx(mask.sum(), rel=0.01)
