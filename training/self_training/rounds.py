"""A round of self-training: a trained run makes new labels for its own training photos, for the next run."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.checkpoints.runs import WEIGHT_FILES, load_run
from model.errors import ConfigError, DatasetError, TrainingError
from model.files import atomic_write, hash_file
from model.networks.mask_transformer import MaskDecoder, MaskTransformer
from model.progress import track
from model.validation import parse_versioned_json, to_versioned_json
from training.data.dataset import INSTANCES_FILE, PseudoLabelDataset
from training.data.features import FeatureCache, open_cache
from training.data.label_config import PseudoLabelConfig
from training.data.photos import PhotoFile, spread
from training.self_training.config import SelfTrainingConfig
from training.self_training.pseudo_label_update import PseudoLabelUpdater, compute_thresholds
from training.self_training.teacher import predict_views
from training.self_training.tta_merge import TeacherPredictions, TtaConsistency, merge_views

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
    teacher = _Teacher(
        decoder=network.decoder,
        cache=open_cache(features, labels.encoder_hash, labels.side_px),
        folder=out.folder / _PREDICTIONS_FOLDER if out else None,
    )
    tested = [teacher.predict(photo).consistency for photo in track(spread(photos, _TEST_PHOTOS), "consistency")]
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
        instances=0 if out is None else _write_labels(out, dataset, photos, teacher, info),
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


@dataclass(frozen=True, kw_only=True)
class _Teacher:
    """Predicts photos, and stores the predictions."""

    decoder: MaskDecoder
    cache: FeatureCache
    folder: Path | None
    """None: predictions are not stored."""

    def predict(self, photo: PhotoFile) -> TeacherPredictions:
        """Return the stored predictions for a photo, or compute them."""
        path = self.folder / f"{photo.digest}.npz" if self.folder else None
        if path is None or not path.is_file():
            predictions = merge_views(predict_views(self.decoder, photo, self.cache))
            if path is None:
                return predictions
            predictions.write(path)
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
    teacher: _Teacher,
    info: TeacherInfo,
) -> int:
    """Write the labels of all photos; return the number of things in the panoptic maps."""
    config = out.read_config()
    min_scores, min_stuff_probs = compute_thresholds(
        (teacher.predict(photo) for photo in track(photos, "views")),
        info.min_relative_score,
        config.thing_clusters,
        config.stuff_clusters,
    )
    updater = PseudoLabelUpdater(
        predict=teacher.predict,
        old_instances=dataset.read_instances(),
        min_scores=min_scores,
        min_stuff_probs=min_stuff_probs,
        side_px=config.side_px,
    )
    records = out.write_labels(config, photos, {"teacher": config.teacher_hash}, updater.make_label)
    for path in (path for path in (dataset.codebook, dataset.projections) if path.exists()):
        with atomic_write(out.folder / path.name) as sibling:
            shutil.copyfile(path, sibling)
    with atomic_write(out.folder / TEACHER_FILE) as sibling:
        sibling.write_text(to_versioned_json(info, FORMAT_VERSION))
    return sum(record.count_things(config.thing_clusters) for record in records)
