from pathlib import Path

import numpy as np
import pytest
import tiny

from model.contract import Canvas
from model.pixels import plan_placement
from training.labels.clusters.photo_view import PhotoView
from training.labels.clusters.thingness import Judge, fit_judge, list_least_scores
from training.labels.masks.discovery_recipe import MOST_OBJECTS
from training.labels.masks.proposals import Proposals
from training.photos import PhotoFile

PHOTO = PhotoFile(path=Path("p"), name="p", digest="d", height=56, width=56)
LEFT, RIGHT, ALL = np.zeros((3, 4, 4), bool)
LEFT[:, :2] = RIGHT[:, 2:] = ALL[:] = True


def open_photo() -> PhotoView:
    """Two kinds of patches: the left and the right half of a 4 x 4 grid."""
    maps = np.zeros((4, 4, 4, 8), np.float16)
    maps[:, :, :2, 0] = maps[:, :, 2:, 1] = 1.0
    placement = plan_placement(56, 56, [Canvas.square(tiny.SIDE_PX)], 4)
    return PhotoView(photo=PHOTO, placement=placement, maps=maps)


def make_judge(left: float, right: float) -> Judge:
    """One that knows how often either kind is salient."""
    directions = open_photo().join()[0, [0, 3]]
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return Judge(mean=np.zeros(16), projection=np.eye(16), parts=units, salient=np.array([left, right]))


def test_of_masks_that_views_agree_on_equally_the_more_salient_leads() -> None:
    found = Proposals(soft=np.array([LEFT, ALL, RIGHT], np.float32), scores=np.array([9.0, 9.0, 9.0], np.float32))
    judged = make_judge(0.04, 0.36).judge(open_photo(), found)
    assert judged.scores == pytest.approx(np.sqrt([0.36, 0.2, 0.04]))
    assert (judged.hard == [RIGHT, ALL, LEFT]).all()


def test_a_score_grows_with_the_root_of_the_votes_and_stays_in_0_to_1() -> None:
    found = Proposals(soft=np.array([LEFT] * 4, np.float32), scores=np.array([20.0, 4.0, 1.0, -0.5]))
    judged = make_judge(1.0, 0.0).judge(open_photo(), found)
    assert judged.scores == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


def test_a_photo_without_masks_has_none_to_judge() -> None:
    none = Proposals(soft=np.zeros((0, 4, 4), np.float32), scores=np.zeros(0, np.float32))
    assert make_judge(1.0, 1.0).judge(open_photo(), none).soft.shape == (0, 4, 4)


def test_salience_is_the_share_of_a_kind_that_stands_out() -> None:
    view = open_photo()
    sample = np.repeat(view.join().reshape(16, 16), 2, axis=0)
    views = [view, view]
    salient = iter([RIGHT, RIGHT & (np.arange(4)[:, None] < 2)])
    judge = fit_judge(sample, np.zeros(16), np.eye(16), views, lambda view: next(salient), 0)
    halves = Proposals(soft=np.array([LEFT, RIGHT], np.float32), scores=np.full(2, 9.0, np.float32))
    own = judge.judge(view, halves)
    assert own.scores == pytest.approx([np.sqrt(0.75), 0.0])
    assert (own.hard[0] == RIGHT).all()


def test_least_scores_leave_one_more_mask_a_photo_each() -> None:
    least = list_least_scores([np.array([0.9, 0.8, 0.1]), np.array([0.7])])
    assert least.tolist() == [0.8, 0.1] + [0.1] * (MOST_OBJECTS - 2)
    assert list_least_scores([np.zeros(0)]).tolist() == [0.0] * MOST_OBJECTS
