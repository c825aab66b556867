import numpy as np
import pytest

from training.mask_transformer.feature_dataset import PADDING, VOID, FeatureSample, copy_paste, halve, hflip_features
from training.mask_transformer.instances import Instances

SIDE, CELLS, GRID = 56, 14, 4


Boxes = tuple[tuple[slice, slice], ...]


def draw_scene(shade: int, feature: float, boxes: Boxes = (), cluster: int = 1) -> FeatureSample:
    """A plain scene whose objects (rows and columns of cells) are 20 lighter and 10 louder."""
    masks, square = np.zeros((len(boxes), CELLS, CELLS), bool), np.full((3, SIDE, SIDE), shade, np.uint8)
    maps = np.full((2, GRID, GRID, 1), feature, np.float16)
    for mask, (rows, columns) in zip(masks, boxes, strict=True):
        mask[rows, columns] = True
    shown = np.array(masks.any(0))
    bright = enlarge(shown)
    square[:, bright] += 20
    maps[:, bright[7::14, 7::14]] += 10
    objects = Instances(masks=masks, clusters=np.full(len(boxes), cluster), weights=np.ones(len(boxes), np.float32))
    semantic = np.where(shown, 0, VOID).astype(np.int16)
    return FeatureSample(maps=maps, square=square, semantic=semantic, objects=objects)


def enlarge(cells: np.ndarray) -> np.ndarray:
    return cells.repeat(4, 0).repeat(4, 1)


def paste(
    scene: FeatureSample, source: FeatureSample, seed: int, clusters: frozenset[int] | None = None
) -> FeatureSample:
    return copy_paste(scene, source, np.random.default_rng(seed), clusters)


CORNER = (slice(0, 8), slice(0, 8))


def test_a_pasted_object_is_at_one_place_in_pixels_labels_and_features() -> None:
    empty, source = draw_scene(10, 0), draw_scene(100, 50, (CORNER,), cluster=3)
    places = set()
    for seed in range(30):
        scene = paste(empty, source, seed)
        (cells,) = scene.objects.masks
        assert scene.objects.clusters.tolist() == [3]
        assert (scene.semantic == np.where(cells, 0, VOID)).all()
        assert (scene.square[:, enlarge(cells)] == 120).all()
        assert (scene.square[:, ~enlarge(cells)] == 10).all()
        assert ((scene.maps == 60).sum(), (scene.maps == 0).sum()) in {(8, 24), (2, 30)}  # four patches, or one halved
        assert (scene.maps[:, enlarge(cells)[7::14, 7::14]] == 60).all()
        places.add((int(cells.sum()), *map(int, np.argwhere(cells)[0])))
    assert {size for size, *_ in places} == {64, 16}
    assert len(places) > 4


def test_an_object_that_would_cover_half_of_another_is_left_out() -> None:
    scene, source = draw_scene(10, 0, ((slice(0, 2), slice(0, 2)),)), draw_scene(100, 50, (CORNER,))
    for seed in range(30):
        assert paste(scene, source, seed).objects.masks[0].sum() >= 2


def test_where_masks_overlap_what_a_pasted_object_half_covers_goes() -> None:
    whole, part = (slice(0, 14), slice(0, 14)), (slice(0, 2), slice(0, 2))
    scene, source = draw_scene(10, 0, (whole, part)), draw_scene(100, 50, (CORNER,), cluster=3)
    clusters = []
    for seed in range(30):
        objects = paste(scene, source, seed).objects
        clusters.append(objects.clusters.tolist())
        assert not (objects.masks[0] & objects.masks[-1]).any()
        assert objects.masks[0].sum() + objects.masks[-1].sum() == 14 * 14
    assert sorted({tuple(each) for each in clusters}) == [(1, 1, 3), (1, 3)]


