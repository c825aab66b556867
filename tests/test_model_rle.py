"""Run lengths of a whole map at once equal pycocotools' of each mask, byte for byte."""

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from model.rle import Outline, decode_outline, encode_bits, encode_labels


def expect(mask: np.ndarray) -> Outline:
    """What pycocotools says of a mask."""
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    left, top, width, height = (int(value) for value in coco.toBbox(rle))
    return Outline(
        size=(mask.shape[0], mask.shape[1]),
        counts=rle["counts"].decode("ascii"),
        area=int(coco.area(rle)),
        bbox=(left, top, width, height),
    )


def draw_map(generator: np.random.Generator, most: int) -> np.ndarray:
    """Noise, or every other time blocks."""
    height, width = (int(length) for length in generator.integers(1, 60, 2))
    labels = generator.integers(0, most, (height, width)).astype(np.int32)
    if generator.random() < 0.5:
        return labels
    return np.asarray(cv2.resize(labels[::5, ::5].astype(np.float64), (width, height), interpolation=0)).astype(
        np.int32
    )


@pytest.mark.parametrize("most", [2, 4, 300, 70_000])
def test_random_maps_are_encoded_as_by_pycocotools(most: int) -> None:
    generator = np.random.default_rng(most)
    for _ in range(60):
        labels = draw_map(generator, most)
        ids = [*np.unique(labels)[:6].tolist(), 99_999]
        assert encode_labels(labels, ids) == [expect(labels == each) for each in ids]


def test_a_picture_of_many_pixels_has_counts_of_many_digits() -> None:
    labels = np.zeros((3000, 2000), np.int32)
    labels[5:, 1000] = 1
    (outline,) = encode_labels(labels, [1])
    assert outline == expect(labels == 1)
    assert len(outline.counts) == 5 + 3 + 5  # 3,000,005 and the rest take five digits of five bits, 2,995 takes three


def test_bits_in_a_corner_of_a_picture_are_encoded_as_by_pycocotools() -> None:
    generator = np.random.default_rng(47)
    for _ in range(120):
        bits = draw_map(generator, 2).astype(bool)
        top, left, below, right = (int(each) for each in generator.integers(0, 4, 4))
        whole = np.pad(bits, ((top, below), (left, right)))
        assert encode_bits(bits, top, left, whole.shape) == expect(whole)


def test_outlines_are_decoded_to_their_masks() -> None:
    labels = draw_map(np.random.default_rng(48), 4)
    for number, outline in enumerate(encode_labels(labels, [0, 1, 2, 3])):
        np.testing.assert_array_equal(decode_outline(outline), labels == number)


def test_no_ids_give_no_outlines() -> None:
    assert encode_labels(np.zeros((2, 2), np.int32), []) == []
