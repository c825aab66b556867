"""Pseudo-labels from the masks of a detector."""

from pathlib import Path

import numpy as np
import pytest
from jaxtyping import UInt8

from model.errors import ConfigError
from model.formats.rle import encode_mask
from training.data.dataset import PseudoLabelDataset, read_label_map
from training.detector_labels import build_detector_labels
from training.evaluation.predictors import ClusterMap, ImagePrediction, PredictedObject


class HalvesDetector:
    """Detects the left half of every photo with a high score, and larger parts with lower scores."""

    title = "halves"
    thing_clusters = 1
    stuff_clusters = 0

    def __init__(self, digest: str = "ab" * 32) -> None:
        self.digest = digest

    def predict(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        empty = ClusterMap(label_map=np.zeros(image.shape[:2], np.int32), clusters={})
        detections = []
        for score, end in ((0.9, 32), (0.6, 36), (0.2, 64)):
            mask = np.zeros(image.shape[:2], bool)
            mask[:, :end] = True
            detections.append(PredictedObject(cluster=1, score=score, rle=encode_mask(mask, 0, 0, mask.shape)))
        return ImagePrediction(panoptic=empty, semantic=empty, detections=tuple(detections))


def test_detections_of_high_score_are_in_the_panoptic_map_and_all_are_instances(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    out = PseudoLabelDataset(tmp_path / "store")
    report = build_detector_labels(HalvesDetector(), tiny_store, out, tiny_store.features)
    assert (report.photos, report.masks) == (8, 24)
    for photo in out.read_photos():
        masks = out.read_instances()[photo.digest]
        assert [(mask["score"], mask["in_panoptic"]) for mask in masks] == [(0.9, 1), (0.6, 0), (0.2, 0)]
        label_map = read_label_map(photo.label)
        things = {each: cluster for each, cluster in photo.categories.items() if cluster <= 3}
        assert list(things.values()) == [masks[0]["category_id"]]
        assert np.array_equal(label_map == next(iter(things)), np.arange(64)[None].repeat(len(label_map), 0) < 32)


def test_the_labels_record_their_detector_and_cannot_be_continued_with_another(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    out = PseudoLabelDataset(tmp_path / "store")
    build_detector_labels(HalvesDetector(), tiny_store, out, tiny_store.features)
    assert (out.read_config().mask_source, out.read_config().detector_hash) == ("detector", "ab" * 32)
    assert out.codebook.read_bytes() == tiny_store.codebook.read_bytes()
    with pytest.raises(ConfigError, match="detector_hash differ"):
        build_detector_labels(HalvesDetector("cd" * 32), tiny_store, out, tiny_store.features)


def test_the_score_threshold_selects_the_masks_of_the_panoptic_map(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    out = PseudoLabelDataset(tmp_path / "store")
    build_detector_labels(HalvesDetector(), tiny_store, out, tiny_store.features, score_threshold=0.95)
    assert all(cluster > 3 for photo in out.read_photos() for cluster in photo.categories.values())
