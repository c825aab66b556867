"""A predictor with predefined predictions, and small datasets that are drawn here."""

from dataclasses import replace
from pathlib import Path

import labeled_datasets as drawn
import numpy as np
from coco_reference import encode_by_pycocotools
from jaxtyping import Int, UInt8

from model.files import hash_file
from training.evaluation.class_mapping import ClassMapping, ClassMappingConfig, check_mapping
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import (
    AnnotationKind,
    GroundTruthDataset,
    GroundTruthImage,
    ObjectAnnotation,
)
from training.evaluation.evaluation_report import EvaluationReport, compute_report
from training.evaluation.image_results import evaluate_all
from training.evaluation.predictors import ClusterMap, ImagePrediction, PredictedObject, Predictor

SIDE = 40
CAT, CAR, WALL, SKY = 17, 3, 171, 187
"""Category ids of COCO, for the scenes of a dataset."""
CATEGORIES = [
    {"id": CAT, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": CAR, "name": "car", "supercategory": "vehicle", "isthing": 1},
    {"id": WALL, "name": "wall-brick", "supercategory": "wall", "isthing": 0},
    {"id": SKY, "name": "sky-other", "supercategory": "sky", "isthing": 0},
]
ANIMAL_INDEX, VEHICLE_INDEX, SKY_INDEX, WALL_INDEX = range(4)
"""Category indices of the supercategories, things first."""


class FakePredictor:
    """Predicts a given map of clusters for each image; two thing clusters and three stuff clusters."""

    title = "fake"
    digest = "d" * 64
    thing_clusters = 2
    stuff_clusters = 3

    def __init__(
        self, dataset: GroundTruthDataset, maps: list[Int[np.ndarray, "H W"]], scores: list[float] | None = None
    ) -> None:
        digests = [hash_file(image.path) for image in dataset.images]
        self._maps = dict(zip(digests, maps, strict=True))
        self._scores = dict(zip(digests, scores or [0.9] * len(maps), strict=True))
        self.calls = 0

    def predict(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        """Each cluster's region is one segment, and one detection if it is a thing."""
        self.calls += 1
        label_map = self._maps[photo_digest].astype(np.int32)
        clusters = ClusterMap(
            label_map=label_map, clusters={int(each): int(each) for each in np.unique(label_map) if each}
        )
        detections = tuple(
            PredictedObject(
                cluster=each, score=self._scores[photo_digest], rle=encode_by_pycocotools(label_map == each)
            )
            for each in clusters.clusters
            if each <= self.thing_clusters
        )
        return ImagePrediction(panoptic=clusters, semantic=clusters, detections=detections)


def predict_scenes(dataset: GroundTruthDataset, clusters: list[tuple[int, int]]) -> FakePredictor:
    """A predictor of one scene per image, given as the clusters of its thing and its stuff."""
    return FakePredictor(dataset, [draw_scene(thing, stuff) for thing, stuff in clusters])


def draw_scene(thing: int, stuff: int) -> Int[np.ndarray, "H W"]:
    """A square of 20 pixels in a corner, and what is around it."""
    scene = np.full((SIDE, SIDE), stuff)
    scene[:20, :20] = thing
    return scene


def draw_dataset(folder: Path, scenes: list[tuple[int, int]], *, seed: int = 0) -> GroundTruthDataset:
    """A labeled dataset in our own layout; a scene is given as the COCO ids of its thing and its stuff."""
    annotations = []
    for number, (thing, stuff) in enumerate(scenes, start=1):
        scene = draw_scene(thing, stuff)
        drawn.write_photo(folder / "images" / f"{number}.png", seed=seed + number, height=SIDE, width=SIDE)
        drawn.write_panoptic_png(folder / "panoptic" / f"{number}.png", scene)
        segments = [{"id": int(each), "category_id": int(each)} for each in np.unique(scene) if each]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(1, len(scenes) + 1)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    drawn.write_json(folder / "panoptic.json", content)
    return DatasetSpec(folder=folder).read()


def label_objects_only(dataset: GroundTruthDataset, kind: AnnotationKind) -> GroundTruthDataset:
    """The dataset with its objects alone, as masks or boxes."""

    def strip(image: GroundTruthImage) -> GroundTruthImage:
        objects = image.annotation.read(SIDE, SIDE).objects
        if kind == "boxes":
            objects = tuple(replace(each, rle=None) for each in objects)
        return replace(image, annotation=ObjectAnnotation(objects=objects))

    return replace(dataset, kind=kind, images=tuple(map(strip, dataset.images)))


def evaluate(
    predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig
) -> tuple[EvaluationReport, list[ClassMapping]]:
    """Evaluate in this process, as `useg eval` does."""
    check_mapping(predictor, dataset, config)
    return compute_report(evaluate_all(predictor, dataset), predictor, dataset, config)
