from dataclasses import replace
from pathlib import Path
from typing import Any

import labelled_sets as drawn
import numpy as np
import pytest
from fake_source import ANIMAL, CATEGORIES, SIDE, SKY, VEHICLE, WALL, ToldSource, draw_scene, draw_set

from model.errors import ConfigError
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluate import evaluate, fit_mapping
from training.evaluation.matching.auxiliary_set import count_auxiliary, translate_dataset
from training.evaluation.matching.class_mapping import MatchingConfig
from training.evaluation.matching.cluster_matching import UNMATCHED, VoteThresholds

CAT, CAR, WALL_ID, SKY_ID = 17, 3, 171, 187
BUS = {"id": 6, "name": "bus", "supercategory": "vehicle"}
KITE = {"id": 38, "name": "kite", "supercategory": "sports"}
SQUARE = [[0, 0, 20, 0, 20, 20, 0, 20]]


def draw_objects(folder: Path, entries: list[dict[str, Any]], categories: list[dict[str, Any]]) -> GroundTruthDataset:
    """An instance set of one picture."""
    drawn.write_photo(folder / "images" / "1.png", seed=90, height=SIDE, width=SIDE)
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 1, "iscrowd": 0, **each} for each in entries],
        "categories": categories,
    }
    drawn.write_json(folder / "instances.json", content)
    return DatasetSpec(folder=folder, layout="instances").read()


@pytest.fixture
def scored(tmp_path: Path) -> GroundTruthDataset:
    """Cats before walls; no vehicle in either half."""
    return draw_set(tmp_path / "scored", [draw_scene(CAT, WALL_ID)] * 4)


def test_objects_of_another_set_name_a_thing_cluster_that_the_scored_set_never_showed(
    scored: GroundTruthDataset, tmp_path: Path
) -> None:
    witnesses = draw_objects(tmp_path / "more", [{"category_id": 6, "segmentation": SQUARE, "area": 400}], [BUS])
    source = ToldSource(scored, [draw_scene(1, 3)] * 4)
    told = ToldSource(witnesses, [draw_scene(2, 4)])
    heard = count_auxiliary(told, witnesses, scored, VoteThresholds())
    alone = fit_mapping(source, scored, MatchingConfig()).make_table()
    together = fit_mapping(source, scored, MatchingConfig(witnesses=heard))
    assert alone.tolist() == [UNMATCHED, ANIMAL, UNMATCHED, WALL, UNMATCHED, UNMATCHED]
    assert together.make_table().tolist() == [UNMATCHED, ANIMAL, VEHICLE, WALL, UNMATCHED, UNMATCHED]
    assert together.fitted_on.images == 5
    assert together.fitted_on.truth == "scored; more, instances"


def test_what_is_scored_says_who_helped_and_counts_them_in_each_half(tmp_path: Path) -> None:
    # Pictures in turn: the half that names the others' car saw none, the witnesses did.
    truth = draw_set(tmp_path / "set", [draw_scene(CAR, SKY_ID), draw_scene(CAT, WALL_ID)])
    more = draw_set(tmp_path / "more", [draw_scene(CAR, SKY_ID), draw_scene(CAT, WALL_ID)], seed=50)
    maps = [draw_scene(2, 4), draw_scene(1, 3)]
    heard = count_auxiliary(ToldSource(more, maps), more, truth, VoteThresholds())
    source = ToldSource(truth, maps)
    alone, _ = evaluate(source, truth, MatchingConfig())
    helped, fit = evaluate(source, truth, MatchingConfig(witnesses=heard))
    assert (alone.summary.panoptic["pq"].value, helped.summary.panoptic["pq"].value) == (0.0, 100.0)
    assert not fit.evaluated_on_fit_set
    assert helped.summary.matching.fitted_on.endswith(", with 2 pictures of more")


def test_a_picture_that_is_scored_cannot_help(scored: GroundTruthDataset) -> None:
    source = ToldSource(scored, [draw_scene(1, 3)] * 4)
    heard = count_auxiliary(source, scored, scored, VoteThresholds())
    with pytest.raises(ConfigError, match="4 of the pictures that help"):
        evaluate(source, scored, MatchingConfig(witnesses=heard))
    with pytest.raises(ConfigError, match="leave them out"):
        fit_mapping(source, scored, MatchingConfig(witnesses=heard))


def test_small_objects_are_painted_over_large_ones_and_strange_categories_are_void(
    scored: GroundTruthDataset, tmp_path: Path
) -> None:
    inner = [[5, 5, 10, 5, 10, 10, 5, 10]]
    entries = [
        {"category_id": 38, "segmentation": inner, "area": 25},
        {"category_id": 6, "segmentation": inner, "area": 25},
        {"category_id": 17, "segmentation": SQUARE, "area": 400},
    ]
    witnesses = draw_objects(tmp_path / "more", entries, [CATEGORIES[0], BUS, KITE])
    labels = translate_dataset(witnesses, scored.taxonomy).images[0].annotation.read(SIDE, SIDE)
    assert labels.label_map is not None
    kinds = {segment: (labels.label_map == segment).sum() for segment in labels.segments}
    assert {labels.segments[each]: count for each, count in kinds.items()} == {ANIMAL: 375, VEHICLE: 25}
    assert np.count_nonzero(labels.label_map) == 400


def test_a_crowd_names_nothing(scored: GroundTruthDataset, tmp_path: Path) -> None:
    entry = {"category_id": 6, "segmentation": SQUARE, "area": 400, "iscrowd": 1}
    witnesses = draw_objects(tmp_path / "more", [entry], [BUS])
    heard = count_auxiliary(ToldSource(witnesses, [draw_scene(2, 4)]), witnesses, scored, VoteThresholds())
    assert not heard.tables.panoptic.any()


def test_stuff_of_a_panoptic_set_goes_by_name_and_never_to_a_thing(scored: GroundTruthDataset) -> None:
    others = replace(scored.taxonomy, names=("wall", "sky", "animal", "vehicle"), things=2)
    with pytest.raises(ConfigError, match="no category in common"):
        translate_dataset(scored, others)
    turned = replace(scored.taxonomy, names=("vehicle", "animal", "wall", "sky"))
    labels = translate_dataset(scored, turned).images[0].annotation.read(SIDE, SIDE)
    assert set(labels.segments.values()) == {1, 2}
    assert {scored.taxonomy.names[place] for place in (ANIMAL, VEHICLE, SKY, WALL)} == set(turned.names)


def test_boxes_alone_cannot_name_pixels(scored: GroundTruthDataset) -> None:
    with pytest.raises(ConfigError, match="boxes alone"):
        translate_dataset(replace(scored, kind="boxes"), scored.taxonomy)
