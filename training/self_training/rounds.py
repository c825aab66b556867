"""A round of self-training: a trained run makes new labels for its own training photos, for the next run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32
from pycocotools import mask as coco

from model.checkpoints.runs import WEIGHT_FILES, load_run
from model.contract import InputSize
from model.errors import ConfigError, DatasetError, TrainingError
from model.files import hash_file, replace_file
from model.images import Letterbox, plan_letterbox, resize_labels, resize_map
from model.networks.mask_transformer import MASK_STRIDE_PX, MaskDecoder, MaskTransformer
from model.progress import track
from model.validation import parse_versioned_json, to_versioned_json
from training.data.dataset import INSTANCES_FILE, PseudoLabelDataset
from training.data.features import FeatureCache, open_cache
from training.data.label_config import PseudoLabelConfig
from training.data.panoptic_labels import ImageLabel, merge_panoptic, remove_overlaps
from training.data.photos import PhotoFile, spread
from training.self_training.teacher import THRESHOLDS, TeacherPredictions, TtaConsistency, merge_views, predict_views
from training.trainer.config import SelfTrainingConfig

MIN_RELATIVE_STUFF_PROB = 0.5
"""Pixels below this fraction of their stuff cluster's maximum probability become void (CUPS)."""
_SAME_MASK_IOU = 0.5
"""An old mask with this IoU with a predicted one is dropped (CutLER)."""
_OLD_SCORE_FACTOR = 0.25
"""Factor of the score of old masks that the teacher did not find."""
TEACHER_FILE = "teacher.json"
FORMAT_VERSION = 2
_PREDICTIONS_FOLDER = "teacher-predictions"
_TEST_PHOTOS = 256
"""Photos that the consistency is measured on."""
_TOLERANCE = 0.005
"""A smaller drop of a mean over so many photos may be chance."""


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """Description of the run that made a dataset's labels."""

    round: int
    """Counted from 1."""
    weights_sha256: str
    """Hash of the run's weights."""
    labels_sha256: str
    """Hash of the instance labels that the run was trained on."""
    min_relative_score: float
    """Minimum relative score of this round."""
    consistency: TtaConsistency


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """Result of a round."""

    round: int
    consistency: TtaConsistency
    previous_consistency: TtaConsistency | None
    """Consistency of the run that made this run's labels; None in the first round."""
    is_accepted: bool
    """Whether the run is at least as consistent as the previous one."""
    photos: int
    """Photos with new labels; 0 without `--out`."""
    instances: int
    """Things in the new panoptic maps."""


def relabel(
    run: Path, dataset: PseudoLabelDataset, features: Path, out: PseudoLabelDataset | None, config: SelfTrainingConfig
) -> RoundReport:
    """Fill the dataset `out` with the predictions of a run for the photos of `dataset`, which it was trained on.

    As in CutLER and CUPS, with two differences: scores in the panoptic map are relative to the maximum of the class,
    as CUPS has it for pixels, instead of absolute; and all predicted masks become instance labels, with their scores.
    A killed call can be repeated to continue. Without `out` the consistency is measured only.
    Raises TrainingError if the run is less consistent than the one that labeled `dataset`, unless forced, and
    ConfigError if the run does not match the dataset.
    """
    network, labels = _load_teacher(run, dataset)
    previous = read_teacher_info(dataset)
    previous_round = previous.round if previous else 0
    min_relative_score = min(1.0, config.min_relative_score + config.score_increment * previous_round)
    weights_sha256 = hash_file(run / WEIGHT_FILES["mask_transformer"])
    labels_sha256 = hash_file(dataset.folder / INSTANCES_FILE)
    if out is not None:
        teacher_hash = f"{weights_sha256} at {min_relative_score:g} on {labels_sha256}"
        out.lock_config(replace(labels, teacher_hash=teacher_hash))
    photos = dataset.read_photos()
    cache = open_cache(features, labels.encoder_hash, labels.side_px)
    predict = partial(_predict, network.decoder, cache, out.folder / _PREDICTIONS_FOLDER if out else None)
    tested = [predict(photo).consistency for photo in track(spread(photos, _TEST_PHOTOS), "consistency")]
    info = TeacherInfo(
        round=previous_round + 1,
        weights_sha256=weights_sha256,
        labels_sha256=labels_sha256,
        min_relative_score=min_relative_score,
        consistency=TtaConsistency.average(tested),
    )
    drops = info.consistency.list_drops(previous.consistency, _TOLERANCE) if previous else []
    if drops and out is not None and not config.force:
        raise TrainingError(f"{run} is less consistent than the previous teacher ({', '.join(drops)}); see --force")
    return RoundReport(
        round=info.round,
        consistency=info.consistency,
        previous_consistency=previous.consistency if previous else None,
        is_accepted=not drops,
        photos=len(photos) if out else 0,
        instances=0 if out is None else _write_labels(out, dataset, photos, predict, info),
    )


