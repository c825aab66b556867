"""Overlaps of label maps, and matching of clusters to categories, against the reference implementations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import labeled_datasets as drawn
import numpy as np
import pytest
from fake_predictor import (
    ANIMAL_INDEX,
    CAR,
    CAT,
    CATEGORIES,
    SIDE,
    SKY,
    SKY_INDEX,
    VEHICLE_INDEX,
    WALL,
    WALL_INDEX,
    FakePredictor,
    draw_dataset,
    draw_scene,
    evaluate,
    predict_scenes,
)

from model.contract import InputSize
from model.embeddings import Category
from model.errors import ConfigError
from model.files import hash_file
from model.formats.coco import Rle
from model.images import plan_letterbox
from model.postprocessing.panoptic import PatchEmbeddings
from training.evaluation.class_mapping import (
    ClassMappingConfig,
    ClusterAssignment,
    ClusterMapping,
    fingerprint_photos,
    fit_mapping,
    read_mapping,
)
from training.evaluation.cluster_matching import (
    UNMATCHED,
    AuxiliarySpec,
    MatchingConfig,
    MatchingMethod,
    find_stuff_votes,
    find_thing_votes,
    match_block,
    match_clusters,
    translate_dataset,
)
from training.evaluation.dataset_metrics import compare_predictors
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthObject
from training.evaluation.overlap import (
    OverlapMatrix,
    SemanticCounts,
    compute_overlap,
    count_semantic,
    iou_per_class,
    merge_ground_truth_stuff,
    semantic_quality,
)
from training.evaluation.predictors import ImagePrediction, PredictedObject

PREDICTED = np.array([[5, 5, 9, 9], [5, 5, 9, 0]], np.int32)
GROUND_TRUTH = np.array([[1, 1, 1, 2], [3, 3, 2, 2]], np.int32)


def test_ground_truth_stuff_of_a_category_becomes_one_segment_and_things_stay_separate() -> None:
    overlap = compute_overlap(PREDICTED, {5: 1, 9: 2}, GROUND_TRUTH, {1: 0, 2: 1, 3: 1})
    assert merge_ground_truth_stuff(overlap, num_things=1).pixels.tolist() == [[0, 0, 1], [0, 2, 2], [0, 1, 2]]
    assert merge_ground_truth_stuff(overlap, num_things=2).pixels.shape == (3, 4)


@pytest.mark.golden
def test_thing_votes_equal_u2segs(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "things_votes.json").read_text())
    index = {int(source): index for source, index in stored["dataset_id_to_contiguous_id"].items()}
    clusters = stored["num_clusters"]
    config = MatchingConfig(min_score=stored["score_threshold"], min_iou=stored["iou_threshold"])
    counts = np.zeros((clusters + 1, len(index)), np.int64)
    for image in {each["image_id"] for each in stored["predictions"]}:
        detections = [
            PredictedObject(
                cluster=each["category_id"] + 1,
                score=each["score"],
                rle=Rle(size=(0, 0), counts="", area=0, bbox=each["bbox"]),
            )
            for each in stored["predictions"]
            if each["image_id"] == image
        ]
        objects = [
            GroundTruthObject(category=index[each["category_id"]], bbox=each["bbox"], area=0, is_crowd=False, rle=None)
            for each in stored["gt"]
            if each["image_id"] == image
        ]
        np.add.at(counts, find_thing_votes(detections, objects, config), 1)
    assert counts[1:].tolist() == stored["votes"]
    assert match_clusters(counts, clusters, len(index), "votes")[1:].tolist() == [
        stored["mapping"][str(each)] for each in range(clusters)
    ]


@pytest.mark.golden
def test_stuff_votes_and_metrics_equal_u2segs_without_its_chained_mapping(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "stuff_votes.json").read_text())
    with np.load(golden / "mapping" / "stuff_votes.npz") as arrays:
        ground_truth, predicted, votes, lut = (arrays[key] for key in ("gt", "pred", "votes", "lut"))
    # Class 0 is "things" on both sides, class 16 of the ground truth is void; segment ids here are class + 1.
    categories = {each + 1: each for each in range(16)}
    clusters = {each + 1: each for each in range(28)}
    overlaps = [
        compute_overlap(p.astype(np.int32) + 1, clusters, t.astype(np.int32) + 1, categories)
        for p, t in zip(predicted, ground_truth, strict=True)
    ]
    config = MatchingConfig(min_stuff_iou=stored["iou_threshold"])
    table = np.zeros((28, 16), np.int64)
    for overlap in overlaps:
        np.add.at(table, find_stuff_votes(overlap, 0, 1, config), 1)
    assert np.array_equal(table[1:, 1:], votes[1:, 1:16])
    matched = match_clusters(table, 0, 1, "votes")
    assert matched[1:].tolist() == [-1 if each == stored["void_id"] else each for each in lut[1:]]

    matched[0] = 0
    counts = [count_semantic(replace(each, predicted=matched[each.predicted]), 16) for each in overlaps]
    summed = SemanticCounts(*map(sum, zip(*counts, strict=True)))
    for key, ignore_unmapped in (
        ("scores_published_rule_unmapped_dropped", True),
        ("scores_unmapped_counted_as_errors", False),
    ):
        scores = semantic_quality(summed, ignore_unmapped=ignore_unmapped)
        assert 100 * scores["accuracy"] == pytest.approx(stored[key]["pACC"], abs=1e-9)
        assert 100 * scores["miou"] == pytest.approx(stored[key]["mIoU"], abs=1e-9)
        assert 100 * iou_per_class(summed, ignore_unmapped=ignore_unmapped) == pytest.approx(
            np.array(stored[key]["IoU"]), abs=1e-9
        )


@pytest.mark.golden
def test_assignments_equal_cups(golden: Path) -> None:
    stored = json.loads((golden / "mapping" / "cups.json").read_text())
    with np.load(golden / "mapping" / "cups_confusion.npz") as arrays:
        tables = dict(arrays)
    for case in stored:
        table = tables[case["name"]]
        whole = [(list(range(case["num_clusters"])), list(range(case["num_classes"])))]
        split = [(case["things_prototype"], case["things"]), (case["stuffs_prototype"], case["stuffs"])]
        method: MatchingMethod = "hungarian" if case["one_to_one"] else "cups"
        expected = [UNMATCHED if each == 255 else each for each in case["assignment"]]
        assert match_blocks(table, split if case["things_prototype"] else whole, method) == expected, case["name"]
        unsplit = [UNMATCHED if each == 255 else each for each in case["assignment_no_separation"]]
        assert match_blocks(table, whole, method) == unsplit, case["name"]
        # CUPS treats pixels of unmatched clusters as void predictions, which do not count.
        overlap = OverlapMatrix(
            pixels=np.pad(table, ((1, 0), (1, 0))),
            predicted=np.array(unsplit),
            ground_truth=np.arange(table.shape[1]),
            is_crowd=np.zeros(table.shape[1], bool),
        )
        scores = semantic_quality(count_semantic(overlap, table.shape[1]), ignore_unmapped=case["one_to_one"])
        assert scores == pytest.approx({"miou": case["miou"], "accuracy": case["acc"]}, abs=1e-9), case["name"]


def match_blocks(table: np.ndarray, blocks: list[tuple[list[int], list[int]]], method: MatchingMethod) -> list[int]:
    found = np.full(len(table), UNMATCHED)
    for rows, columns in blocks:
        local = match_block(table[np.ix_(rows, columns)], method)
        found[rows] = np.where(local == UNMATCHED, UNMATCHED, np.array(columns)[local])
    return found.tolist()


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
    assert mapping.to_class_mapping().panoptic.tolist() == [-1, 0, -1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1, this release reads 3: run `useg match` again"),
        ({"methd": "votes"}, "did you mean 'method'"),
        ({"clusters": {"9": {"category": 1, "purity": 1, "support": 1}}}, r"clusters \[9\] do not fit"),
        ({"clusters": {"1": {"category": 8, "purity": 1, "support": 1}}}, r"clusters \[1\] do not fit"),
    ],
)
def test_an_invalid_mapping_is_rejected_with_its_path(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "mapping.json"
    MAPPING.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"(?s)mapping\.json is not a mapping file: .*{message}"):
        read_mapping(path)
    with pytest.raises(ConfigError, match=r"missing\.json is not a mapping file"):
        read_mapping(tmp_path / "missing.json")


BUS = {"id": 6, "name": "bus", "supercategory": "vehicle"}
KITE = {"id": 38, "name": "kite", "supercategory": "sports"}
SQUARE = {"segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]], "area": 400}
INNER = {"segmentation": [[5, 5, 10, 5, 10, 10, 5, 10]], "area": 25}


def draw_objects(folder: Path, entries: list[dict[str, Any]]) -> GroundTruthDataset:
    """An instance dataset of one image."""
    drawn.write_photo(folder / "images" / "1.png", seed=90, height=SIDE, width=SIDE)
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 1, "iscrowd": 0, **entry} for entry in entries],
        "categories": [CATEGORIES[0], BUS, KITE],
    }
    drawn.write_json(folder / "instances.json", content)
    return DatasetSpec(folder=folder).read()


def join(dataset: GroundTruthDataset, other: GroundTruthDataset) -> GroundTruthDataset:
    """Return a dataset for a fake predictor that knows the images of both."""
    return replace(dataset, images=(*dataset.images, *other.images))


@pytest.fixture
def dataset(tmp_path: Path) -> GroundTruthDataset:
    """Cats in front of walls; no vehicle."""
    return draw_dataset(tmp_path / "set", [(CAT, WALL)] * 4)


@pytest.mark.parametrize("is_crowd", [False, True])
def test_auxiliary_objects_match_a_cluster_that_the_dataset_does_not_have(
    dataset: GroundTruthDataset, tmp_path: Path, is_crowd: bool
) -> None:
    objects = draw_objects(tmp_path / "aux", [{"category_id": 6, "iscrowd": int(is_crowd), **SQUARE}])
    config = ClassMappingConfig(auxiliary=AuxiliarySpec(aux_dataset=tmp_path / "aux").read(dataset))
    mapping = fit_mapping(predict_scenes(join(dataset, objects), [*[(1, 3)] * 4, (2, 4)]), dataset, config)
    vehicle = UNMATCHED if is_crowd else VEHICLE_INDEX
    assert mapping.to_class_mapping().panoptic.tolist() == [
        UNMATCHED,
        ANIMAL_INDEX,
        vehicle,
        WALL_INDEX,
        UNMATCHED,
        UNMATCHED,
    ]
    assert (mapping.fitted_on.images, mapping.fitted_on.dataset) == (5, "set; aux, instances")


def test_auxiliary_images_count_in_each_fold_and_are_reported(tmp_path: Path) -> None:
    # With one image per fold, the other fold has neither its categories nor its clusters; the auxiliary images do.
    dataset = draw_dataset(tmp_path / "set", [(CAR, SKY), (CAT, WALL)])
    other = draw_dataset(tmp_path / "aux", [(CAR, SKY), (CAT, WALL)], seed=50)
    scenes = [(2, 4), (1, 3)]
    predictor = predict_scenes(join(dataset, other), scenes * 2)
    alone, _ = evaluate(predictor, dataset, ClassMappingConfig())
    config = ClassMappingConfig(auxiliary=other)
    helped, _ = evaluate(predictor, dataset, config)
    assert (alone.summary.panoptic["pq"].value, helped.summary.panoptic["pq"].value) == (0.0, 100.0)
    assert not helped.summary.matching.evaluated_on_fit_set
    assert helped.summary.matching.fitted_on.endswith(", with 2 images of aux")
    assert compare_predictors(predictor, predictor, dataset, config)["PQ"].new == 100.0


def test_auxiliary_objects_are_drawn_small_over_large_and_other_categories_are_void(
    dataset: GroundTruthDataset, tmp_path: Path
) -> None:
    entries = [{"category_id": 38, **INNER}, {"category_id": 6, **INNER}, {"category_id": 17, **SQUARE}]
    auxiliary = draw_objects(tmp_path / "aux", entries)
    labels = translate_dataset(auxiliary, dataset.taxonomy).images[0].annotation.read(SIDE, SIDE)
    assert labels.label_map is not None
    areas = {labels.segments[segment]: (labels.label_map == segment).sum() for segment in labels.segments}
    assert areas == {ANIMAL_INDEX: 375, VEHICLE_INDEX: 25}
    assert np.count_nonzero(labels.label_map) == 400


def test_auxiliary_images_are_others_in_categories_of_the_same_name_and_never_from_stuff_to_things(
    dataset: GroundTruthDataset, tmp_path: Path
) -> None:
    exchanged = replace(dataset.taxonomy, names=("wall", "sky", "animal", "vehicle"))
    with pytest.raises(ConfigError, match="no category in common"):
        translate_dataset(dataset, exchanged)
    reordered = replace(dataset.taxonomy, names=("vehicle", "animal", "wall", "sky"))
    labels = translate_dataset(dataset, reordered).images[0].annotation.read(SIDE, SIDE)
    assert set(labels.segments.values()) == {1, 2}
    assert dataset.taxonomy.names[SKY_INDEX] == reordered.names[3]
    with pytest.raises(ConfigError, match="has only boxes: auxiliary images need masks"):
        translate_dataset(replace(dataset, kind="boxes"), dataset.taxonomy)
    with pytest.raises(ConfigError, match="4 auxiliary images are images of the dataset itself"):
        AuxiliarySpec(aux_dataset=tmp_path / "set").read(dataset)


class EmbeddedPredictor(FakePredictor):
    """Predicts the same clusters for every scene; only embeddings tell its categories apart."""

    def __init__(self, dataset: GroundTruthDataset, scenes: list[tuple[int, int]]) -> None:
        super().__init__(dataset, [draw_scene(1, 3)] * len(scenes))
        self._scenes = dict(zip([hash_file(image.path) for image in dataset.images], scenes, strict=True))

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

    mapping = fit_mapping(predictor, dataset, ClassMappingConfig())
    assert mapping.examples is not None
    assert mapping.examples.counts == (2, 2, 2, 2)
    mapping.write(tmp_path / "mapping.json")
    assert read_mapping(tmp_path / "mapping.json") == mapping
    other = draw_dataset(tmp_path / "other", scenes, seed=9)
    config = ClassMappingConfig(mapping=mapping)
    assert evaluate(EmbeddedPredictor(other, scenes), other, config)[0].summary.panoptic["pq"].value == 100.0

    joint_predictor = EmbeddedPredictor(join(dataset, other), scenes * 2)
    helped = fit_mapping(joint_predictor, dataset, ClassMappingConfig(auxiliary=other))
    assert helped.examples is not None
    assert helped.examples.counts == (4, 4, 4, 4)
