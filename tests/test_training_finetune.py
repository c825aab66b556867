import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch

from model.checkpoints.runs import load_run, read_run_info
from model.checkpoints.state_dicts import read_state_dict
from model.errors import ConfigError
from model.files import hash_file
from model.formats.png import encode_panoptic_png
from model.networks.mask_transformer import MaskDecoder
from training.data.dataset import PseudoLabelDataset, read_label_map
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluate import evaluate
from training.evaluation.image_results import hash_photo
from training.evaluation.matching.class_mapping import ClassMappingConfig
from training.evaluation.matching.mapping_file import read_mapping
from training.evaluation.predictors import load_predictor
from training.finetune import (
    finetune,
    ground_truth_mapping,
    load_finetune_start,
    sample_images,
    write_ground_truth_labels,
)
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.presets import finetune_config
from training.trainer.checkpoint import warm_start

RECIPE = replace(MASK_TRANSFORMER_PRESETS["tiny"], steps=2, learning_rate=1e-6)


@pytest.mark.parametrize(
    ("fraction", "steps"), [(0.005, 3600), (0.01, 3600), (0.03, 4500), (0.1, 9000), (0.5, 45_000), (1.0, 45_000)]
)
def test_the_published_number_of_steps_goes_with_the_share(fraction: float, steps: int) -> None:
    recipe = finetune_config(fraction, MASK_TRANSFORMER_PRESETS["cpu"])
    assert recipe.steps == steps
    assert (recipe.targets, recipe.doubt, recipe.drops_unknown, recipe.embeds) == ("merged", 0.0, False, False)


def test_a_run_is_taught_a_set_and_scored_on_what_it_did_not_see(tmp_path: Path, tiny_run: Path) -> None:
    folder = tiny.draw_truth(tmp_path / "set")
    truth = DatasetSpec(folder=folder).read()
    report = finetune(tiny_run, truth, 0.5, tmp_path / "run", RECIPE)
    assert (report.step, report.images) == (2, 2)

    card, network = load_run(tmp_path / "run")
    assert (card.network_config.thing_clusters, card.network_config.stuff_clusters) == (1, 1)
    start = card.provenance["start"]
    assert start["steps"] == read_run_info(tiny_run).step
    assert [name for name in start["drawn"] if "class_head" not in name and "semantic" not in name] == []
    before, after = read_state_dict(tiny_run / "decoder.safetensors"), network.decoder.state_dict()
    assert torch.allclose(before["queries"], after["queries"], atol=1e-4)  # two steps of 1e-6 away, not drawn anew

    names = read_mapping(Path(report.names))
    source = load_predictor(tmp_path / "run", threads=1)
    with pytest.raises(ConfigError, match="fitted on 2 of the 4 images"):
        evaluate(source, truth, ClassMappingConfig(mapping=names))
    unseen = tuple(each for each in truth.images if names.fitted_on.count_overlap([hash_photo(each)]) == 0)
    scored, _ = evaluate(source, replace(truth, images=unseen), ClassMappingConfig(mapping=names))
    assert scored.summary.images == 2
    assert not scored.summary.matching.evaluated_on_fit_set


def test_an_artifact_is_taught_with_the_encoder_that_it_was_made_with(
    tmp_path: Path, tiny_artifact: Path, tiny_encoder: Path
) -> None:
    truth = DatasetSpec(folder=tiny.draw_truth(tmp_path / "set")).read()
    report = finetune(tiny_artifact, truth, 0.5, tmp_path / "run", RECIPE, encoder=tiny_encoder)
    assert (report.step, report.images) == (2, 2)
    start = read_run_info(tmp_path / "run").provenance["start"]
    assert start["sha256"] == hash_file(tiny_artifact / "network.onnx")


def test_an_artifact_wants_its_own_encoder_and_a_run_none(
    tmp_path: Path, tiny_artifact: Path, tiny_run: Path, tiny_encoder: Path
) -> None:
    with pytest.raises(ConfigError, match="give the --encoder that it was made with"):
        load_finetune_start(tiny_artifact)
    with pytest.raises(ConfigError, match="is not the encoder of"):
        load_finetune_start(tiny_artifact, tiny_artifact / "network.onnx")
    with pytest.raises(ConfigError, match="has its encoder"):
        load_finetune_start(tiny_run, tiny_encoder)


def test_a_finished_finetuning_is_not_done_again(tmp_path: Path, tiny_run: Path) -> None:
    truth = DatasetSpec(folder=tiny.draw_truth(tmp_path / "set")).read()
    finetune(tiny_run, truth, 0.5, tmp_path / "run", RECIPE)
    written = (tmp_path / "run" / "decoder.safetensors").read_bytes()
    assert finetune(tiny_run, truth, 0.5, tmp_path / "run", RECIPE).step == 2
    assert (tmp_path / "run" / "decoder.safetensors").read_bytes() == written


