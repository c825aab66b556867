"""Fine-tuning on human labels."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fake_predictor import evaluate

from model.checkpoints.runs import load_run, read_run_info
from model.checkpoints.state_dicts import read_state_dict
from model.errors import ConfigError
from model.files import hash_file
from model.formats.image_files import encode_panoptic_png
from model.networks.mask_transformer import MaskDecoder
from training.data.dataset import PseudoLabelDataset, read_label_map
from training.evaluation.class_mapping import ClassMappingConfig, read_mapping
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.predictors import load_predictor
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, finetune_config
from training.train import finetune, load_finetune_source, sample_images, write_ground_truth_labels
from training.trainer.checkpoint import load_initial_weights

CONFIG = replace(MASK_TRANSFORMER_PRESETS["tiny"], max_steps=2, learning_rate=1e-6)


@pytest.fixture
def dataset(tmp_path: Path) -> GroundTruthDataset:
    return DatasetSpec(folder=tiny.draw_truth(tmp_path / "set")).read()


@pytest.mark.parametrize(
    ("fraction", "steps"), [(0.005, 3600), (0.01, 3600), (0.03, 4500), (0.1, 9000), (0.5, 45_000), (1.0, 45_000)]
)
def test_a_fraction_has_the_published_number_of_steps(fraction: float, steps: int) -> None:
    config = finetune_config(fraction, MASK_TRANSFORMER_PRESETS["cpu"])
    assert config.max_steps == steps
    assert (config.target_source, config.no_object_from_score) == ("panoptic", 0.0)
    assert not config.droploss


def test_a_fine_tuned_run_is_evaluated_on_images_that_it_was_not_trained_on(
    dataset: GroundTruthDataset, tmp_path: Path, tiny_run: Path
) -> None:
    report = finetune(tiny_run, dataset, 0.5, tmp_path / "run", CONFIG)
    assert (report.step, report.images) == (2, 2)

    info, network = load_run(tmp_path / "run")
    assert (info.network_config.thing_clusters, info.network_config.stuff_clusters) == (1, 1)
    initial = info.provenance["init_weights"]
    assert initial["steps"] == read_run_info(tiny_run).step
    reinitialized = initial["reinitialized"]
    assert [name for name in reinitialized if "class_head" not in name and "semantic" not in name] == []
    before, after = read_state_dict(tiny_run / "decoder.safetensors"), network.decoder.state_dict()
    assert torch.allclose(before["queries"], after["queries"], atol=1e-4)  # two steps of 1e-6 away

    mapping = read_mapping(Path(report.names))
    predictor = load_predictor(tmp_path / "run", threads=1)
    with pytest.raises(ConfigError, match="fitted on 2 of the 4 images"):
        evaluate(predictor, dataset, ClassMappingConfig(mapping=mapping))
    unseen = tuple(each for each in dataset.images if mapping.fitted_on.count_overlap([hash_file(each.path)]) == 0)
    evaluated, _ = evaluate(predictor, replace(dataset, images=unseen), ClassMappingConfig(mapping=mapping))
    assert evaluated.summary.images == 2
    assert not evaluated.summary.matching.evaluated_on_fit_set


def test_an_artifact_is_fine_tuned_with_its_own_encoder_file_and_a_run_with_none(
    dataset: GroundTruthDataset, tmp_path: Path, tiny_artifact: Path, tiny_run: Path, tiny_encoder: Path
) -> None:
    report = finetune(tiny_artifact, dataset, 0.5, tmp_path / "run", CONFIG, encoder=tiny_encoder)
    assert (report.step, report.images) == (2, 2)
    initial = read_run_info(tmp_path / "run").provenance["init_weights"]
    assert initial["sha256"] == hash_file(tiny_artifact / "network.onnx")
    with pytest.raises(ConfigError, match="pass the --encoder it was made with"):
        load_finetune_source(tiny_artifact)
    with pytest.raises(ConfigError, match="is not the encoder of"):
        load_finetune_source(tiny_artifact, tiny_artifact / "network.onnx")
    with pytest.raises(ConfigError, match="contains its encoder"):
        load_finetune_source(tiny_run, tiny_encoder)


def test_a_cascade_cannot_be_fine_tuned(dataset: GroundTruthDataset, tmp_path: Path, tiny_cascade_run: Path) -> None:
    with pytest.raises(ConfigError, match="is a panoptic_cascade"):
        finetune(tiny_cascade_run, dataset, 0.5, tmp_path / "run", CONFIG)


def test_initial_weights_with_few_matching_parameters_are_rejected(tmp_path: Path, tiny_run: Path) -> None:
    decoder = MaskDecoder(replace(read_run_info(tiny_run).network_config, hidden_dim=64), tiny.SHAPE)
    with pytest.raises(ConfigError, match="have the network's shapes"):
        load_initial_weights(decoder, "mask_transformer", tiny_run)


def test_the_sampled_images_depend_on_the_seed_and_are_at_least_one(dataset: GroundTruthDataset) -> None:
    assert [len(sample_images(dataset, fraction, 0)) for fraction in (0.01, 0.25, 0.5, 1.0)] == [1, 1, 2, 4]
    assert sample_images(dataset, 0.5, 3) == sample_images(dataset, 0.5, 3)
    assert {sample_images(dataset, 0.25, seed)[0].image_id for seed in range(20)} == {1, 2, 3, 4}
    for fraction in (0.0, -0.1, 1.01):
        with pytest.raises(ConfigError, match="fraction must be above 0"):
            sample_images(dataset, fraction, 0)
    with pytest.raises(ConfigError, match="has only boxes labels: fine-tuning needs panoptic labels or masks"):
        sample_images(replace(dataset, kind="boxes"), 1.0, 0)


def test_categories_become_clusters_and_crowds_become_void(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = tiny.draw_truth(tmp_path / "set")
    label_map = np.full((48, 64), 300, np.int32)
    label_map[:10], label_map[10:20], label_map[20:30, :8] = 7, 8, 0
    (folder / "panoptic" / "0.png").write_bytes(encode_panoptic_png(label_map))
    content = json.loads((folder / "panoptic.json").read_text())
    crowd = {"id": 8, "category_id": 17, "iscrowd": 1}
    content["annotations"][0]["segments_info"] = [*content["annotations"][0]["segments_info"], crowd]
    (folder / "panoptic.json").write_text(json.dumps(content))
    dataset = DatasetSpec(folder=folder).read()

    labels = PseudoLabelDataset(tmp_path / "labels")
    photos = write_ground_truth_labels(dataset, dataset.images, tiny_encoder, tiny.SIDE_PX, labels)

    stored = labels.read_photos()
    assert [photo.name for photo in photos] == ["0.png", "1.png", "2.png", "3.png"]
    assert [photo.path for photo in stored] == [(folder / "images" / photo.name).resolve() for photo in photos]
    assert stored[0].categories == {1: 1, 2: 2}  # one thing, animal; then the stuff, wall
    assert np.array_equal(read_label_map(stored[0].label), np.select([label_map == 7, label_map == 300], [1, 2]))
    masks = labels.read_instances()[photos[0].digest]
    assert [(mask["category_id"], mask["area"]) for mask in masks] == [(1, 640)]
    config = labels.read_config()
    assert (config.thing_clusters, config.stuff_clusters, config.mask_source) == (1, 1, "ground-truth")
    assert config.data_source == "4 images of set with human labels"


def test_instances_alone_give_a_network_without_stuff(tmp_path: Path, tiny_run: Path) -> None:
    # Four photos, each with a square and a part of it as another object, and a crowd in the last.
    photos = tiny.draw_photos(tmp_path / "set" / "images", count=4)
    outer, inner = [4, 4, 44, 4, 44, 44, 4, 44], [8, 8, 20, 8, 20, 20, 8, 20]
    content = {
        "images": [{"id": image, "file_name": path.name} for image, path in enumerate(sorted(photos.iterdir()))],
        "annotations": [
            {"image_id": image, "category_id": category, "segmentation": [polygon], "iscrowd": crowd}
            for image in range(4)
            for category, polygon, crowd in ((3, outer, 0), (8, inner, 0), (8, inner, image // 3))
        ],
        "categories": [{"id": 3, "name": "box"}, {"id": 8, "name": "lid"}],
    }
    (tmp_path / "set" / "labels.json").write_text(json.dumps(content))
    dataset = DatasetSpec(folder=tmp_path / "set").read()
    report = finetune(tiny_run, dataset, 0.5, tmp_path / "run", CONFIG)
    info, _ = load_run(tmp_path / "run")
    assert (info.network_config.thing_clusters, info.network_config.stuff_clusters) == (2, 0)
    first = PseudoLabelDataset(tmp_path / "run" / "annotations").read_photos()[0]
    label_map = read_label_map(first.label)
    assert [first.categories[int(label_map[row, row])] for row in (5, 10)] == [1, 2]  # small objects lie on top
    assert label_map[2, 2] == 0
    config = ClassMappingConfig(mapping=read_mapping(Path(report.names)), allow_overlap=True)
    evaluated, _ = evaluate(load_predictor(tmp_path / "run", threads=1), dataset, config)
    assert evaluated.summary.instance["named_mask"].headline["ap"].value >= 0.0
