from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from training.fitting.rounds.agreement import Found, Steadiness
from training.fitting.rounds.findings import Findings
from training.fitting.rounds.relabelling import Maxima, Relabeller
from training.photos import PhotoFile

SIDE, CELLS = 32, 8


def describe(photo: str = "a") -> PhotoFile:
    return PhotoFile(path=Path(photo), name=photo, digest=photo, height=SIDE, width=SIDE)


def draw_found(scores: list[float], clusters: list[int]) -> Found:
    """Objects of one row of cells each, from the top; below the fourth row stuff 1, 0.9 sure, in the last row 0.3."""
    soft = np.zeros((len(scores), CELLS, CELLS), np.float32)
    for row, mask in enumerate(soft):
        mask[row] = 1.0
    semantic = np.zeros((CELLS, CELLS), np.int16)
    semantic[4:] = 1
    certainty = np.full((CELLS, CELLS), 0.9, np.float32)
    certainty[7] = 0.3
    return Found(
        soft=soft,
        scores=np.array(scores, np.float32),
        clusters=np.array(clusters, np.int64),
        semantic=semantic,
        certainty=certainty,
    )


def describe_old(rows: slice, cluster: int, **more: float) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[rows] = 1
    rle = coco.encode(mask)
    return {"category_id": cluster, "segmentation": {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}, **more}


def make_relabeller(found: Found, old: list[dict[str, Any]], share: float = 0.5) -> Relabeller:
    steadiness = Steadiness(flip=1.0, scale=1.0, covered=1.0)
    findings = Findings(found=found, steadiness=steadiness, height=SIDE, width=SIDE)
    return Relabeller(
        read=lambda photo: findings,
        old_masks={"a": old},
        maxima=Maxima.survey([found], thing_clusters=3, stuff_clusters=2),
        share=share,
        side_px=SIDE,
        thing_clusters=3,
    )


def test_the_map_has_what_reaches_a_share_of_its_clusters_best_and_the_masks_are_all() -> None:
    found = draw_found([0.8, 0.5, 0.3, 0.2], [1, 1, 1, 2])
    relabeller = make_relabeller(found, [])
    label = relabeller.label(describe())
    assert label.things == [1, 1, 1, 2]
    assert label.scores == pytest.approx([0.8, 0.5, 0.3, 0.2])
    assert label.masks.any((2,)).argmax(1).tolist() == [0, 4, 8, 12]
    assert label.is_painted == [True, True, False, True]  # 0.3 is less than half of 0.8
    assert sorted(label.labelled.categories.values()) == [1, 1, 2, 4]
    assert relabeller.count_sure(found) == 3


def test_old_masks_stay_where_no_new_one_explains_them() -> None:
    old = [
        describe_old(slice(0, 6), 3, score=0.4),  # IoU 4 / 6 with the new
        describe_old(slice(0, 16), 3, score=0.25, painted=0),  # 4 / 16
        describe_old(slice(8, 12), 2),
    ]
    label = make_relabeller(draw_found([0.8], [1]), old).label(describe())
    assert label.things == [1, 3, 2]
    assert label.scores == pytest.approx([0.8, 0.25 * 0.25, 0.25])
    assert label.is_painted == [True, False, True]
    segments = label.labelled.categories
    assert segments[int(label.labelled.label_map[0, 0])] == 1
    assert segments[int(label.labelled.label_map[9, 0])] == 2
    assert label.labelled.label_map[5, 0] == 0  # the mask that is not painted leaves no trace


def test_stuff_is_kept_where_the_teacher_is_half_as_sure_as_it_gets() -> None:
    label = make_relabeller(draw_found([], []), []).label(describe())
    assert set(label.labelled.categories.values()) == {4}
    rows = label.labelled.label_map[:, 0] > 0
    assert rows.tolist() == [False] * 16 + [True] * 12 + [False] * 4
    assert label.masks.shape == (0, SIDE, SIDE)


def test_the_best_scores_and_chances_are_over_all_photos() -> None:
    maxima = Maxima.survey([draw_found([0.2, 0.6], [1, 3]), draw_found([0.4], [1])], 3, 2)
    assert maxima.things.tolist() == pytest.approx([0.4, 0.0, 0.6])
    assert maxima.stuff.tolist() == pytest.approx([0.9, 0.9, 0.0])