def test_a_pasted_object_brings_its_parts_and_no_neighbours() -> None:
    part, neighbour = (slice(2, 4), slice(2, 4)), (slice(7, 9), slice(0, 8))
    source = draw_scene(100, 50, (CORNER, part, neighbour))
    source.objects.weights[:] = (1.0, 0.25, 0.25)
    source.objects.weights[1:] = 0.25  # at the middle weight, too small alone
    seen = set()
    for seed in range(30):
        objects = paste(draw_scene(10, 0), source, seed).objects
        sizes = objects.masks.sum((1, 2)).tolist()
        if 64 in sizes:
            start = sizes.index(64)
            seen.add(tuple(sizes[start : start + 2]))
            assert (objects.masks[start] | ~objects.masks[start + 1]).all()
            assert objects.weights[start : start + 2].tolist() == [1.0, 0.25]
    assert seen == {(64, 4)}


def test_only_surer_objects_and_clusters_that_are_asked_for_are_pasted() -> None:
    source = draw_scene(
        100, 50, ((slice(0, 4), slice(0, 4)), (slice(8, 12), slice(8, 12)), (slice(0, 4), slice(8, 12)))
    )
    source.objects.weights[:] = (0.9, 0.8, 0.1)
    source.objects.clusters[:] = (1, 2, 3)
    pasted = [set(paste(draw_scene(10, 0), source, seed).objects.clusters.tolist()) for seed in range(30)]
    assert set().union(*pasted) == {1, 2}
    asked = [set(paste(draw_scene(10, 0), source, seed, frozenset({2, 3})).objects.clusters) for seed in range(30)]
    assert set().union(*asked) == {2}


def test_nothing_is_pasted_where_there_is_no_photo() -> None:
    scene, source = draw_scene(10, 0), draw_scene(100, 50, (CORNER,))
    scene.semantic[7:] = PADDING
    for seed in range(30):
        pasted = paste(scene, source, seed)
        assert (pasted.semantic[7:] == PADDING).all()
        assert not pasted.objects.masks[:, 7:].any()


@pytest.mark.parametrize("boxes", [(), ((slice(0, 1), slice(0, 1)),), ((slice(0, 14), slice(0, 14)),)])
def test_a_source_without_an_object_of_fitting_size_changes_nothing(boxes: Boxes) -> None:
    scene = draw_scene(10, 0, ((slice(0, 2), slice(0, 2)),))
    pasted = [paste(scene, draw_scene(100, 50, boxes), seed) for seed in range(10)]
    unchanged = [bool((each.square == scene.square).all()) for each in pasted]
    # Halved, the whole picture is a quarter of the square: an object like any other.
    assert all(unchanged) if len(boxes) == 0 or boxes[0][0].stop == 1 else not all(unchanged)


HALF = (slice(0, 7), slice(0, 7))


def test_a_mirrored_scene_is_mirrored_in_everything_and_its_own() -> None:
    scene = draw_scene(10, 0, (HALF,))
    turned = hflip_features(scene)
    assert turned.objects.masks[0, 0].tolist() == [False] * 7 + [True] * 7
    assert turned.semantic[0].tolist() == [VOID] * 7 + [0] * 7
    assert turned.square[0, 0].tolist() == [10] * 28 + [30] * 28
    assert turned.maps[0, 0, :, 0].tolist() == [0, 0, 10, 10]
    turned.semantic[:] = 5
    turned.objects.masks[:] = False
    assert scene.semantic[0, 0] == 0
    assert scene.objects.masks[0, 0, 0]


def test_a_halved_scene_keeps_its_middle_in_the_middle_of_the_corner() -> None:
    half = halve(draw_scene(10, 0, (HALF,)))
    assert half.maps[0, :, :, 0].tolist() == [[10, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert half.square[0, 0, :28].tolist() == [30] * 14 + [10] * 14
    assert half.semantic[0].tolist() == [0] * 4 + [VOID] * 3 + [PADDING] * 7
    assert half.objects.masks[0, 0].tolist() == [True] * 4 + [False] * 10