def read_teacher_info(dataset: PseudoLabelDataset) -> TeacherInfo | None:
    """Return the teacher of a dataset; None if its labels are not a run's.

    Raises DatasetError if the file is invalid or has another format version.
    """
    path = dataset.folder / TEACHER_FILE
    if not path.exists():
        return None
    try:
        return parse_versioned_json(TeacherInfo, path.read_bytes(), FORMAT_VERSION, ": run `useg self-train` again")
    except (OSError, ConfigError) as error:
        raise DatasetError(f"{path} is not a description of a teacher: {error}") from error


def _predict(decoder: MaskDecoder, cache: FeatureCache, folder: Path | None, photo: PhotoFile) -> TeacherPredictions:
    """Return the stored predictions for a photo, or compute and store them; without a folder they are not stored."""
    if folder is None:
        return merge_views(predict_views(decoder, photo, cache))
    path = folder / f"{photo.digest}.npz"
    if not path.is_file():
        merge_views(predict_views(decoder, photo, cache)).write(path)
    return TeacherPredictions.read(path)  # with the rounding of the stored file


def _load_teacher(run: Path, dataset: PseudoLabelDataset) -> tuple[MaskTransformer, PseudoLabelConfig]:
    info, network = load_run(run)
    if not isinstance(network, MaskTransformer):
        raise ConfigError(f"{run} is a {info.network}: self-training needs a mask_transformer")
    labels, decoder_config = dataset.read_config(), network.decoder.config
    matches = {
        "encoder": hash_file(run / info.encoder_file) == labels.encoder_hash,
        "input size": decoder_config.side_px == labels.side_px,
        "thing clusters": decoder_config.thing_clusters == labels.thing_clusters,
        "stuff clusters": decoder_config.stuff_clusters == labels.stuff_clusters,
    }
    if wrong := [name for name, is_same in matches.items() if not is_same]:
        raise ConfigError(f"{run} and {dataset.folder} differ in {', '.join(wrong)}: pass the labels of its training")
    return network, labels


def _write_labels(
    out: PseudoLabelDataset,
    dataset: PseudoLabelDataset,
    photos: Sequence[PhotoFile],
    predict: Callable[[PhotoFile], TeacherPredictions],
    info: TeacherInfo,
) -> int:
    """Write the labels of all photos; return the number of things in the panoptic maps."""
    config = out.read_config()
    min_scores, min_stuff_probs = compute_thresholds(
        map(predict, track(photos, "views")),
        info.min_relative_score,
        config.thing_clusters,
        config.stuff_clusters,
    )
    updater = PseudoLabelUpdater(
        predict=predict,
        old_instances=dataset.read_instances(),
        min_scores=min_scores,
        min_stuff_probs=min_stuff_probs,
        side_px=config.side_px,
    )
    records = out.write_labels(config, photos, {"teacher": config.teacher_hash}, updater.make_label)
    for path in (path for path in (dataset.codebook, dataset.projections) if path.exists()):
        replace_file(out.folder / path.name, path.read_bytes())
    replace_file(out.folder / TEACHER_FILE, to_versioned_json(info, FORMAT_VERSION))
    return sum(record.count_things(config.thing_clusters) for record in records)