def test_a_cascade_is_no_start(tmp_path: Path, tiny_cascade_run: Path) -> None:
    truth = DatasetSpec(folder=tiny.draw_truth(tmp_path / "set")).read()
    with pytest.raises(ConfigError, match="is a panoptic_cascade"):
        finetune(tiny_cascade_run, truth, 0.5, tmp_path / "run", RECIPE)


def test_a_run_with_few_parameters_in_common_is_no_start(tmp_path: Path, tiny_run: Path) -> None:
    shape = replace(read_run_info(tiny_run).shape, width=64)
    decoder = MaskDecoder(shape, tiny.SHAPE)
    with pytest.raises(ConfigError, match="not a start for it"):
        warm_start(decoder, "mask_transformer", tiny_run)


@pytest.fixture
def truth(tmp_path: Path) -> GroundTruthDataset:
    return DatasetSpec(folder=tiny.draw_truth(tmp_path / "set")).read()


def test_a_share_is_the_same_for_the_same_seed_and_never_empty(truth: GroundTruthDataset) -> None:
    assert [len(sample_images(truth, fraction, 0)) for fraction in (0.01, 0.25, 0.5, 1.0)] == [1, 1, 2, 4]
    assert sample_images(truth, 0.5, 3) == sample_images(truth, 0.5, 3)
    assert {sample_images(truth, 0.25, seed)[0].image_id for seed in range(20)} == {1, 2, 3, 4}


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_no_share_at_all_and_more_than_everything_are_refused(truth: GroundTruthDataset, fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction must lie above 0"):
        sample_images(truth, fraction, 0)


def test_categories_become_clusters_and_groups_become_void(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = tiny.draw_truth(tmp_path / "set")
    label_map = np.full((48, 64), 300, np.int32)
    label_map[:10], label_map[10:20], label_map[20:30, :8] = 7, 8, 0
    (folder / "panoptic" / "0.png").write_bytes(encode_panoptic_png(label_map))
    content = json.loads((folder / "panoptic.json").read_text())
    crowd = {"id": 8, "category_id": 17, "iscrowd": 1}
    content["annotations"][0]["segments_info"] = [*content["annotations"][0]["segments_info"], crowd]
    (folder / "panoptic.json").write_text(json.dumps(content))
    truth = DatasetSpec(folder=folder).read()

    store = PseudoLabelDataset(tmp_path / "store")
    photos = write_ground_truth_labels(truth, truth.images, tiny_encoder, tiny.SIDE_PX, store)

    stored = store.read_photos()
    assert [photo.name for photo in photos] == ["0.png", "1.png", "2.png", "3.png"]
    assert [photo.path for photo in stored] == [(folder / "images" / photo.name).resolve() for photo in photos]
    assert stored[0].categories == {1: 1, 2: 2}  # one thing, animal; then the stuff, wall
    assert np.array_equal(read_label_map(stored[0].label), np.select([label_map == 7, label_map == 300], [1, 2]))
    masks = store.read_instances()[photos[0].digest]
    assert [(mask["category_id"], mask["area"]) for mask in masks] == [(1, 640)]
    config = store.read_config()
    assert (config.thing_clusters, config.stuff_clusters, config.mask_source) == (1, 1, "ground-truth")
    assert config.data_source == "4 pictures of set, labelled by people"


def test_a_store_that_is_there_is_taken_as_it_is(tmp_path: Path, truth: GroundTruthDataset, tiny_encoder: Path) -> None:
    store = PseudoLabelDataset(tmp_path / "store")
    write_ground_truth_labels(truth, truth.images, tiny_encoder, tiny.SIDE_PX, store)
    written = store.read_photos()[0].label.stat().st_mtime_ns
    write_ground_truth_labels(truth, truth.images, tiny_encoder, tiny.SIDE_PX, store)
    assert store.read_photos()[0].label.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="photos_hash differ"):
        write_ground_truth_labels(truth, truth.images[:2], tiny_encoder, tiny.SIDE_PX, store)


def test_a_set_without_labels_for_every_pixel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "0.png"), np.zeros((4, 6, 3), np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 17, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0,
           "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]}  # fmt: skip
    content = {"images": [{"id": 1, "file_name": "0.png", "height": 4, "width": 6}], "annotations": [box],
               "categories": [{"id": 17, "name": "cat", "supercategory": "animal"}]}  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(content))
    truth = DatasetSpec(folder=tmp_path, format="instances").read()
    with pytest.raises(ConfigError, match="knows masks alone"):
        sample_images(truth, 1.0, 0)


def test_given_names_know_their_photos(tmp_path: Path, truth: GroundTruthDataset, tiny_encoder: Path) -> None:
    store = PseudoLabelDataset(tmp_path / "store")
    photos = write_ground_truth_labels(truth, truth.images[:2], tiny_encoder, tiny.SIDE_PX, store)
    names = ground_truth_mapping(truth, store, "ab")
    assert names.to_table().tolist() == [-1, 0, 1]
    assert [category.name for category in names.categories] == ["animal", "wall"]
    assert names.fitted_on.count_overlap([photo.digest for photo in photos]) == 2
