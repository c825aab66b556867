import numpy as np

from training.labels.masks.regions import merge_regions


def point(degrees: float) -> tuple[float, float]:
    return float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))


def draw_view(rows: list[list[float]]) -> np.ndarray:
    """Unit features in a plane, by their angle in degrees."""
    return np.array([[point(angle) for angle in row] for row in rows], np.float32)


def test_neighbours_merge_once_they_are_more_alike_than_the_threshold() -> None:
    view = draw_view([[0, 0, 40, 90], [0, 0, 40, 90]])
    found = merge_regions(view, [0.9, 0.7, 0.2], (2, 8))
    # cos 40 = 0.77: the middle joins the left before it joins the right (cos 50 = 0.64).
    expected = [[[1, 1, 0, 0]] * 2, [[0, 0, 1, 0]] * 2, [[0, 0, 0, 1]] * 2, [[1, 1, 1, 0]] * 2, [[1, 1, 1, 1]] * 2]
    assert sorted(found.astype(int).tolist()) == sorted(expected)


def test_alike_regions_that_do_not_touch_stay_apart() -> None:
    found = merge_regions(draw_view([[0, 90, 0]] * 2), [0.5], (1, 6))
    assert [mask.sum() for mask in found] == [2, 2, 2]


def test_a_region_is_compared_by_the_mean_of_its_patches() -> None:
    """A chain of small steps ends where the mean is too far from the next patch."""
    found = merge_regions(draw_view([[0, 0, 0, 0, 30, 60]]), [np.cos(np.radians(40.0))], (1, 6))
    assert sorted(found[:, 0].astype(int).tolist()) == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]


def test_only_regions_of_the_asked_areas_are_given_each_once() -> None:
    view = draw_view([[0, 0, 90, 180, 180, 180]])
    found = merge_regions(view, [0.9, 0.8, 0.7], (2, 2))
    assert found[:, 0].astype(int).tolist() == [[1, 1, 0, 0, 0, 0]]


def test_no_region_fits_gives_an_empty_stack() -> None:
    assert merge_regions(draw_view([[0, 0], [0, 0]]), [0.9], (5, 6)).shape == (0, 2, 2)
