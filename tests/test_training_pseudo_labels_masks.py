from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokens

from model.embeddings import fit_whitening
from model.errors import DatasetError
from training.data.label_config import MaskDiscoveryConfig
from training.pseudo_labels.consensus import (
    FeatureProjections,
    agglomerative_regions,
    consensus_masks,
    pairwise_mask_iou,
)
from training.pseudo_labels.maskcut import (
    MaskProposals,
    fiedler_vector,
    fiedler_vector_dense,
    load_proposals,
    maskcut,
)
from training.pseudo_labels.pipeline import refine_masks


def test_two_objects_are_two_disjoint_masks() -> None:
    first, second = (slice(2, 10), slice(2, 10)), (slice(12, 17), slice(11, 17))
    masks = maskcut(tokens.draw([first, second]), MaskDiscoveryConfig(proposals="maskcut", maskcut_n=2))
    found = {(int(mask.sum()), bool(mask[5, 5]), bool(mask[14, 14])) for mask in masks}
    assert found == {(64, True, False), (30, False, True)}


def test_subtracting_the_mean_finds_an_object_where_all_patches_are_connected() -> None:
    inside = (slice(6, 13), slice(4, 11))
    saturated = tokens.draw([inside]) + np.array([*[0.0] * 7, 9.0])
    found = maskcut(saturated, MaskDiscoveryConfig(proposals="maskcut", maskcut_n=1, maskcut_subtract_mean=True))
    assert found[0].sum() == 49
    assert found[0][inside].all()


def test_tokens_that_are_not_finite_are_an_error() -> None:
    broken = tokens.draw([])
    broken[3, 3, 3] = np.nan
    with pytest.raises(DatasetError, match="not finite"):
        maskcut(broken, MaskDiscoveryConfig(proposals="maskcut"))


@pytest.mark.parametrize("as_published", [False, True])
def test_a_photo_whose_patches_are_all_connected_has_no_mask(as_published: bool) -> None:
    saturated = tokens.draw([(slice(6, 13), slice(4, 11))]) + np.array([*[0.0] * 7, 9.0])
    assert maskcut(
        saturated, MaskDiscoveryConfig(proposals="maskcut", maskcut_reference_filters=as_published)
    ).shape == (0, 20, 20)