def compute_thresholds(
    predictions: Iterable[TeacherPredictions], min_relative_score: float, thing_clusters: int, stuff_clusters: int
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "S+1"]]:
    """Return the minimum score of each thing cluster and the minimum probability of each semantic class.

    Both are fractions of the teacher's maximum for the class over all photos.
    """
    things, stuff = np.zeros(thing_clusters), np.zeros(stuff_clusters + 1)
    for each in predictions:
        np.maximum.at(things, each.clusters - 1, each.scores)
        np.maximum.at(stuff, each.semantic.ravel(), each.semantic_probs.ravel())
    return min_relative_score * things, MIN_RELATIVE_STUFF_PROB * stuff


@dataclass(frozen=True, kw_only=True)
class PseudoLabelUpdater:
    """Makes the new labels of a round."""

    predict: Callable[[PhotoFile], TeacherPredictions]
    old_instances: Mapping[str, list[dict[str, Any]]]
    """COCO annotations by the photo's hash."""
    min_scores: Float[np.ndarray, "K"]
    """Minimum score of an instance in the panoptic map, by thing cluster."""
    min_stuff_probs: Float[np.ndarray, "S+1"]
    side_px: int

    def make_label(self, photo: PhotoFile) -> ImageLabel:
        """Return all predicted instances with their scores, followed by old masks that were not found.

        The panoptic map gets the predicted instances of high score and, below them, the old masks that it had before.
        """
        predicted = self.predict(photo)
        letterbox = plan_letterbox(photo.height, photo.width, [InputSize.square(self.side_px)], MASK_STRIDE_PX)
        masks, kept = _upsample_masks(predicted, letterbox)
        is_confident = predicted.scores >= self.min_scores[predicted.clusters - 1]
        clusters, scores = predicted.clusters[kept].tolist(), predicted.scores[kept].tolist()
        old = self._find_missed(masks, self.old_instances[photo.digest])
        if old:
            decoded = coco.decode([each["segmentation"] for each in old]).transpose(2, 0, 1).astype(bool)
            masks = np.concatenate([masks, decoded])
        clusters += [each["category_id"] for each in old]
        scores += [_OLD_SCORE_FACTOR * min(1.0, float(each.get("score", 1.0))) for each in old]
        was_in_panoptic = np.array([bool(each.get("in_panoptic", 1)) for each in old], bool)
        is_candidate = np.concatenate([is_confident[kept], was_in_panoptic])
        visible = remove_overlaps(masks & is_candidate[:, None, None])
        return ImageLabel(
            panoptic=merge_panoptic(visible, clusters, self._stuff_map(predicted, letterbox), len(self.min_scores)),
            masks=masks,
            things=clusters,
            scores=scores,
            is_in_panoptic=[bool(mask.any()) for mask in visible],
        )

    def _find_missed(self, masks: Bool[np.ndarray, "N H W"], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the old annotations that match no predicted mask."""
        if not len(masks) or not old:
            return old
        encoded = [coco.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
        ious = coco.iou([each["segmentation"] for each in old], encoded, [0] * len(encoded))
        return [each for each, best in zip(old, np.array(ious).max(1), strict=True) if best < _SAME_MASK_IOU]

    def _stuff_map(self, predicted: TeacherPredictions, letterbox: Letterbox) -> Int32[np.ndarray, "H W"]:
        is_confident = predicted.semantic_probs >= self.min_stuff_probs[predicted.semantic]
        stuff = np.where(is_confident, predicted.semantic, 0).astype(np.int32)
        return resize_labels(_crop_photo(stuff, letterbox), letterbox.height, letterbox.width)


def _upsample_masks(
    predicted: TeacherPredictions, letterbox: Letterbox
) -> tuple[Bool[np.ndarray, "n H W"], Int[np.ndarray, "n"]]:
    """Return the masks that are not empty at the photo's size, and their indices."""
    maps = [_crop_photo(each, letterbox) for each in predicted.mask_probs]
    masks = [resize_map(each, letterbox.height, letterbox.width) > THRESHOLDS.mask_threshold for each in maps]
    kept = np.array([index for index, mask in enumerate(masks) if mask.any()], np.int64)
    return np.array([masks[index] for index in kept], bool).reshape(-1, letterbox.height, letterbox.width), kept


def _crop_photo(values: np.ndarray, letterbox: Letterbox) -> np.ndarray:
    """Remove the padding of a map."""
    return np.ascontiguousarray(values[: letterbox.map_height, : letterbox.map_width])
