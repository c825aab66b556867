"""An artifact held against labelled pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pycocotools import mask as coco

from model.contract import Contract
from model.panoptic import Segmentation, assemble
from model.pixels import Placement, place, restore
from model.runtime import Raw, open_session
from training.matching import match_by_majority
from training.overlap import Overlap, measure_overlap, merge_true_stuff, rename_predicted
from training.photos import read_photo
from training.progress import show
from training.scores import (
    Interval,
    MaskAp,
    bootstrap,
    count_confusion,
    count_panoptic,
    score_panoptic,
    score_semantic,
)
from training.truth import Truth, TruthPicture, read_truth

_LEAST_SCORE = 0.01
_DRAWS = 1000
_AP_DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured, in percent, with 95 % bootstrap intervals over the pictures."""

    pictures: int
    protocol: str
    panoptic: dict[str, Interval]
    semantic: dict[str, Interval]
    instance: dict[str, Interval]
    unmatched_clusters: int


PROTOCOL = (
    "27 supercategories (12 things, 15 stuff); clusters matched by pixel majority, things and stuff apart, fitted on "
    "the even pictures and scored on the odd ones and the other way round; unmatched clusters are void in PQ and wrong "
    "in mIoU; instance: class-agnostic mask AP against the things of the panoptic truth"
)


def evaluate(artifact: Path, truth_folder: Path, *, threads: int) -> Report:
    """Scores of an artifact on a labelled set in COCO's panoptic format."""
    contract, session = open_session(artifact, threads=threads)
    truth = read_truth(truth_folder)
    panoptic: list[Overlap] = []
    semantic: list[Overlap] = []
    results: list[dict[str, Any]] = []
    for picture in show(truth.pictures, "evaluate", unit="picture"):
        image = read_photo(picture.path).image
        pixels, placement = place(image, contract.side_px, contract.stride_px)
        raw = session.run(pixels[None])[0]
        for answer, kept in (
            (assemble(raw, placement, contract, "panoptic", contract.thresholds), panoptic),
            (assemble(raw, placement, contract, "semantic", contract.thresholds), semantic),
        ):
            kept.append(_compare(answer, picture, truth))
        results += _list_instances(raw, placement, picture.image_id)
    renamed_panoptic, unmatched = _rename_folds(panoptic, contract, truth)
    renamed_semantic, _ = _rename_folds(semantic, contract, truth)
    return Report(
        pictures=len(truth.pictures),
        protocol=PROTOCOL,
        panoptic=_score_panoptic(renamed_panoptic, truth),
        semantic=_score_semantic(renamed_semantic, truth),
        instance=_score_instances(results, truth),
        unmatched_clusters=unmatched,
    )


def _compare(answer: Segmentation, picture: TruthPicture, truth: Truth) -> Overlap:
    overlap = measure_overlap(
        answer.label_map,
        {segment.id: segment.cluster for segment in answer.segments},
        picture.read_label_map(),
        {segment["id"]: truth.index[segment["category_id"]] for segment in picture.segments},
        frozenset(segment["id"] for segment in picture.segments if segment["iscrowd"]),
    )
    return merge_true_stuff(overlap, truth.things)


def _rename_folds(overlaps: list[Overlap], contract: Contract, truth: Truth) -> tuple[list[Overlap], int]:
    """Each picture's clusters as categories, by a table that was fitted without it; and how many had no match."""
    renamed = list(overlaps)
    clusters = contract.thing_clusters + contract.stuff_clusters
    unmatched = 0
    for fold in (0, 1):
        table = match_by_majority(
            overlaps[1 - fold :: 2], clusters, contract.thing_clusters, len(truth.names), truth.things
        )
        used = np.unique(np.concatenate([overlap.predicted for overlap in overlaps[fold::2]]))
        unmatched += int((table[used] < 0).sum())
        renamed[fold::2] = [rename_predicted(overlap, table, merged_from=truth.things) for overlap in overlaps[fold::2]]
    return renamed, unmatched


def _score_panoptic(overlaps: list[Overlap], truth: Truth) -> dict[str, Interval]:
    counts = [count_panoptic(overlap, len(truth.names)) for overlap in overlaps]

    def measure(drawn: Int[np.ndarray, "N"]) -> dict[str, float]:
        chosen = [counts[index] for index in drawn]
        things = score_panoptic(chosen, slice(0, truth.things))["pq"]
        stuff = score_panoptic(chosen, slice(truth.things, None))["pq"]
        return score_panoptic(chosen) | {"pq_things": things, "pq_stuff": stuff}

    return bootstrap(len(counts), measure, draws=_DRAWS)


def _score_semantic(overlaps: list[Overlap], truth: Truth) -> dict[str, Interval]:
    confusions = np.stack([count_confusion(overlap, len(truth.names)) for overlap in overlaps])

    def measure(drawn: Int[np.ndarray, "N"]) -> dict[str, float]:
        summed = confusions[drawn].sum(0)
        return score_semantic(summed) | {"miou_stuff": score_semantic(summed, slice(truth.things, None))["miou"]}

    return bootstrap(len(confusions), measure, draws=_DRAWS)


def _score_instances(results: list[dict[str, Any]], truth: Truth) -> dict[str, Interval]:
    if not results:
        return {}
    image_ids = [picture.image_id for picture in truth.pictures]
    return bootstrap(len(image_ids), MaskAp(truth.instances, results, image_ids).score, draws=_AP_DRAWS)


def _list_instances(raw: Raw, placement: Placement, image_id: int) -> list[dict[str, Any]]:
    """Every detection worth ranking, as a COCO result of category 1."""
    results = []
    for index in np.flatnonzero(raw.scores >= _LEAST_SCORE):
        bits = restore(raw.masks[index], placement) > 0.5
        if bits.any():
            rle = coco.encode(np.asfortranarray(bits.astype(np.uint8)))
            score = float(raw.scores[index])
            results.append({"image_id": image_id, "category_id": 1, "segmentation": rle, "score": score})
    return results
