"""Mapping files, auxiliary images, and matching by the embeddings of labeled regions."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import labeled_datasets as drawn
import numpy as np
import pytest
import tiny
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
    draw_dataset,
    predict_scenes,
)

from model.contract import Category
from model.errors import ConfigError
from training.data.dataset import PseudoLabelDataset
from training.data.label_config import CodebookConfig
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluate import evaluate, fit_mapping
from training.evaluation.matching.auxiliary_set import count_auxiliary, translate_dataset
from training.evaluation.matching.class_mapping import ClassMappingConfig
from training.evaluation.matching.cluster_matching import UNMATCHED, MatchingConfig
from training.evaluation.matching.mapping_file import (
    ClusterAssignment,
    ClusterMapping,
    fingerprint_photos,
    read_mapping,
)
from training.evaluation.matching.prototypes import (
    Prototype,
    match_by_regions,
    match_prototypes,
    mean_prototypes,
    sample_regions,
)
from training.pseudo_labels.codebook import Codebook, load_codebook, smooth_with_masks
from training.pseudo_labels.maskcut import MaskProposals

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


@pytest.mark.parametrize("mapping", [MAPPING, replace(MAPPING, matching=None, method="prototypes")])
def test_a_mapping_is_read_as_it_was_written(tmp_path: Path, mapping: ClusterMapping) -> None:
    mapping.write(tmp_path / "mapping.json")
    assert read_mapping(tmp_path / "mapping.json") == mapping
    assert mapping.to_table().tolist() == [-1, 0, -1, 1]


def test_photos_are_recognized_in_any_order() -> None:
    assert MAPPING.fitted_on.count_overlap(["b" * 64, "d" * 64]) == 1
    assert fingerprint_photos("set, val", DIGESTS[::-1]) == MAPPING.fitted_on
    assert fingerprint_photos("set, val", ["a" * 64]).sha256 != MAPPING.fitted_on.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1, this release reads 2: run `useg match` again"),
        ({"methd": "votes"}, "did you mean 'method'"),
        ({"method": "greedy"}, "method"),
        ({"clusters": {"9": {"category": 1, "purity": 1, "support": 1}}}, r"clusters \[9\] do not fit"),
        ({"clusters": {"1": {"category": 8, "purity": 1, "support": 1}}}, r"clusters \[1\] do not fit"),
        ({"matching": {"method": "votes", "min_score": 2}}, "min_score"),
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


BUS = {"id": 6, "name": "bus", "supercategory": "vehicle"}
KITE = {"id": 38, "name": "kite", "supercategory": "sports"}
SQUARE = [[0, 0, 20, 0, 20, 20, 0, 20]]


def draw_objects(folder: Path, entries: list[dict[str, Any]], categories: list[dict[str, Any]]) -> GroundTruthDataset:
    """An instance dataset of one image."""
    drawn.write_photo(folder / "images" / "1.png", seed=90, height=SIDE, width=SIDE)
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 1, "iscrowd": 0, **entry} for entry in entries],
        "categories": categories,
    }
    drawn.write_json(folder / "instances.json", content)
    return DatasetSpec(folder=folder, format="instances").read()


@pytest.fixture
def dataset(tmp_path: Path) -> GroundTruthDataset:
    """Cats in front of walls; no vehicle."""
    return draw_dataset(tmp_path / "set", [(CAT, WALL)] * 4)


def test_auxiliary_objects_match_a_cluster_that_the_dataset_does_not_have(
    dataset: GroundTruthDataset, tmp_path: Path
) -> None:
    auxiliary = draw_objects(tmp_path / "aux", [{"category_id": 6, "segmentation": SQUARE, "area": 400}], [BUS])
    predictor = predict_scenes(dataset, [(1, 3)] * 4)
    counts = count_auxiliary(predict_scenes(auxiliary, [(2, 4)]), auxiliary, dataset, MatchingConfig())
    alone = fit_mapping(predictor, dataset, ClassMappingConfig())
    together = fit_mapping(predictor, dataset, ClassMappingConfig(auxiliary=counts))
    assert alone.to_table().tolist() == [UNMATCHED, ANIMAL_INDEX, UNMATCHED, WALL_INDEX, UNMATCHED, UNMATCHED]
    assert together.to_table().tolist() == [UNMATCHED, ANIMAL_INDEX, VEHICLE_INDEX, WALL_INDEX, UNMATCHED, UNMATCHED]
    assert together.fitted_on.images == 5
    assert together.fitted_on.dataset == "set; aux, instances"


def test_auxiliary_images_count_in_each_fold_and_are_reported(tmp_path: Path) -> None:
    # With one image per fold, the other fold has neither its categories nor its clusters; the auxiliary images do.
    dataset = draw_dataset(tmp_path / "set", [(CAR, SKY), (CAT, WALL)])
    auxiliary = draw_dataset(tmp_path / "aux", [(CAR, SKY), (CAT, WALL)], seed=50)
    scenes = [(2, 4), (1, 3)]
    counts = count_auxiliary(predict_scenes(auxiliary, scenes), auxiliary, dataset, MatchingConfig())
    predictor = predict_scenes(dataset, scenes)
    alone, _ = evaluate(predictor, dataset, ClassMappingConfig())
    helped, mapping = evaluate(predictor, dataset, ClassMappingConfig(auxiliary=counts))
    assert (alone.summary.panoptic["pq"].value, helped.summary.panoptic["pq"].value) == (0.0, 100.0)
    assert not mapping.evaluated_on_fit_set
    assert helped.summary.matching.fitted_on.endswith(", with 2 images of aux")


def test_an_evaluated_image_cannot_be_auxiliary(dataset: GroundTruthDataset) -> None:
    predictor = predict_scenes(dataset, [(1, 3)] * 4)
    counts = count_auxiliary(predictor, dataset, dataset, MatchingConfig())
    for function in (evaluate, fit_mapping):
        with pytest.raises(ConfigError, match="4 auxiliary images are images of the dataset itself"):
            function(predictor, dataset, ClassMappingConfig(auxiliary=counts))


def test_auxiliary_objects_are_drawn_small_over_large_and_other_categories_are_void(
    dataset: GroundTruthDataset, tmp_path: Path
) -> None:
    inner = [[5, 5, 10, 5, 10, 10, 5, 10]]
    entries = [
        {"category_id": 38, "segmentation": inner, "area": 25},
        {"category_id": 6, "segmentation": inner, "area": 25},
        {"category_id": 17, "segmentation": SQUARE, "area": 400},
    ]
    auxiliary = draw_objects(tmp_path / "aux", entries, [CATEGORIES[0], BUS, KITE])
    labels = translate_dataset(auxiliary, dataset.taxonomy).images[0].annotation.read(SIDE, SIDE)
    assert labels.label_map is not None
    areas = {labels.segments[segment]: (labels.label_map == segment).sum() for segment in labels.segments}
    assert areas == {ANIMAL_INDEX: 375, VEHICLE_INDEX: 25}
    assert np.count_nonzero(labels.label_map) == 400


def test_an_auxiliary_crowd_does_not_count(dataset: GroundTruthDataset, tmp_path: Path) -> None:
    entry = {"category_id": 6, "segmentation": SQUARE, "area": 400, "iscrowd": 1}
    auxiliary = draw_objects(tmp_path / "aux", [entry], [BUS])
    counts = count_auxiliary(predict_scenes(auxiliary, [(2, 4)]), auxiliary, dataset, MatchingConfig())
    assert not counts.counts.panoptic.any()


def test_auxiliary_categories_are_translated_by_name_and_never_from_stuff_to_things(
    dataset: GroundTruthDataset,
) -> None:
    exchanged = replace(dataset.taxonomy, names=("wall", "sky", "animal", "vehicle"), num_things=2)
    with pytest.raises(ConfigError, match="no category in common"):
        translate_dataset(dataset, exchanged)
    reordered = replace(dataset.taxonomy, names=("vehicle", "animal", "wall", "sky"))
    labels = translate_dataset(dataset, reordered).images[0].annotation.read(SIDE, SIDE)
    assert set(labels.segments.values()) == {1, 2}
    assert dataset.taxonomy.names[SKY_INDEX] == reordered.names[3]


def test_auxiliary_boxes_are_rejected(dataset: GroundTruthDataset) -> None:
    with pytest.raises(ConfigError, match="has only boxes: auxiliary images need masks"):
        translate_dataset(replace(dataset, kind="boxes"), dataset.taxonomy)


RIGHT, UP = np.array([1.0, 0.0]), np.array([0.0, 1.0])


@pytest.fixture
def labeled(tmp_path: Path) -> GroundTruthDataset:
    return DatasetSpec(folder=tiny.draw_truth(tmp_path / "labeled")).read()


def make_codebook(things: list[np.ndarray], stuff: list[np.ndarray]) -> Codebook:
    return Codebook(
        config=CodebookConfig(encoder_hash=""),
        mean=np.zeros(2),
        projection=np.eye(2),
        stuff_in_masks=np.zeros(len(stuff)),
        thing_centroids=np.array(things),
        stuff_centroids=np.array(stuff),
    )


def test_a_prototype_is_the_mean_direction_of_its_regions() -> None:
    prototypes = mean_prototypes([3, 5, 3], [RIGHT, UP, UP])
    assert sorted(prototypes) == [3, 5]
    assert prototypes[3].regions == 2
    assert np.allclose(prototypes[3].vector, math.sqrt(0.5))
    assert np.array_equal(prototypes[5].vector, UP)


def test_a_cluster_takes_the_nearest_category_of_its_kind_unless_all_are_dissimilar() -> None:
    codebook = make_codebook(
        [np.array([0.8, 0.6]), np.array([-0.6, -0.8])], [np.array([0.6, 0.8]), np.array([0.0, -1.0])]
    )
    prototypes = {
        0: Prototype(vector=RIGHT, regions=2),
        1: Prototype(vector=UP, regions=1),
        2: Prototype(vector=RIGHT, regions=4),  # stuff, since there are two things
    }
    assignments = match_prototypes(codebook, prototypes, num_things=2)
    assert [(each.category, each.purity, each.support) for each in assignments.values()] == [
        (1, 0.8, 2), (None, 0.0, 0), (3, 0.6, 4), (3, 0.0, 4),
    ]  # fmt: skip


def test_stuff_stays_unmatched_if_only_things_have_prototypes() -> None:
    assignments = match_prototypes(make_codebook([RIGHT], [RIGHT]), {0: Prototype(vector=RIGHT, regions=1)}, 1)
    assert [each.category for each in assignments.values()] == [1, None]


def test_regions_are_sampled_from_categories_in_turn_once_per_image(labeled: GroundTruthDataset) -> None:
    regions = sample_regions(labeled, 3, seed=0)
    assert [region.category for region in regions] == [0, 1, 0]
    assert regions[0].photo.digest != regions[2].photo.digest
    assert all(region.mask.any() for region in regions)
    assert len(sample_regions(labeled, 100, seed=0)) == 8
    with pytest.raises(ConfigError, match="has only boxes"):
        sample_regions(replace(labeled, kind="boxes"), 3, seed=0)


def test_the_clusters_of_pseudo_labels_are_matched_by_regions(
    tmp_path: Path, labeled: GroundTruthDataset, tiny_store: PseudoLabelDataset
) -> None:
    mapping = match_by_regions(tiny_store, labeled, 4, 0, tmp_path / "features")
    assert (mapping.thing_clusters, mapping.stuff_clusters, mapping.method) == (3, 4, "prototypes")
    assert {mapping.clusters[each].category for each in (1, 2, 3)} <= {1, None}
    assert {mapping.clusters[each].category for each in (4, 5, 6, 7)} <= {2, None}
    assert any(assignment.category for assignment in mapping.clusters.values())
    digests = {region.photo.digest for region in sample_regions(labeled, 4, 0)}
    assert mapping.fitted_on.images == len(digests) == mapping.fitted_on.count_overlap(digests)


def copy_with_stuff(labels: PseudoLabelDataset, folder: Path, stuff: str) -> PseudoLabelDataset:
    """The same pseudo-labels, with a codebook that names another stuff method."""
    copied = PseudoLabelDataset(Path(shutil.copytree(labels.folder, folder)))
    codebook = load_codebook(copied.codebook)
    replace(codebook, config=replace(codebook.config, stuff=stuff)).save(copied.codebook)  # type: ignore[arg-type]
    return copied


def test_clusters_of_region_stuff_are_matched_like_those_of_patches(
    tmp_path: Path, labeled: GroundTruthDataset, tiny_store: PseudoLabelDataset
) -> None:
    regions, patches = (
        match_by_regions(labels, labeled, 4, 0, tmp_path / "features")
        for labels in (copy_with_stuff(tiny_store, tmp_path / "regions", "regions"), tiny_store)
    )
    assert regions.clusters == patches.clusters


def test_clusters_of_stego_cannot_be_matched_by_regions(
    tmp_path: Path, labeled: GroundTruthDataset, tiny_store: PseudoLabelDataset
) -> None:
    with pytest.raises(ConfigError, match="stuff by regions or kmeans"):
        match_by_regions(copy_with_stuff(tiny_store, tmp_path / "stego", "stego"), labeled, 4, 0, tmp_path)


def test_patches_blended_with_their_own_region_keep_its_mean_direction() -> None:
    tokens = np.random.default_rng(0).normal(size=(4, 4, 8)) + 1.0
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    mask = np.zeros((1, 4, 4))
    mask[0, :2] = 1.0
    blended = smooth_with_masks(tokens, MaskProposals(soft=mask, scores=np.ones(1)))[:2].mean((0, 1))
    plain = tokens[:2].mean((0, 1))
    assert blended @ plain / np.linalg.norm(blended) / np.linalg.norm(plain) > 0.995
