from pathlib import Path

import numpy as np
import pytest
import tokens
import torch

from model.errors import LabelStoreError
from training.labels.masks.batched_cut import choose_objects, flood, propose_batch
from training.labels.masks.discover import CutPlan, choose_object, propose
from training.labels.masks.eigen import solve_cuts

OBJECTS = [
    [(slice(6, 13), slice(4, 11))],
    [(slice(2, 10), slice(2, 10)), (slice(12, 17), slice(11, 17))],
    [(slice(0, 8), slice(0, 20)), (slice(10, 13), slice(3, 5)), (slice(14, 19), slice(6, 18))],
    [(slice(0, 20), slice(0, 8))],
]


@pytest.mark.parametrize("is_faithful", [False, True])
@pytest.mark.parametrize("is_centred", [False, True])
def test_a_batch_gives_what_each_photo_gives_alone(is_faithful: bool, is_centred: bool) -> None:
    plan = CutPlan(cuts=3, is_faithful=is_faithful, is_centred=is_centred)
    photos = [tokens.draw(objects) for objects in OBJECTS]
    together = propose_batch(torch.from_numpy(np.stack(photos)), plan).numpy()
    assert together.shape == (4, 3, 20, 20)
    for photo, masks in zip(photos, together, strict=True):
        assert (masks[masks.any((1, 2))] == propose(photo, plan)).all()


@pytest.mark.parametrize("is_faithful", [False, True])
def test_a_photo_whose_patches_are_all_near_has_no_object_and_spoils_no_other(is_faithful: bool) -> None:
    photos = np.stack([tokens.draw(OBJECTS[0]) + np.array([*[0.0] * 7, 9.0]), tokens.draw(OBJECTS[0])])
    masks = propose_batch(torch.from_numpy(photos), CutPlan(is_faithful=is_faithful))
    assert not masks[0].any()
    assert masks[1, 0].sum() == 49


def test_objects_are_chosen_in_a_batch_as_they_are_alone() -> None:
    vectors = np.random.default_rng(3).normal(size=(40, 6, 5)).astype(np.float32)
    expected = np.stack([choose_object(each) for each in vectors])
    assert (choose_objects(torch.from_numpy(vectors)).numpy() == expected).all()


def test_a_flood_follows_a_long_way_round_and_passes_no_corner() -> None:
    maze = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0],
                         [1, 0, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 0, 1]]).bool()  # fmt: skip
    seed = torch.zeros_like(maze)
    seed[0, 0] = True
    reached = flood(seed[None], maze[None])[0]
    assert (reached[:, :8] == maze[:, :8]).all()
    assert not reached[:, 8].any()  # it touches by a corner alone


def test_features_that_are_not_finite_are_refused() -> None:
    broken = torch.ones(2, 4, 4, 3)
    broken[1, 2, 2, 0] = torch.inf
    with pytest.raises(LabelStoreError, match="not finite"):
        propose_batch(broken, CutPlan())


@pytest.mark.golden
def test_a_batch_of_real_photos_gives_the_reference_masks_given_its_signs(golden: Path) -> None:
    with np.load(golden / "maskcut" / "photos_28x28.npz") as stored:
        features, vectors, packed = (stored[key] for key in ("features", "eigvec", "out_mask_packed"))
    photos = torch.from_numpy(features.astype(np.float32)).mT.unflatten(1, (28, 28))
    signs = iter(torch.from_numpy(vectors).unbind(1))

    def solve(is_near: torch.Tensor) -> torch.Tensor:
        found = solve_cuts(is_near)
        return found * (found * next(signs)).sum(1, keepdim=True).sign()

    masks = propose_batch(photos, CutPlan(threshold=0.15, is_faithful=True), solve).numpy()
    expected = np.unpackbits(packed, axis=-1).astype(bool).reshape(12, 3, 28, 28)
    assert (masks == expected).mean() >= 0.995


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    photos = torch.from_numpy(np.stack([tokens.draw(objects) for objects in OBJECTS]))
    assert torch.equal(propose_batch(photos.cuda(), CutPlan()).cpu(), propose_batch(photos, CutPlan()))
