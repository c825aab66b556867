import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from training.fitting.transformer.frame import show_all
from training.fitting.transformer.objects import WholeMasks, read_merged
from training.labels.store import LabelStore


def describe(mask: np.ndarray, cluster: int, **score: float) -> dict[str, object]:
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    return {"image_id": 1, "category_id": cluster, "segmentation": segmentation, **score}


def write_store(folder: Path, annotations: list[dict[str, object]]) -> LabelStore:
    images = [{"id": 1, "sha256": "a"}, {"id": 2, "sha256": "b"}]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return LabelStore(folder)


def test_whole_masks_overlap_and_come_best_first_with_their_scores_as_weights(tmp_path: Path) -> None:
    left, all_over, corner = (np.zeros((28, 56), bool) for _ in range(3))
    left[:, :28] = all_over[:] = corner[:4, :4] = True
    store = write_store(
        tmp_path, [describe(left, 2, score=0.5), describe(all_over, 3), describe(corner, 1, score=0.25)]
    )
    objects = WholeMasks.read(store, most=2).show("a", show_all(28, 56, 56))
    assert objects.clusters.tolist() == [3, 2]
    assert objects.weights.tolist() == [1.0, 0.5]
    assert objects.masks.sum((1, 2)).tolist() == [7 * 14, 7 * 7]
    assert objects.masks[1, :7, :7].all()


def test_a_score_above_one_weighs_one_and_a_mask_of_no_score_is_no_target(tmp_path: Path) -> None:
    mask = np.ones((28, 56), bool)
    store = write_store(tmp_path, [describe(mask, 1, score=8.5), describe(mask, 2, score=0.0)])
    masks = WholeMasks.read(store, most=5)
    assert masks.show("a", show_all(28, 56, 56)).weights.tolist() == [1.0]
    assert masks.list_clusters("a") == {1}


def test_a_photo_without_masks_has_no_objects(tmp_path: Path) -> None:
    masks = WholeMasks.read(write_store(tmp_path, []), most=5)
    assert masks.show("b", show_all(28, 56, 56)).masks.shape == (0, 14, 14)
    assert masks.list_clusters("b") == set()


def test_merged_objects_are_the_things_of_the_map_equally_sure() -> None:
    labels = np.array([[1, 1, 2], [0, 3, 2]], np.int32)
    objects = read_merged(labels, {1: 4, 2: 7, 3: 2}, thing_clusters=5)
    assert objects.clusters.tolist() == [4, 2]
    assert objects.masks.sum((1, 2)).tolist() == [2, 1]
    assert objects.weights.tolist() == [1.0, 1.0]
