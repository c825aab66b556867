"""Answers as the documentation shows them; a test holds them to the schemas."""

from typing import Any

from service.responses.problems import ProblemType

_MODEL = {"name": "useg-vits14", "version": "1"}
_IMAGE: dict[str, Any] = {
    "width": 6,
    "height": 4,
    "original_width": 6,
    "original_height": 4,
    "frames": 1,
    "frame_used": 0,
    "orientation_applied": False,
    "notes": [],
}
_FACTS: dict[str, Any] = {
    "id": 1,
    "cluster": 7,
    "category_id": None,
    "category": None,
    "isthing": True,
    "score": 0.91,
    "area": 4,
    "bbox": [1, 1, 2, 2],
}
_SEGMENT: dict[str, Any] = _FACTS | {"segmentation": {"size": [4, 6], "counts": "5220;"}}

ANSWER: dict[str, Any] = {"image": _IMAGE, "model": _MODEL, "task": "panoptic", "segments_info": [_SEGMENT]}
TASKS_ANSWER: dict[str, Any] = {
    "image": _IMAGE,
    "model": _MODEL,
    "answers": [{"task": "panoptic", "segments_info": [_SEGMENT]}, {"task": "semantic", "segments_info": []}],
}
FEATURES: dict[str, Any] = {
    "type": "FeatureCollection",
    "image": _IMAGE,
    "model": _MODEL,
    "task": "panoptic",
    "features": [
        {
            "type": "Feature",
            "id": 1,
            "geometry": {"type": "MultiPolygon", "coordinates": [[[[1, 1], [3, 1], [3, 3], [1, 3], [1, 1]]]]},
            "properties": _FACTS,
        }
    ],
}
LABELLED: list[dict[str, Any]] = [{"label": "LABEL_7", "score": 0.91, "mask": "iVBORw0KGgo…"}]

PROBLEM_DETAILS = {
    "image-too-large": "the body has 50000000 bytes, at most 33554432 are taken: send a smaller file",
    "too-many-pixels": "the image has 20000x10000 = 200000000 pixels, at most 50000000 are taken",
    "image-unreadable": "the image is empty (0 bytes): send a JPEG, PNG, WebP, GIF, BMP or TIFF file",
    "option-invalid": "unknown query parameter 'tsak', did you mean 'task'?",
    "cluster-unknown": "useg-vits14 1 has no cluster 99: there are 1..91",
    "revision-passed": "the names are at revision 12, not 11: look at them again",
    "names-unusable": "names.json cannot be written: Read-only file system",
    "answer-unsupported": "no answer fits 'Accept: text/html': we speak application/json, image/png, …",
    "busy": "64 pictures are waiting, no more are taken: try again later",
    "deadline-passed": "the answer was not ready within the time limit: send fewer at once, or try again",
}
_MAY_RETRY = (429, 503)


def example_problem(kind: ProblemType, detail: str | None) -> dict[str, Any]:
    """An error body of that kind."""
    problem: dict[str, Any] = {
        "type": f"urn:useg:problem:{kind.slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail or kind.title.lower(),
        "instance": "urn:useg:request:2f1c3f0e-6a0c-4a52-9f43-6a3f2a1d7c55",
    }
    return problem | ({"retry_after_ms": 3000} if kind.status in _MAY_RETRY else {})


BATCH: dict[str, Any] = {
    "model": _MODEL,
    "items": [
        {"index": 0, "name": "beach.jpg", "status": 200, "answer": ANSWER},
        {
            "index": 1,
            "name": "letter.txt",
            "status": 422,
            "problem": example_problem(
                ProblemType(status=422, slug="image-unreadable", title="The image cannot be read"),
                PROBLEM_DETAILS["image-unreadable"],
            ),
        },
    ],
}
