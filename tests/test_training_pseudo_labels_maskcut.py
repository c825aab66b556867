from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokens

from model.errors import DatasetError
from training.data.label_config import MaskDiscoveryConfig
from training.pseudo_labels.maskcut import (
    MaskProposals,
    fiedler_vector,
    fiedler_vector_dense,
    l2_normalize_tokens,
    load_proposals,
    maskcut,
    select_object,
)


def test_one_object_on_a_background_is_one_mask() -> None:
    inside = (slice(6, 13), slice(4, 11))
    expected = np.zeros((20, 20), bool)
    expected[inside] = True
    masks = maskcut(tokens.draw([inside]), MaskDiscoveryConfig(proposals="maskcut", maskcut_n=1))
    assert masks.shape == (1, 20, 20)
    assert (masks[0] == expected).all()


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


def test_the_side_with_three_corners_is_the_background() -> None:
    vector = np.ones((8, 8))
    vector[2:5, 2:5] = -1.5
    assert select_object(vector).sum() == 9
    assert select_object(-vector).sum() == 9


def test_with_two_corners_each_the_connected_region_of_the_seed_is_the_object() -> None:
    vector = np.full((6, 6), 0.1)
    vector[:, :3] = -0.1
    vector[2, 1] = -0.9
    vector[:, 2] = 0.2
    vector[:, 4] = -0.1
    expected = np.zeros((6, 6), bool)
    expected[:, :2] = True
    assert (select_object(vector) == expected).all()


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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One photo and the outputs of the reference implementation."""

    features: np.ndarray
    config: MaskDiscoveryConfig
    vectors: np.ndarray
    masks: np.ndarray
    """Without empty ones."""
    is_sign_sensitive: bool

    def solver_with_reference_signs(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return a solver with the signs of the reference: the corner rule depends on them, and ours are fixed."""
        stored = iter(self.vectors)

        def solve(is_connected: np.ndarray) -> np.ndarray:
            vector = fiedler_vector(is_connected)
            return vector * np.sign(vector @ next(stored))

        return solve


def read_references(folder: Path, name: str, side: int) -> list[Reference]:
    with np.load(folder / "maskcut" / f"{name}.npz") as stored:
        arrays = dict(stored)
    masks = np.unpackbits(arrays["out_mask_packed"], axis=-1)[..., : side * side].astype(bool)
    return [
        Reference(
            features=each.astype(np.float32).T.reshape(side, side, -1),
            config=MaskDiscoveryConfig(
                proposals="maskcut",
                maskcut_n=3,
                maskcut_tau=float(arrays["tau"][index]),
                maskcut_reference_filters=True,
            ),
            vectors=arrays["eigvec"][index],
            masks=masks[index][masks[index].any(-1)].reshape(-1, side, side),
            is_sign_sensitive=bool(arrays["sign_sensitive"][index].any()),
        )
        for index, each in enumerate(arrays["features"])
    ]


@pytest.mark.golden
@pytest.mark.parametrize(("name", "side"), [("random_20x20", 20), ("photos_28x28", 28)])
def test_eigenvectors_equal_the_reference_up_to_sign(golden: Path, name: str, side: int) -> None:
    for each in read_references(golden, name, side):
        flat = l2_normalize_tokens(each.features, subtract_mean=False).reshape(side * side, -1)
        vector = fiedler_vector(flat @ flat.T > each.config.maskcut_tau)
        assert abs(vector @ each.vectors[0]) == pytest.approx(1.0, abs=1e-6)  # stored in single precision


@pytest.mark.golden
@pytest.mark.parametrize(("name", "side"), [("random_20x20", 20), ("photos_28x28", 28)])
def test_masks_equal_the_reference_given_its_signs(golden: Path, name: str, side: int) -> None:
    equal = []
    for each in read_references(golden, name, side):
        masks = maskcut(each.features, each.config, each.solver_with_reference_signs())
        assert len(masks) == len(each.masks)
        equal.append((masks == each.masks).mean())
    # Not all: a tie between seeds may go either way (the reference's README).
    assert np.mean(equal) >= 0.995


def draw_graph(seed: int, nodes: int) -> np.ndarray:
    """Nodes in three groups on a line; those less than 1 apart are connected."""
    generator = np.random.default_rng(seed)
    positions = generator.normal(0.0, 0.7, nodes) + generator.integers(0, 3, nodes)
    is_connected: np.ndarray = np.abs(positions[:, None] - positions) < 1.0
    return is_connected


@pytest.mark.parametrize("nodes", [50, 1300])
def test_the_lanczos_solver_agrees_with_the_dense_solver(nodes: int) -> None:
    is_connected = draw_graph(1, nodes)
    # Beyond 1,200 nodes products are in single precision.
    assert fiedler_vector(is_connected) == pytest.approx(fiedler_vector_dense(is_connected), abs=1e-5)


def draw_proposals() -> MaskProposals:
    soft = np.array([[[0.2, 0.6]], [[1.0, 0.4]], [[0.0, 1.0]]], np.float32)
    return MaskProposals(soft=soft, scores=np.array([3.0, 2.0, 1.0], np.float32))


def test_top_k_keeps_the_first_masks_above_the_minimum_score() -> None:
    found = draw_proposals()
    assert found.top_k(9, 2.0).scores.tolist() == [3.0, 2.0]
    assert found.top_k(1, 2.0).soft.tolist() == found.soft[:1].tolist()
    assert len(found.top_k(9, 9.0).soft) == 0


def test_proposals_round_trip_to_disk_within_one_255th(tmp_path: Path) -> None:
    found = draw_proposals()
    found.write(tmp_path / "masks.npz")
    again = load_proposals(tmp_path / "masks.npz")
    assert again.soft == pytest.approx(found.soft, abs=0.5 / 255 + 1e-6)
    assert (again.scores == found.scores).all()
    assert (again.binary == found.binary).all()


def test_a_damaged_proposal_file_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "masks.npz").write_bytes(b"no arrays")
    with pytest.raises(DatasetError, match=r"masks\.npz holds no mask proposals"):
        load_proposals(tmp_path / "masks.npz")
