import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from model.errors import ConfigError, LabelStoreError
from model.images import read_image
from training.data.dataset import PseudoLabelDataset, read_label_map
from training.evaluation.predictors import load_predictor


def test_a_run_answers_as_the_artifact_that_was_made_of_it(
    tiny_run: Path, tiny_artifact: Path, tiny_photos: Path
) -> None:
    run, artifact = load_predictor(tiny_run, threads=1), load_predictor(tiny_artifact, threads=1)
    assert (run.thing_clusters, run.stuff_clusters) == (artifact.thing_clusters, artifact.stuff_clusters) == (3, 4)
    assert run.digest != artifact.digest
    image = read_image(tiny_photos / "3.png").image
    first, second = run.answer(image, ""), artifact.answer(image, "")
    assert first.semantic.label_map.shape == second.semantic.label_map.shape == image.shape[:2]
    # Only the artifact's thresholds were chosen, which its best detection does not feel; its weights went through fp16.
    assert first.detections[0].score == pytest.approx(second.detections[0].score, abs=1e-2)
    assert first.detections[0].cluster == second.detections[0].cluster


def test_a_store_answers_with_its_labels_and_its_whole_masks(tiny_store: PseudoLabelDataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_store.folder, tmp_path / "store"))
    photo = tiny_store.read_photos()[2]
    content = json.loads((folder / "instances.json").read_text())
    (number,) = (image["id"] for image in content["images"] if image["sha256"] == photo.digest)
    masks = [mask for mask in content["annotations"] if mask["image_id"] == number]
    content["annotations"] += [{**mask, "id": 1000 + index, "score": 0.25} for index, mask in enumerate(masks)]
    (folder / "instances.json").write_text(json.dumps(content))

    answer = load_predictor(folder, threads=1).answer(read_image(photo.path).image, photo.digest)
    assert np.array_equal(answer.panoptic.label_map, read_label_map(photo.label))
    assert answer.panoptic.clusters == photo.categories
    assert masks
    scores = [mask["score"] for mask in masks]
    assert [each.score for each in answer.detections] == scores + [0.25] * len(masks)
    assert [each.cluster for each in answer.detections] == [mask["category_id"] for mask in masks] * 2
    assert [each.outline.counts for each in answer.detections] == [mask["segmentation"]["counts"] for mask in masks] * 2


def test_a_photo_that_a_store_has_no_label_for_is_refused(tiny_store: PseudoLabelDataset) -> None:
    source = load_predictor(tiny_store.folder, threads=1)
    with pytest.raises(LabelStoreError, match="has no label for the photo eeeeeeeeeeee"):
        source.answer(np.zeros((4, 4, 3), np.uint8), "e" * 64)


def test_a_folder_that_is_nothing_of_ours_or_two_things_is_refused(
    tmp_path: Path, tiny_run: Path, tiny_store: PseudoLabelDataset
) -> None:
    with pytest.raises(ConfigError, match=r"holds none of contract\.json, run\.json, label\.json"):
        load_predictor(tmp_path, threads=1)
    for file in (tiny_run / "run.json", tiny_store.folder / "label.json"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ConfigError, match=r"holds run\.json and label\.json"):
        load_predictor(tmp_path, threads=1)
