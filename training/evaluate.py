"""An artifact held against labelled pictures."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from pycocotools import mask as coco

from model.contract import Contract, Task
from model.encodings import Outline, encode_outlines
from model.panoptic import assemble
from model.pixels import place, read_photo
from model.runtime import Session, open_session
from training.matching import match_by_majority
from training.overlap import Overlap, measure_overlap, merge_true_stuff, rename_predicted
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
    """Clusters that were predicted and met no category in the other half."""


PROTOCOL = (
    "27 supercategories (12 things, 15 stuff); clusters matched by pixel majority, things and stuff apart, fitted on "
    "the even pictures and scored on the odd ones and the other way round; unmatched clusters are void in PQ and wrong "
    "in mIoU; instance: class-agnostic mask AP against the things of the panoptic truth"
)


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """What is kept of one picture."""

    panoptic: Overlap
    semantic: Overlap
    size: list[int]
    truth: list[dict[str, Any]]
    results: list[dict[str, Any]]


def evaluate(artifact: Path, truth_folder: Path, *, threads: int) -> Report:
    """Scores of an artifact on a labelled set in COCO's panoptic format."""
    truth = read_truth(truth_folder)
    contract, session = open_session(artifact, threads=threads)
    compared = [_compare(each, truth, contract, session) for each in show(truth.pictures, "evaluate", unit="picture")]
    panoptic, unmatched = _rename_folds([each.panoptic for each in compared], contract, truth)
    semantic, _ = _rename_folds([each.semantic for each in compared], contract, truth)
    return Report(
        pictures=len(compared),
        protocol=PROTOCOL,
        panoptic=_score_panoptic(panoptic, truth),
        semantic=_score_semantic(semantic, truth),
        instance=_score_instances(compared, truth),
        unmatched_clusters=unmatched,
    )


def _compare(picture: TruthPicture, truth: Truth, contract: Contract, session: Session) -> _Comparison:
    photo = read_photo(picture.path)
    pixels, placement = place(photo.image, contract.side_px, contract.stride_px)
    raw = session.run(pixels[None])[0]
    true_map = picture.read_label_map(photo.height, photo.width)
    segments = {each: truth.index[category] for each, category in picture.segments.items()}

    def overlap(task: Task) -> Overlap:
        answer = assemble(raw, placement, contract, task, contract.thresholds)
        clusters = {segment.id: segment.cluster for segment in answer.segments}
        measured = measure_overlap(answer.label_map, clusters, true_map, segments, picture.crowds)
        return merge_true_stuff(measured, truth.things)

    ranked = assemble(raw, placement, contract, "instance", replace(contract.thresholds, score=_LEAST_SCORE))
    scores = [segment.score for segment in ranked.segments]
    results = [
        {"image_id": picture.image_id, "category_id": 1, "score": score, "segmentation": _make_rle(outline)}
        for score, outline in zip(scores, encode_outlines(ranked), strict=True)
    ]
    things = [each for each, category in segments.items() if category < truth.things]
    return _Comparison(
        panoptic=overlap("panoptic"),
        semantic=overlap("semantic"),
        size=[photo.height, photo.width],
        truth=[_annotate(true_map == each, picture, each) for each in things if (true_map == each).any()],
        results=results,
    )


def _annotate(mask: Bool[np.ndarray, "H W"], picture: TruthPicture, segment: int) -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "image_id": picture.image_id,
        "category_id": 1,
        "segmentation": rle,
        "area": int(mask.sum()),
        "bbox": coco.toBbox(rle).tolist(),
        "iscrowd": int(segment in picture.crowds),
    }


def _make_rle(outline: Outline) -> dict[str, Any]:
    return {"size": list(outline.size), "counts": outline.counts}


def _rename_folds(overlaps: list[Overlap], contract: Contract, truth: Truth) -> tuple[list[Overlap], int]:
    """Each picture's clusters as categories, by a table that was fitted without it; and how many had no match."""
    renamed = list(overlaps)
    clusters = contract.thing_clusters + contract.stuff_clusters
    unmatched: set[int] = set()
    for fold in (0, 1):
        table = match_by_majority(
            overlaps[1 - fold :: 2], clusters, contract.thing_clusters, len(truth.names), truth.things
        )
        used = np.unique(np.concatenate([overlap.predicted for overlap in overlaps[fold::2]]))
        unmatched |= set(used[table[used] < 0].tolist())
        renamed[fold::2] = [rename_predicted(each, table, merged_from=truth.things) for each in overlaps[fold::2]]
    return renamed, len(unmatched)


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


def _score_instances(compared: list[_Comparison], truth: Truth) -> dict[str, Interval]:
    results = [result for each in compared for result in each.results]
    if not results:
        return {}
    sizes = {picture.image_id: each.size for picture, each in zip(truth.pictures, compared, strict=True)}
    scorer = MaskAp([annotation for each in compared for annotation in each.truth], results, sizes)
    return bootstrap(len(compared), scorer.score, draws=_AP_DRAWS)
