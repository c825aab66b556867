import numpy as np
import pytest

from training.fitting.augment import Scene, halve, mirror, paste_objects

SIDE, CELLS, GRID = 56, 14, 4


def draw_scene(shade: int, feature: float, boxes: dict[int, tuple[slice, slice]]) -> Scene:
    """A plain scene whose segments (id to rows and columns of cells) are thing 1, 20 lighter and 10 louder."""
    square, labels = np.full((3, SIDE, SIDE), shade, np.uint8), np.zeros((CELLS, CELLS), np.int32)
    maps = np.full((2, GRID, GRID, 1), feature, np.float16)
    for segment, (rows, columns) in boxes.items():
        labels[rows, columns] = segment
    bright = (labels > 0).repeat(4, 0).repeat(4, 1)
    square[:, bright] += 20
    maps[:, bright[7::14, 7::14]] += 10
    return Scene(maps=maps, square=square, labels=labels, categories=dict.fromkeys(boxes, 1))


def paste(scene: Scene, source: Scene, seed: int) -> Scene:
    return paste_objects(scene, source, thing_clusters=5, generator=np.random.default_rng(seed))


def test_a_pasted_object_is_at_one_place_in_pixels_labels_and_features() -> None:
    empty, source = draw_scene(10, 0, {}), draw_scene(100, 50, {7: (slice(0, 8), slice(0, 8))})
    places = set()
    for seed in range(30):
        scene = paste(empty, source, seed)
        (new,) = scene.categories
        cells = scene.labels == new
        assert scene.categories[new] == 1
        assert (scene.square[:, cells.repeat(4, 0).repeat(4, 1)] == 120).all()
        assert (scene.square[:, ~cells.repeat(4, 0).repeat(4, 1)] == 10).all()
        assert ((scene.maps == 60).sum(), (scene.maps == 0).sum()) in {(8, 24), (2, 30)}  # four patches, or one halved
        is_inside = cells.repeat(4, 0).repeat(4, 1)[7::14, 7::14]
        assert (scene.maps[:, is_inside] == 60).all()
        places.add((int(cells.sum()), *map(int, np.argwhere(cells)[0])))
    assert {size for size, *_ in places} == {64, 16}
    assert len(places) > 4


def test_an_object_that_would_cover_half_of_a_thing_is_left_out() -> None:
    scene = draw_scene(10, 0, {1: (slice(0, 2), slice(0, 2))})
    source = draw_scene(100, 50, {7: (slice(0, 8), slice(0, 8))})
    for seed in range(30):
        kept = (paste(scene, source, seed).labels == 1).sum()
        assert kept >= 2


def test_nothing_is_pasted_where_there_is_no_photo() -> None:
    scene, source = draw_scene(10, 0, {}), draw_scene(100, 50, {7: (slice(0, 8), slice(0, 8))})
    scene.labels[7:] = -1
    for seed in range(30):
        assert (paste(scene, source, seed).labels[7:] == -1).all()


@pytest.mark.parametrize("boxes", [{}, {7: (slice(0, 1), slice(0, 1))}, {7: (slice(0, 14), slice(0, 14))}])
def test_a_source_without_an_object_of_fitting_size_changes_nothing(boxes: dict[int, tuple[slice, slice]]) -> None:
    scene = draw_scene(10, 0, {1: (slice(0, 2), slice(0, 2))})
    pasted = [paste(scene, draw_scene(100, 50, boxes), seed) for seed in range(10)]
    unchanged = [bool((each.labels == scene.labels).all()) for each in pasted]
    # Halved, the whole picture is a quarter of the square: an object like any other.
    assert all(unchanged) if len(boxes) == 0 or boxes[7][0].stop == 1 else not all(unchanged)


def test_a_mirrored_scene_is_mirrored_in_everything_and_its_own() -> None:
    scene = draw_scene(10, 0, {1: (slice(0, 7), slice(0, 7))})
    turned = mirror(scene)
    assert turned.labels[0].tolist() == [0] * 7 + [1] * 7
    assert turned.square[0, 0].tolist() == [10] * 28 + [30] * 28
    assert turned.maps[0, 0, :, 0].tolist() == [0, 0, 10, 10]
    turned.labels[:] = 5
    assert scene.labels[0, 0] == 1


def test_a_halved_scene_keeps_its_middle_in_the_middle_of_the_corner() -> None:
    half = halve(draw_scene(10, 0, {1: (slice(0, 7), slice(0, 7))}))
    assert half.maps[0, :, :, 0].tolist() == [[10, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert half.square[0, 0, :28].tolist() == [30] * 14 + [10] * 14
    assert half.labels[0].tolist() == [1] * 4 + [0] * 3 + [-1] * 7
