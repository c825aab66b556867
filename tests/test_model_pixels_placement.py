"""Placing in the square and restoring from it keep every position to a fraction of a pixel."""

import numpy as np
import pytest

from model.contract import Canvas
from model.pixels import PAD_RGB, Photo, Placement, place, plan_placement, resize_map, shrink

RED = (255, 0, 0)


def restore(soft: np.ndarray, placement: Placement) -> np.ndarray:
    """A stride-sized map in the picture's own size: what `model.enlargement` decides on, without making it."""
    return resize_map(soft[: placement.map_height, : placement.map_width], placement.height, placement.width)


def test_the_long_side_fills_the_square_and_the_rest_is_padding() -> None:
    pixels, placement = place(np.full((30, 60, 3), RED, np.uint8), [Canvas.square(56)], stride_px=4)
    assert (placement.placed_height, placement.placed_width) == (28, 56)
    assert pixels.shape == (3, 56, 56)
    assert np.unique(pixels[:, :28].reshape(3, -1), axis=1).T.tolist() == [list(RED)]
    assert np.unique(pixels[:, 28:].reshape(3, -1), axis=1).T.tolist() == [list(PAD_RGB)]


def test_a_square_of_the_networks_size_is_placed_unchanged() -> None:
    image = np.random.default_rng(3).integers(0, 256, (56, 56, 3), np.uint8)
    pixels, _ = place(image, [Canvas.square(56)], stride_px=4)
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), image)


def test_shrinking_averages_the_pixels_it_merges() -> None:
    image = np.zeros((224, 224, 3), np.uint8)
    image[:, ::4] = 200  # every fourth column: where linear interpolation looks there is none
    pixels, _ = place(image, [Canvas.square(56)], stride_px=4)
    assert np.unique(pixels).tolist() == [50]


def test_placements_of_random_sizes_are_multiples_of_the_stride_inside_the_square() -> None:
    generator = np.random.default_rng(5)
    for height, width in (10 ** generator.uniform(0, 4.3, (500, 2))).astype(int):
        stride = int(generator.choice([2, 4, 8]))
        side = stride * int(generator.integers(1, 150))
        placement = plan_placement(int(height), int(width), [Canvas.square(side)], stride)
        placed = (placement.placed_height, placement.placed_width)
        assert max(placed) == side
        assert min(placed) >= stride
        assert [length % stride for length in placed] == [0, 0]
        for length, original in zip(placed, (height, width), strict=True):
            # Rounding to the stride moves a side by half of it at most, unless it had vanished.
            assert length == stride or abs(length - original * side / max(height, width)) <= stride / 2 + 1e-6


SIZES = [(56, 56), (101, 57), (57, 101), (333, 500), (500, 333), (7, 9), (90, 901), (901, 90), (31, 1999)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_in_the_middle_returns_to_the_middle(height: int, width: int, axis: int) -> None:
    placement = plan_placement(height, width, [Canvas.square(512)], stride_px=4)
    cells = (placement.map_height, placement.map_width)[axis]
    centres = np.arange(128) + 0.5
    ramp = (centres / cells).astype(np.float32)  # 0.5 in the middle of the picture, whatever its size
    soft = np.tile(ramp[:, None] if axis == 0 else ramp, (1, 128) if axis == 0 else (128, 1))
    restored = restore(soft, placement)
    profile = restored[:, 0] if axis == 0 else restored[0]
    assert restored.shape == (height, width)
    assert abs(np.count_nonzero(profile < 0.5) - (height, width)[axis] / 2) <= 0.5


def test_a_ramp_is_restored_to_the_position_of_every_pixel() -> None:
    placement = plan_placement(300, 451, [Canvas.square(512)], stride_px=4)
    soft = np.tile(((np.arange(128) + 0.5) / placement.map_width).astype(np.float32), (128, 1))
    positions = (np.arange(451) + 0.5) / 451
    # Half a cell at either end lies beyond the outermost centres, where bilinear interpolation is flat.
    inner = slice(2, -2)
    np.testing.assert_allclose(restore(soft, placement)[150, inner], positions[inner], atol=1e-4)  # float32


def test_what_the_padding_shows_never_reaches_the_picture() -> None:
    placement = plan_placement(100, 300, [Canvas.square(512)], stride_px=4)
    soft = np.full((128, 128), np.nan, np.float32)
    soft[: placement.map_height, : placement.map_width] = 0.25
    assert np.unique(restore(soft, placement)).tolist() == [0.25]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_edge_drawn_in_the_picture_survives_the_way_there_and_back(height: int, width: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 3 :] = 255
    pixels, placement = place(image, [Canvas.square(512)], stride_px=4)
    soft = pixels[0].reshape(128, 4, 128, 4).mean((1, 3)).astype(np.float32) / 255
    found = np.count_nonzero(restore(soft, placement)[height // 2] < 0.5)
    # A cell that the edge crosses holds its share, but its neighbours are flat: half a cell at worst.
    assert abs(found - width // 3) <= max(1.0, 0.5 * width / placement.map_width)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (1, 40_000)])
def test_a_picture_one_pixel_thin_is_placed_and_restored(shape: tuple[int, int]) -> None:
    pixels, placement = place(np.full((*shape, 3), RED, np.uint8), [Canvas.square(64)], stride_px=4)
    assert pixels[:, 0, 0].tolist() == list(RED)
    restored = restore(np.full((16, 16), 0.75, np.float32), placement)
    assert restored.shape == shape
    np.testing.assert_allclose(restored, 0.75, atol=1e-6)  # float32


PAPER = [
    Canvas(height_px=800, width_px=1088),
    Canvas(height_px=1088, width_px=800),
    Canvas.square(800),
]


@pytest.mark.parametrize(
    ("height", "width", "canvas", "size"),
    [
        (480, 640, (800, 1088), (800, 1068)),  # 4 : 3 is 1066.7 wide; 4 divides 1068
        (640, 480, (1088, 800), (1068, 800)),
        (500, 500, (800, 800), (800, 800)),  # as large on each of them: the smallest
        (400, 1200, (800, 1088), (364, 1088)),  # 362.7 high
        (4000, 3000, (1088, 800), (1068, 800)),
    ],
)
def test_a_picture_lies_on_the_canvas_that_shows_it_largest(
    height: int, width: int, canvas: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels, placement = place(np.full((height, width, 3), RED, np.uint8), PAPER, stride_px=4)
    assert pixels.shape[1:] == canvas
    assert placement.size == size
    assert pixels[:, size[0] - 1, size[1] - 1].tolist() == list(RED)
    if size != canvas:
        assert pixels[:, -1, -1].tolist() == list(PAD_RGB)


def test_a_photo_is_shrunk_to_its_longest_side_and_never_enlarged() -> None:
    photo = Photo(image=np.full((30, 60, 3), RED, np.uint8), frames=2, orientation=6)
    small = shrink(photo, 20)
    assert (small.width, small.height, small.frames, small.orientation) == (20, 10, 2, 6)
    assert small.image[5, 5].tolist() == list(RED)
    assert shrink(photo, 60) is photo
    assert shrink(Photo(image=np.zeros((1, 500, 3), np.uint8), frames=1, orientation=1), 50).height == 1
