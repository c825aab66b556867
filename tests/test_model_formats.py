"""Formats of segmentations: COCO, panoptic PNG, overlay, npz, GeoJSON, Hugging Face."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from coco_reference import encode_by_pycocotools
from PIL import Image
from pycocotools import mask as coco
from tiny import make_contract

from model.embeddings import Category
from model.formats.coco import (
    Rle,
    decode_rle,
    encode_rles,
    list_coco_categories,
    to_coco_annotation,
    to_coco_instances,
    to_geojson_features,
    to_hf_masks,
    to_npz,
)
from model.formats.image_files import (
    decode_panoptic_png,
    draw_overlay,
    encode_cluster_png,
    encode_overlay,
    encode_panoptic_png,
    segment_color,
)
from model.postprocessing.masks import PackedMask, pack_mask
from model.postprocessing.panoptic import Segment, Segmentation


def draw(label_map: np.ndarray, ids: list[int] | None = None, masks: tuple[PackedMask, ...] = ()) -> Segmentation:
    """Return a segmentation with a thing for each id, by default the ids of the map."""
    numbers = sorted(set(np.unique(label_map).tolist()) - {0}) if ids is None else ids
    segments = tuple(Segment(id=number, cluster=1, is_thing=True, score=1.0) for number in numbers)
    return Segmentation(label_map=label_map.astype(np.int32), segments=segments, masks=masks)


def encode_one(mask: np.ndarray) -> Rle:
    """Encode a mask as a label map with one segment."""
    (rle,) = encode_rles(draw(mask, [1]))
    return rle


def pack(mask: np.ndarray) -> PackedMask:
    packed = pack_mask(mask.astype(bool))
    assert packed
    return packed


def draw_cells(height: int, width: int, cells: list[tuple[int, int]]) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    for row, column in cells:
        mask[row, column] = 1
    return mask


def test_rles_are_in_the_order_of_segments_not_of_ids() -> None:
    label_map = np.array([[9, 4, 4], [9, 70_000, 4]])
    assert [rle.area for rle in encode_rles(draw(label_map, [70_000, 4, 9]))] == [1, 3, 2]


def test_overlapping_instances_are_encoded_completely() -> None:
    front, back = draw_cells(4, 6, [(0, 0), (0, 1)]), draw_cells(4, 6, [(0, 1), (0, 2), (1, 2)])
    label_map = np.where(front, 1, 2 * back)
    rles = encode_rles(draw(label_map, [1, 2], (pack(front), pack(back))))
    assert rles == [encode_by_pycocotools(front), encode_by_pycocotools(back)]


@pytest.mark.golden
def test_golden_masks_are_encoded_byte_for_byte(golden: Path) -> None:
    packed = np.load(golden / "rle" / "masks.npz")
    for case in json.loads((golden / "rle" / "rle.json").read_text())["masks"]:
        height, width = case["size"]
        mask = np.unpackbits(packed[f"mask{case['index']:02}"], axis=-1)[:, :width]
        rle = encode_one(mask)
        left, top, box_width, box_height = (int(value) for value in case["bbox"])
        assert rle == Rle(
            size=(height, width),
            counts=case["counts"],
            area=case["area"],
            bbox=(left, top, box_width, box_height),
        ), case["kind"]
        np.testing.assert_array_equal(decode_rle(rle), mask)


IDS = np.array([[0, 1, 255, 256], [65_535, 65_536, 65_537, 2**24 - 1]], np.int32)


def test_a_panoptic_png_is_8_bit_rgb_with_the_low_byte_in_red() -> None:
    image = Image.open(io.BytesIO(encode_panoptic_png(IDS)))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (4, 2))
    assert image.getpixel((1, 0)) == (1, 0, 0)
    assert image.getpixel((3, 0)) == (0, 1, 0)
    assert image.getpixel((1, 1)) == (0, 0, 1)
    red, green, blue = np.moveaxis(np.asarray(image, np.int64), -1, 0)
    np.testing.assert_array_equal(red + 256 * green + 65_536 * blue, IDS)
    noise = np.random.default_rng(29).integers(0, 2**24, (50, 70), np.int32)
    np.testing.assert_array_equal(decode_panoptic_png(encode_panoptic_png(noise)), noise)


def save(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        encode_panoptic_png(IDS)[:-30],
        save(Image.new("RGB", (4, 4)), "JPEG"),
        save(Image.new("L", (4, 4)), "PNG"),
        save(Image.new("RGBA", (4, 4)), "PNG"),
        save(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"),
        b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + b"\xff" * 17,
    ],
    ids=["empty", "text", "truncated", "jpeg", "gray", "alpha", "16-bit", "bomb"],
)
def test_other_content_than_an_8_bit_rgb_png_is_rejected(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a panoptic PNG"):
        decode_panoptic_png(content)


def draw_scene() -> tuple[np.ndarray, Segmentation]:
    """Return a gray image with a thing in the left third, void in the middle and stuff on the right."""
    label_map = np.zeros((32, 96), np.int32)
    label_map[:, :32], label_map[:, 64:] = 1, 2
    segments = (
        Segment(id=1, cluster=1, is_thing=True, score=1.0),
        Segment(id=2, cluster=9, is_thing=False, score=1.0, category=NAMED.categories[9]),
    )
    return np.full((32, 96, 3), 100, np.uint8), Segmentation(label_map=label_map, segments=segments)


def test_an_overlay_tints_things_more_than_stuff_and_void_not_at_all() -> None:
    image, segmentation = draw_scene()
    overlay = draw_overlay(image, segmentation)
    thing, stuff = np.array(segment_color(1, True)), np.array(segment_color(2, False))
    assert overlay[16, 16].tolist() == np.round(100 + 0.55 * (thing - 100.0)).tolist()
    assert overlay[16, 80].tolist() == np.round(100 + 0.35 * (stuff - 100.0)).tolist()
    assert np.unique(overlay[:, 33:62]).tolist() == [100]
    assert np.unique(overlay[:, [31, 63]]).tolist() == [245]  # borders
    jpeg = Image.open(io.BytesIO(encode_overlay(image, segmentation)))
    assert (jpeg.format, jpeg.size) == ("JPEG", (96, 32))
    # At quality 88, flat blocks change by a few levels; these three blocks touch no border.
    np.testing.assert_allclose(np.asarray(jpeg)[16, [8, 48, 88]].astype(int), overlay[16, [8, 48, 88]], atol=6)


def test_colors_of_consecutive_ids_differ() -> None:
    for is_thing in (True, False):
        colors = np.array([segment_color(number, is_thing) for number in range(1, 400)])
        assert colors.min() >= 0
        assert colors.max() <= 255
        assert np.abs(np.diff(colors, axis=0)).max(axis=1).min() > 40


NAMED = make_contract(8, 4, stride_px=1, categories={9: Category(id=193, name="grass")})


def decode(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_cluster_png_is_gray_with_cluster_ids() -> None:
    _, segmentation = draw_scene()
    clusters = decode(encode_cluster_png(segmentation, NAMED))
    assert clusters.shape == (32, 96)
    assert clusters.dtype == np.uint8
    assert clusters[0, [0, 40, 90]].tolist() == [1, 0, 9]


def test_a_cluster_png_with_more_than_255_clusters_has_16_bits() -> None:
    segment = Segment(id=3, cluster=800, is_thing=True, score=1.0)
    segmentation = Segmentation(label_map=np.array([[0, 3]], np.int32), segments=(segment,))
    assert decode(encode_cluster_png(segmentation, replace(NAMED, thing_clusters=800))).tolist() == [[0, 800]]


def test_hugging_face_masks_have_label_score_and_gray_mask() -> None:
    _, segmentation = draw_scene()
    thing, stuff = to_hf_masks(segmentation)
    assert (thing["label"], stuff["label"], thing["score"]) == ("LABEL_1", "grass", 1.0)
    mask = Image.open(io.BytesIO(base64.b64decode(stuff["mask"])))
    assert (mask.mode, mask.size) == ("L", (96, 32))
    np.testing.assert_array_equal(np.asarray(mask), np.where(segmentation.label_map == 2, 255, 0))


def test_geojson_features_are_multipolygons_with_segment_properties() -> None:
    _, segmentation = draw_scene()
    thing, stuff = to_geojson_features(segmentation)
    corners = [[0, 0], [32, 0], [32, 32], [0, 32], [0, 0]]
    assert [[ring.tolist() for ring in part] for part in thing["geometry"]["coordinates"]] == [[corners]]
    assert stuff["properties"] == {
        "id": 2, "cluster_id": 9, "cluster_ids": [9], "category_id": 193, "category_name": "grass", "isthing": 0,
        "score": 1.0, "area": 1024, "bbox": [64, 0, 32, 32],
    }  # fmt: skip


@pytest.mark.parametrize("mask_format", ["rle", "polygons"])
def test_coco_instances_have_masks_that_pycocotools_reads(mask_format: Literal["rle", "polygons"]) -> None:
    label_map = np.zeros((90, 120), np.int32)
    label_map[10:80, 20:100] = 1
    label_map[20:35, 30:45] = label_map[50:70, 60:90] = 0  # two holes
    label_map[5:20, 105:115] = 1  # a second component
    (entry,) = to_coco_instances(draw(label_map), NAMED, mask_format)
    segmentation = entry["segmentation"]
    assert isinstance(segmentation, list) == (mask_format == "polygons")
    rle = coco.merge(coco.frPyObjects(segmentation, 90, 120)) if mask_format == "polygons" else segmentation
    np.testing.assert_array_equal(coco.decode(rle), label_map)
    assert (entry["area"], entry["bbox"], entry["iscrowd"]) == (int(label_map.sum()), [20, 5, 95, 75], 0)


def test_npz_has_the_label_map_and_a_row_per_segment_without_pickles() -> None:
    _, segmentation = draw_scene()
    with np.load(io.BytesIO(to_npz(segmentation)), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["label_map"], segmentation.label_map)
        assert arrays["clusters"].tolist() == [1, 9]
        assert arrays["category_ids"].tolist() == [-1, 193]
        assert arrays["categories"].tolist() == ["", "grass"]
        assert arrays["bboxes"].tolist() == [[0, 0, 32, 32], [64, 0, 32, 32]]
        assert len(arrays["masks"]) == 0


def test_npz_has_overlapping_masks_as_bits() -> None:
    front, back = draw_cells(4, 6, [(0, 0), (0, 1)]), draw_cells(4, 6, [(0, 1), (0, 2), (1, 2)])
    segmentation = draw(np.where(front, 1, 2 * back), [1, 2], (pack(front), pack(back)))
    with np.load(io.BytesIO(to_npz(segmentation))) as arrays:
        for number, mask in enumerate((front, back)):
            left, top, width, height = arrays["bboxes"][number]
            bits = np.unpackbits(arrays["masks"][arrays["mask_starts"][number] :], count=height * width)
            whole = np.zeros((4, 6), np.uint8)
            whole[top : top + height, left : left + width] = bits.reshape(height, width)
            np.testing.assert_array_equal(whole, mask)


CONTRACT = make_contract(
    3,
    2,
    stride_px=1,
    categories={1: Category(id=17, name="cat"), 3: Category(id=17, name="cat"), 4: Category(id=119, name="sky")},
)


def test_a_hidden_instance_is_not_listed() -> None:
    whole = pack(np.ones((2, 2)))
    hidden = draw(np.ones((2, 2)), [1, 2], (whole, whole))
    listed = to_coco_annotation(hidden, CONTRACT, 1, "1.png")["segments_info"]
    assert [(each["id"], each["category_id"], each["area"]) for each in listed] == [(1, 17, 4)]


def test_unnamed_clusters_have_category_ids_above_named_ones() -> None:
    listed = {each["id"]: (each["name"], each["isthing"]) for each in list_coco_categories(CONTRACT)}
    assert listed == {17: ("cat", 1), 119: ("sky", 0), 119 + 2: ("cluster 2", 1), 119 + 5: ("cluster 5", 0)}
