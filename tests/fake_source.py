"""A source that answers what a test tells it, on labelled pictures that are drawn here."""

from pathlib import Path

import labelled_sets as drawn
import numpy as np
from jaxtyping import Int, UInt8

from model.formats.encoders import encode_rles
from model.postprocessing.masks import pack_mask
from model.postprocessing.panoptic import Segment, Segmentation
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.image_results import hash_photo
from training.evaluation.predictors import ClusterMap, ImagePrediction, PredictedObject

SIDE = 40
CATEGORIES = [
    {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": 3, "name": "car", "supercategory": "vehicle", "isthing": 1},
    {"id": 171, "name": "wall-brick", "supercategory": "wall", "isthing": 0},
    {"id": 187, "name": "sky-other", "supercategory": "sky", "isthing": 0},
]
ANIMAL, VEHICLE, SKY, WALL = range(4)
"""Places of the supercategories, things first."""


class ToldSource:
    """Two thing clusters and three stuff clusters; the answer to each photo is a map of clusters."""

    title = "told"
    digest = "d" * 64
    thing_clusters = 2
    stuff_clusters = 3

    def __init__(
        self, truth: GroundTruthDataset, maps: list[Int[np.ndarray, "H W"]], scores: list[float] | None = None
    ) -> None:
        digests = [hash_photo(picture) for picture in truth.images]
        self._maps = dict(zip(digests, maps, strict=True))
        self._scores = dict(zip(digests, scores or [0.9] * len(maps), strict=True))
        self.asked = 0

    def answer(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        """Each cluster's region is one segment, and one detection if it is a thing."""
        self.asked += 1
        label_map = self._maps[photo_digest].astype(np.int32)
        shown = ClusterMap(
            label_map=label_map, clusters={int(each): int(each) for each in np.unique(label_map) if each}
        )
        things = [each for each in shown.clusters if each <= self.thing_clusters]
        score = self._scores[photo_digest]
        crops = [crop for each in things if (crop := pack_mask(label_map == each))]
        segments = tuple(Segment(id=each, cluster=each, is_thing=True, score=score) for each in things)
        outlines = encode_rles(Segmentation(label_map=label_map, segments=segments, masks=tuple(crops)))
        detections = tuple(
            PredictedObject(cluster=each, score=score, outline=outline)
            for each, outline in zip(things, outlines if things else [], strict=True)
        )
        return ImagePrediction(panoptic=shown, semantic=shown, detections=detections)


def draw_scene(thing: int, stuff: int) -> Int[np.ndarray, "H W"]:
    """A square of 20 in a corner, and what is around it."""
    plane = np.full((SIDE, SIDE), stuff)
    plane[:20, :20] = thing
    return plane


def draw_set(folder: Path, scenes: list[Int[np.ndarray, "H W"]], *, seed: int = 0) -> GroundTruthDataset:
    """A labelled set of our own layout; the scenes hold COCO's category ids."""
    annotations = []
    for number, scene in enumerate(scenes, start=1):
        drawn.write_photo(folder / "images" / f"{number}.png", seed=seed + number, height=SIDE, width=SIDE)
        drawn.write_panoptic_png(folder / "panoptic" / f"{number}.png", scene)
        segments = [{"id": int(each), "category_id": int(each)} for each in np.unique(scene) if each]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(1, len(scenes) + 1)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    drawn.write_json(folder / "panoptic.json", content)
    return DatasetSpec(folder=folder).read()