def solver_with_signs_of(vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a solver with the signs of these eigenvectors: the corner rule depends on them, and ours are fixed."""
    stored = iter(vectors)

    def solve(is_connected: np.ndarray) -> np.ndarray:
        vector = fiedler_vector(is_connected)
        return vector * np.sign(vector @ next(stored))

    return solve


@pytest.mark.golden
@pytest.mark.parametrize(("name", "side"), [("random_20x20", 20), ("photos_28x28", 28)])
def test_masks_equal_the_reference_given_its_signs(golden: Path, name: str, side: int) -> None:
    with np.load(golden / "maskcut" / f"{name}.npz") as stored:
        features, taus, vectors, packed = (stored[key] for key in ("features", "tau", "eigvec", "out_mask_packed"))
    reference = np.unpackbits(packed, axis=-1)[..., : side * side].astype(bool)
    published = MaskDiscoveryConfig(proposals="maskcut", maskcut_n=3, maskcut_reference_filters=True)
    equal = []
    for index, each in enumerate(features):
        patches = each.astype(np.float32).T.reshape(side, side, -1)
        config = replace(published, maskcut_tau=float(taus[index]))
        masks = maskcut(patches, config, solver_with_signs_of(vectors[index]))
        expected = reference[index][reference[index].any(-1)].reshape(-1, side, side)
        assert len(masks) == len(expected)
        equal.append((masks == expected).mean())
    # Not all: a tie between seeds may go either way (the reference's README).
    assert np.mean(equal) >= 0.995


def draw_graph(seed: int, nodes: int) -> np.ndarray:
    """Nodes in three groups on a line; those less than 1 apart are connected."""
    generator = np.random.default_rng(seed)
    positions = generator.normal(0.0, 0.7, nodes) + generator.integers(0, 3, nodes)
    is_connected: np.ndarray = np.abs(positions[:, None] - positions) < 1.0
    return is_connected


def test_the_lanczos_solver_agrees_with_the_dense_solver() -> None:
    is_connected = draw_graph(1, 1300)  # beyond 1,200 nodes products are in single precision
    assert fiedler_vector(is_connected) == pytest.approx(fiedler_vector_dense(is_connected), abs=1e-5)


def test_proposals_round_trip_to_disk_within_one_255th(tmp_path: Path) -> None:
    soft = np.array([[[0.2, 0.6]], [[1.0, 0.4]], [[0.0, 1.0]]], np.float32)
    found = MaskProposals(soft=soft, scores=np.array([3.0, 2.0, 1.0], np.float32))
    found.write(tmp_path / "masks.npz")
    again = load_proposals(tmp_path / "masks.npz")
    assert again.soft == pytest.approx(soft, abs=0.5 / 255 + 1e-6)
    assert (again.scores == found.scores).all()
    assert (again.binary == found.binary).all()


FIRST, SECOND = (slice(2, 10), slice(2, 10)), (slice(12, 17), slice(11, 17))


def fit_projections(sample: np.ndarray) -> FeatureProjections:
    mean, projection = fit_whitening(sample, sample.shape[1])
    return FeatureProjections(mean=mean, projection=projection)


def mark(where: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[where] = True
    return mask


def test_objects_in_all_projections_come_first_and_are_separate() -> None:
    drawn = tokens.draw([FIRST, SECOND])
    found = consensus_masks(drawn, fit_projections(drawn.reshape(-1, 8)).transform(drawn))
    # Whitening amplifies noise: a patch at the border may be missing in a projection.
    masks = np.concatenate([found.binary[:2], [mark(FIRST), mark(SECOND)]])
    ious = pairwise_mask_iou(masks, masks)
    assert sorted(ious[:2, 2:].max(0).tolist()) == pytest.approx([1.0, 1.0], abs=0.1)
    assert (np.diff(found.scores) <= 0).all()


def test_each_projection_that_has_a_mask_adds_one_to_its_score() -> None:
    drawn = tokens.draw([FIRST])
    with_object = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    blind = np.zeros((20, 20, 2), np.float32)
    blind[..., 0] = 1.0  # all one region, too large to be an object
    few, many = (
        consensus_masks(drawn, [with_object, blind, blind]),
        consensus_masks(drawn, [with_object, with_object, with_object]),
    )
    assert many.scores[0] - few.scores[0] == pytest.approx(2.0, abs=1e-5)
    assert (many.binary[0] == mark(FIRST)).all()


def draw_features(rows: list[list[float]]) -> np.ndarray:
    """Unit features in a plane, by their angle in degrees."""
    angles = np.radians(rows)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def test_neighbors_merge_above_the_threshold_most_similar_first() -> None:
    features = draw_features([[0, 0, 40, 90], [0, 0, 40, 90]])
    found = agglomerative_regions(features, [0.9, 0.7, 0.2], (2, 8))
    # cos 40 = 0.77: the middle joins the left before it joins the right (cos 50 = 0.64).
    expected = [[[1, 1, 0, 0]] * 2, [[0, 0, 1, 0]] * 2, [[0, 0, 0, 1]] * 2, [[1, 1, 1, 0]] * 2, [[1, 1, 1, 1]] * 2]
    assert sorted(found.astype(int).tolist()) == sorted(expected)


def test_only_regions_within_the_areas_are_returned_each_once() -> None:
    features = draw_features([[0, 0, 90, 180, 180, 180]])
    found = agglomerative_regions(features, [0.9, 0.8, 0.7], (2, 2))
    assert found[:, 0].astype(int).tolist() == [[1, 1, 0, 0, 0, 0]]


def draw_tokens() -> np.ndarray:
    """Two axes, one with ten times the deviation of the other, and a large mean."""
    return np.random.default_rng(0).normal(0.0, [10.0, 1.0], (4000, 2)) + np.array([100.0, 50.0])


def test_projections_center_whiten_and_half_whiten() -> None:
    sample = draw_tokens()
    centered, white, half = fit_projections(sample).transform(sample.mean(0) + np.array([[[10.0, 1.0]]]))
    assert np.abs(centered[0, 0]) == pytest.approx(np.array([10.0, 1.0]) / np.hypot(10, 1), abs=1e-6)
    # 4,000 samples determine a deviation to 1.1 %.
    assert np.abs(white[0, 0]) == pytest.approx(np.array([1.0, 1.0]) / np.hypot(1, 1), abs=0.03)
    root = np.sqrt(10.0)
    assert np.abs(half[0, 0]) == pytest.approx(np.array([root, 1.0]) / np.hypot(root, 1), abs=0.03)


def draw_edge() -> np.ndarray:
    """Light up to column 218, dark from there."""
    image = np.zeros((448, 448, 3), np.uint8)
    image[:, :218] = 230
    return image


def test_a_mask_border_moves_to_the_image_edge() -> None:
    patches = np.zeros((2, 32, 32), bool)
    patches[0, :, :16] = True  # ends at pixel 224, six too far
    patches[1, :, 16:] = True
    fine = refine_masks(patches, draw_edge(), 14)
    assert set(fine[0].sum(1).tolist()) == {218}
    assert set(fine[1].sum(1).tolist()) == {448 - 218}


def test_a_mask_that_refinement_would_lose_is_empty_and_others_stay() -> None:
    patches = np.zeros((2, 32, 32), bool)
    patches[0, 5, 5] = True
    patches[1, 8:24, 8:24] = True
    fine = refine_masks(patches, np.full((448, 448, 3), 90, np.uint8), 14)
    assert [bool(mask.any()) for mask in fine] == [False, True]


def test_the_image_may_end_inside_the_last_patch() -> None:
    fine = refine_masks(np.ones((1, 4, 3), bool), np.full((50, 40, 3), 90, np.uint8), 14)
    assert fine.shape == (1, 50, 40)
    assert fine.all()
