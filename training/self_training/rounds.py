"""A round of self-training: a fitted run labels the photos that it learned from anew, for another fit."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoints.runs import WEIGHT_FILES, load_run
from model.errors import ConfigError, LabelStoreError, TrainingError
from model.files import atomic_write, hash_file
from model.networks.mask_transformer import MaskDecoder, MaskTransformer
from model.networks.vit import VisionTransformer
from training.data.dataset import INSTANCES_FILE, LabeledPhoto, PseudoLabelDataset
from training.data.features import FeatureCache, open_cache
from training.data.label_config import PseudoLabelConfig
from training.data.photos import PhotoFile
from training.progress import track
from training.self_training.pseudo_label_update import ClassMaxScores, PseudoLabelUpdater
from training.self_training.teacher import predict_views
from training.self_training.tta_merge import (
    TeacherPredictions,
    TtaConsistency,
    measure_consistency,
    merge_views,
    read_teacher_predictions,
)
from training.trainer.loggers import append_losses, plot_losses

TEACHER_FILE = "teacher.json"
_MEASURED_PHOTOS = 256
_TOLERANCE = 0.005
"""A fall of the mean over so many photos that may be chance."""


@dataclass(frozen=True, kw_only=True)
class SelfTrainingConfig:
    """How sure a teacher must be."""

    share: float = 0.5
    """Of the best score of an object's cluster that an object needs in the first round to be in the panoptic map."""
    rise: float = 0.05
    """What the share grows by each round."""
    zooms: bool = False
    """Let the encoder look at windows of each photo anew, for what is small in it: some 3 core-s a photo, not 0.4."""
    is_forced: bool = False
    """Label even if the teacher is less steady than the one before."""

    def __post_init__(self) -> None:
        for name in ("share", "rise"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What a store says of the run that labelled it."""

    round: int
    """Counted from 1."""
    weights: str
    """Hash of the run's."""
    labels: str
    """Hash of the masks that it learned from."""
    share: float
    steadiness: TtaConsistency


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What came of a round."""

    round: int
    steadiness: TtaConsistency
    before: TtaConsistency | None
    """Of the run that labelled what this one learned from, if one did."""
    is_accepted: bool
    """Whether the run is as steady as that."""
    photos: int
    """Labelled anew."""
    found: int
    """Objects of the run's own in their panoptic maps."""


def relabel(
    run: Path, store: PseudoLabelDataset, features: Path, out: PseudoLabelDataset | None, plan: SelfTrainingConfig
) -> RoundReport:
    """Fill the store `out` with what a run finds in the photos of `store`, which it learned from.

    In the manner of CutLER and CUPS, with two differences: in the panoptic map objects are held to a share of their
    cluster's best score, as CUPS has it for pixels, not to an absolute one; and the masks to learn from are all that
    were found, by their scores.
    Killed at any moment, the same call goes on. Without `out` the run is only measured: the test of a last round.
    Raises TrainingError if the run is less steady than the one that labelled `store`, unless that is forced, and
    ConfigError if it does not fit the store.
    """
    network, config = _open(run, store)
    known = read_teacher_info(store)
    teaching = TeacherInfo(
        round=known.round + 1 if known else 1,
        weights=hash_file(run / WEIGHT_FILES["mask_transformer"]),
        labels=hash_file(store.folder / INSTANCES_FILE),
        share=min(1.0, plan.share + plan.rise * (known.round if known else 0)),
        steadiness=known.steadiness if known else TtaConsistency(flip=0.0, scale=0.0, covered=0.0),
    )
    if out is not None:
        suffix = " zoomed" if plan.zooms else ""
        out.lock_config(
            replace(config, teacher_hash=f"{teaching.weights} at {teaching.share:g} on {teaching.labels}{suffix}")
        )
    photos = store.read_photos()
    cache = open_cache(features, config.encoder_hash, config.side_px)
    finder = _Finder(
        decoder=network.decoder,
        encoder=network.encoder if plan.zooms else None,
        cache=cache,
        folder=out.folder / "findings" if out else None,
    )
    steadiness = TtaConsistency.average(
        [finder.find(photo).steadiness for photo in track(_spread(photos), "steadiness")]
    )
    falls = steadiness.list_falls(known.steadiness, _TOLERANCE) if known else []
    if falls and out is not None and not plan.is_forced:
        raise TrainingError(f"{run} is no better a teacher than the last ({', '.join(falls)}): keep that, or force it")
    teaching = replace(teaching, steadiness=steadiness)
    found = 0 if out is None else _fill(out, store, photos, finder, teaching)
    return RoundReport(
        round=teaching.round,
        steadiness=steadiness,
        before=known.steadiness if known else None,
        is_accepted=not falls,
        photos=len(photos) if out else 0,
        found=found,
    )


def read_teacher_info(store: PseudoLabelDataset) -> TeacherInfo | None:
    """None if no run labelled the store. Raises LabelStoreError if the file is broken."""
    path = store.folder / TEACHER_FILE
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return TeacherInfo(**{**content, "steadiness": TtaConsistency(**content["steadiness"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabelStoreError(f"{path} does not tell of a teacher: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Finder:
    """A teacher that writes down what it finds."""

    decoder: MaskDecoder
    encoder: VisionTransformer | None
    """Looks at windows anew, for what is kept."""
    cache: FeatureCache
    folder: Path | None
    """None: nothing is kept."""

    def find(self, photo: LabeledPhoto) -> TeacherPredictions:
        path = self.folder / f"{photo.digest}.npz" if self.folder else None
        if path and path.is_file():
            return read_teacher_predictions(path)
        whole, views = predict_views(self.decoder, photo, self.cache)
        steadiness, size = measure_consistency(views), whole.letterbox
        if path and self.encoder:
            _, views = predict_views(self.decoder, photo, self.cache, self.encoder)
        findings = TeacherPredictions(
            found=merge_views(views), steadiness=steadiness, height=size.height, width=size.width
        )
        if path is None:
            return findings
        findings.write(path)
        return read_teacher_predictions(path)  # rounded, as a later run will read it


def _open(run: Path, store: PseudoLabelDataset) -> tuple[MaskTransformer, PseudoLabelConfig]:
    card, network = load_run(run)
    if not isinstance(network, MaskTransformer):
        raise ConfigError(f"{run} is a {card.network}: only a mask_transformer teaches itself")
    config, shape = store.read_config(), network.decoder.config
    fits = {
        "encoder": hash_file(run / card.encoder_file) == config.encoder_hash,
        "size": shape.side_px == config.side_px,
        "thing clusters": shape.thing_clusters == config.thing_clusters,
        "stuff clusters": shape.stuff_clusters == config.stuff_clusters,
    }
    if wrong := [name for name, does_fit in fits.items() if not does_fit]:
        raise ConfigError(f"{run} has another {', '.join(wrong)} than {store.folder}: give the store it learned from")
    return network, config


def _spread(photos: Sequence[LabeledPhoto]) -> list[LabeledPhoto]:
    count = min(_MEASURED_PHOTOS, len(photos))
    return [photos[place * len(photos) // count] for place in range(count)]


def _fill(
    out: PseudoLabelDataset,
    store: PseudoLabelDataset,
    photos: Sequence[LabeledPhoto],
    finder: _Finder,
    teaching: TeacherInfo,
) -> int:
    """The labels of all photos; how many masks of them are the teacher's."""
    config = out.read_config()
    files = [_describe(photo, finder.find(photo), Path(config.photos)) for photo in track(photos, "views")]
    stored = {photo.digest: photo for photo in photos}

    def read(photo: PhotoFile) -> TeacherPredictions:
        return finder.find(stored[photo.digest])

    relabeller = PseudoLabelUpdater(
        read=read,
        old_masks=store.read_instances(),
        maxima=ClassMaxScores.survey(
            (read(each).found for each in files), config.thing_clusters, config.stuff_clusters
        ),
        share=teaching.share,
        side_px=config.side_px,
        thing_clusters=config.thing_clusters,
    )
    dependencies = {"teacher": config.teacher_hash}
    out.write_labels(config, files, dependencies, relabeller.label)
    for path in (path for path in (store.codebook, store.projections) if path.exists()):
        with atomic_write(out.folder / path.name) as sibling:
            shutil.copyfile(path, sibling)
    with atomic_write(out.folder / TEACHER_FILE) as sibling:
        sibling.write_text(json.dumps(asdict(teaching), indent=2) + "\n")
    return sum(relabeller.count_sure(read(each).found) for each in files)


def _describe(photo: LabeledPhoto, findings: TeacherPredictions, folder: Path) -> PhotoFile:
    name = photo.path.relative_to(folder).as_posix()
    return PhotoFile(path=photo.path, name=name, digest=photo.digest, height=findings.height, width=findings.width)


ROUNDS_FILE = "rounds.csv"
PICTURE_FILE = "rounds.png"
_STEADINESS = ("flip", "scale", "covered")


def plot_rounds(results: Sequence[Path], out: Path) -> list[dict[str, float]]:
    """The figures of each round, from 0 on, which are also written to `out` and drawn there.

    `results` are what `useg-train eval` or `useg-train relabel` said of each round's run, in their order. Raises
    ConfigError for a file that is neither, or if they are of both kinds.
    """
    figures = [_read_figures(path) for path in results]
    if len({tuple(each) for each in figures}) != 1:
        raise ConfigError("results of one kind are drawn together: of `eval` on one set, or of `relabel`")
    table = out / ROUNDS_FILE
    table.unlink(missing_ok=True)
    for number, each in enumerate(figures):
        append_losses(table, number, each)
    plot_losses(table, out / PICTURE_FILE, "the score of each round of self-training")
    return figures


def _read_figures(path: Path) -> dict[str, float]:
    """PQ, mIoU and AP as far as they are there, in percent; or the steadiness, as shares."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if "steadiness" in content:
            return {name: float(content["steadiness"][name]) for name in _STEADINESS}
        figures = {"PQ": content["panoptic"].get("pq"), "mIoU": content["semantic"].get("miou")}
        figures |= {"AP": content["instance"].get("agnostic_mask", {"headline": {}})["headline"].get("ap")}
        return {name: float(each["value"]) for name, each in figures.items() if each}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no result of `useg-train eval` or `relabel`: {error!r}") from error
