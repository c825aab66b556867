"""Annotations keep what panopticapi's evaluator relies on, whatever the segmentation."""

import io

import numpy as np
import pytest
from PIL import Image

from model.coco_panoptic import annotate, list_categories
from model.contract import Canvas, Category, Contract
from model.crops import pack_crop
from model.encodings import encode_panoptic_png
from model.panoptic import Segment, Segmentation

CONTRACT = Contract(
    name="a",
    version="1",
    network="n",
    canvases=(Canvas.square(8),),
    stride_px=1,
    detections=4,
    thing_clusters=3,
    stuff_clusters=2,
    categories={1: Category(id=17, name="cat"), 3: Category(id=17, name="cat"), 4: Category(id=119, name="sky")},
)


def make_segment(number: int, cluster: int) -> Segment:
    return Segment(id=number, cluster=cluster, is_thing=cluster <= 3, score=0.5)


def check_as_panopticapi(segmentation: Segmentation) -> dict[int, int]:
    """Areas by id, after the three checks of panopticapi's evaluation.py, which raise KeyError there."""
    annotation = annotate(segmentation, CONTRACT, 1, "1.png")
    categories = {each["id"] for each in list_categories(CONTRACT)}
    picture = np.array(Image.open(io.BytesIO(encode_panoptic_png(segmentation.label_map))), np.uint32)
    ids = picture[..., 0] + 256 * picture[..., 1] + 256**2 * picture[..., 2]
    listed = {each["id"]: each for each in annotation["segments_info"]}
    drawn = dict(zip(*(each.tolist() for each in np.unique(ids, return_counts=True)), strict=True))
    drawn.pop(0, None)
    assert drawn.keys() - listed.keys() == set(), "drawn and not listed"
    assert listed.keys() - drawn.keys() == set(), "listed and not drawn"
    assert {each["category_id"] for each in listed.values()} <= categories, "of an unknown category"
    assert {number: each["area"] for number, each in listed.items()} == drawn
    return drawn


def test_ids_of_three_bytes_are_listed_with_their_areas() -> None:
    label_map = np.array([[0, 1, 1], [300, 70_000, 70_000]], np.int32)
    segments = (make_segment(1, 1), make_segment(300, 2), make_segment(70_000, 5))
    areas = check_as_panopticapi(Segmentation(label_map=label_map, segments=segments))
    assert areas == {1: 2, 300: 1, 70_000: 2}


def test_an_instance_that_others_hide_is_not_listed() -> None:
    mask = np.ones((2, 2), bool)
    crop = pack_crop(mask)
    assert crop
    hidden = Segmentation(
        label_map=mask.astype(np.int32), segments=(make_segment(1, 1), make_segment(2, 2)), crops=(crop, crop)
    )
    assert check_as_panopticapi(hidden) == {1: 4}


def test_an_empty_answer_keeps_the_promises() -> None:
    assert check_as_panopticapi(Segmentation(label_map=np.zeros((2, 3), np.int32), segments=())) == {}


def test_a_cluster_without_a_name_is_a_category_above_all_named_ones() -> None:
    listed = {each["id"]: (each["name"], each["isthing"]) for each in list_categories(CONTRACT)}
    assert listed == {17: ("cat", 1), 119: ("sky", 0), 119 + 2: ("cluster 2", 1), 119 + 5: ("cluster 5", 0)}


@pytest.mark.parametrize("key", ["id", "category_id", "area", "bbox", "iscrowd"])
def test_a_segment_has_what_the_format_asks_for(key: str) -> None:
    segmentation = Segmentation(label_map=np.array([[0, 4, 4]], np.int32), segments=(make_segment(4, 4),))
    (entry,) = annotate(segmentation, CONTRACT, 7, "7.png")["segments_info"]
    expected = {"id": 4, "category_id": 119, "area": 2, "bbox": [1, 0, 2, 1], "iscrowd": 0}
    assert entry[key] == expected[key]
