from pathlib import Path

import numpy as np
import pytest

from model.errors import LabelStoreError
from training.labels.masks.proposals import Proposals, rank, read_proposals, separate


def draw_proposals() -> Proposals:
    soft = np.array([[[0.2, 0.6]], [[1.0, 0.4]], [[0.0, 1.0]]], np.float32)
    return Proposals(soft=soft, scores=np.array([3.0, 2.0, 1.0], np.float32))


def test_a_patch_with_most_of_the_votes_is_in_the_mask() -> None:
    assert draw_proposals().hard.tolist() == [[[False, True]], [[True, False]], [[False, True]]]


def test_the_first_few_that_score_well_enough_are_kept() -> None:
    found = draw_proposals()
    assert found.keep(9, 2.0).scores.tolist() == [3.0, 2.0]
    assert found.keep(1, 2.0).soft.tolist() == found.soft[:1].tolist()
    assert len(found.keep(9, 9.0).soft) == 0


def test_hard_masks_score_by_their_order() -> None:
    found = rank(np.array([[[True, False]], [[False, True]]]))
    assert found.scores.tolist() == [1.0, 0.5]
    assert found.soft.tolist() == [[[1.0, 0.0]], [[0.0, 1.0]]]


def test_proposals_come_back_from_disk_to_a_255th(tmp_path: Path) -> None:
    found = draw_proposals()
    found.write(tmp_path / "masks.npz")
    again = read_proposals(tmp_path / "masks.npz")
    assert again.soft == pytest.approx(found.soft, abs=0.5 / 255 + 1e-6)
    assert (again.scores == found.scores).all()
    assert (again.hard == found.hard).all()


def test_a_pixel_belongs_to_the_best_mask_alone_and_what_has_lost_most_of_itself_is_gone() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 1]]], bool)
    expected = [[[1, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]]]
    assert separate(masks).astype(int).tolist() == expected
    assert separate(masks[:0]).shape == (0, 1, 4)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "masks.npz").write_bytes(b"no arrays")
    with pytest.raises(LabelStoreError, match=r"masks\.npz holds no masks"):
        read_proposals(tmp_path / "masks.npz")
