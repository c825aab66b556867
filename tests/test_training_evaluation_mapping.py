"""Mapping files, and labeled segments as examples."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_predictor import (
    CAR,
    CAT,
    SIDE,
    SKY,
    WALL,
    FakePredictor,
    draw_dataset,
    draw_scene,
)

from model.category_examples import Category
from model.contract import InputSize
from model.errors import ConfigError
from model.images import plan_letterbox
from model.postprocessing.panoptic import PatchEmbeddings
from training.evaluation.class_mapping import (
    ClassMappingConfig,
    ClusterAssignment,
    ClusterMapping,
    fingerprint_photos,
    read_mapping,
)
from training.evaluation.cluster_matching import MatchingConfig
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluate import evaluate, fit_mapping
from training.evaluation.image_results import hash_photo
from training.evaluation.predictors import ImagePrediction

DIGESTS = ["a" * 64, "b" * 64]
MAPPING = ClusterMapping(
    source="c" * 64,
    method="votes",
    matching=MatchingConfig(method="votes", min_score=0.5),
    fitted_on=fingerprint_photos("set, val", DIGESTS),
    thing_clusters=2,
    stuff_clusters=1,
    num_things=1,
    categories=(Category(id=1, name="cat"), Category(id=2, name="wall")),
    clusters={
        1: ClusterAssignment(category=1, purity=0.75, support=4),
        2: ClusterAssignment(category=None, purity=0.0, support=0),
        3: ClusterAssignment(category=2, purity=1.0, support=9),
    },
)


@pytest.mark.parametrize("mapping", [MAPPING, replace(MAPPING, matching=None, method="given")])
def test_a_mapping_is_read_as_it_was_written(tmp_path: Path, mapping: ClusterMapping) -> None:
    mapping.write(tmp_path / "mapping.json")
    assert read_mapping(tmp_path / "mapping.json") == mapping
    assert mapping.to_table().tolist() == [-1, 0, -1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1, this release reads 3: run `useg match` again"),
        ({"methd": "votes"}, "did you mean 'method'"),
        ({"method": "greedy"}, "method"),
        ({"clusters": {"9": {"category": 1, "purity": 1, "support": 1}}}, r"clusters \[9\] do not fit"),
        ({"clusters": {"1": {"category": 8, "purity": 1, "support": 1}}}, r"clusters \[1\] do not fit"),
        ({"fitted_on": {}}, "fitted_on"),
        ({"categories": 3}, "categories"),
    ],
)
def test_an_invalid_mapping_is_rejected_with_its_path(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "mapping.json"
    MAPPING.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"(?s)mapping\.json is not a mapping file: .*{message}"):
        read_mapping(path)


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_a_missing_or_broken_mapping_is_rejected(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mapping.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"mapping\.json is not a mapping file"):
        read_mapping(path)


class EmbeddedPredictor(FakePredictor):
    """Predicts the same clusters for every scene; only embeddings tell its categories apart."""

    def __init__(self, dataset: GroundTruthDataset, scenes: list[tuple[int, int]]) -> None:
        super().__init__(dataset, [draw_scene(1, 3)] * len(scenes))
        self._scenes = dict(zip([hash_photo(image) for image in dataset.images], scenes, strict=True))

    def predict(self, image: np.ndarray, photo_digest: str) -> ImagePrediction:
        prediction = super().predict(image, photo_digest)
        scene = cv2.resize(draw_scene(*self._scenes[photo_digest]), (4, 4), interpolation=cv2.INTER_NEAREST)
        values = np.stack([scene == each for each in (CAT, CAR, WALL, SKY)]).astype(np.float32)
        letterbox = plan_letterbox(SIDE, SIDE, [InputSize.square(SIDE)], 1)
        patches = PatchEmbeddings(values=values, letterbox=letterbox)
        panoptic = prediction.panoptic
        clusters = replace(panoptic, embeddings=patches.pool_segments(panoptic.label_map, list(panoptic.clusters)))
        (thing,) = prediction.detections
        detections = (replace(thing, embedding=values[:, 0, 0]),)
        return replace(prediction, panoptic=clusters, semantic=clusters, detections=detections, patches=patches)


def test_segments_of_one_cluster_get_the_categories_of_similar_labeled_segments(tmp_path: Path) -> None:
    scenes = [(CAT, WALL), (CAT, WALL), (CAR, SKY), (CAR, SKY)]
    dataset = draw_dataset(tmp_path / "set", scenes)
    predictor = EmbeddedPredictor(dataset, scenes)
    neighbors, _ = evaluate(predictor, dataset, ClassMappingConfig())
    majority, _ = evaluate(predictor, dataset, ClassMappingConfig(matching=MatchingConfig(method="majority")))
    for report, expected in ((neighbors, 100.0), (majority, 25.0)):
        assert report.summary.panoptic["pq"].value == pytest.approx(expected, abs=13.0)
    assert neighbors.summary.semantic["accuracy"].value == 100.0
    assert neighbors.summary.instance["named_mask"].headline["ap"].value == 100.0
    assert majority.summary.semantic["accuracy"].value < 60.0

    mapping = fit_mapping(predictor, dataset, MatchingConfig())
    assert mapping.examples is not None
    assert mapping.examples.counts == (2, 2, 2, 2)
    mapping.write(tmp_path / "mapping.json")
    assert read_mapping(tmp_path / "mapping.json") == mapping
    other = draw_dataset(tmp_path / "other", scenes, seed=9)
    config = ClassMappingConfig(mapping=mapping)
    assert evaluate(EmbeddedPredictor(other, scenes), other, config)[0].summary.panoptic["pq"].value == 100.0
