"""Adds an int8 network for OpenVINO to an artifact, after checking how much its predictions change."""

import contextlib
import hashlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.backends.loader import check_golden, load_session, write_golden
from model.backends.onnx_runtime import materialize_fp32
from model.backends.openvino import OpenvinoSession, import_without_telemetry
from model.backends.session import Session
from model.contract import (
    GOLDEN_FILE,
    INT8_FILES,
    INT8_GOLDEN_FILE,
    NETWORK_FILE,
    Contract,
    Int8Accuracy,
    Precision,
    read_contract,
)
from model.detail import NetworkInput, prepare_image
from model.errors import ConfigError, ParityError
from model.export.parity_checks import check_batch_invariance, segment_input, stack_images
from model.export.predictor import sample_photos
from model.files import hash_file, load_npz
from model.postprocessing.panoptic import Segmentation

logger = logging.getLogger(__name__)

MIN_ACCURACY = {"clusters_equal": 0.8, "panoptic_quality": 0.85}
"""Minimum accuracy of an int8 network. A different cluster of one large object changes most of a photo.

The bundled artifact in int8 measured 0.923 and 0.897 on 100 photos, and of 4,000 samples of 50 of them one in a
thousand was below 0.839 and 0.853; a broken network measured 0.23 and 0.002 (docs/experiments).
"""
_MIN_CALIBRATION_PHOTOS = 8
_VALIDATION_PHOTOS = 50
"""Photos that are not used for calibration, to measure the accuracy."""
_MATCH_IOU = 0.5
_SOURCE_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16-stored", "int8-stored")
"""Precisions that compute in fp32. Other networks are not supported: box deltas of a cascade become NaN in int8."""


def quantize_artifact(
    artifact: Path,
    photos: Path,
    *,
    max_calibration_photos: int = 100,
    threads: int = 2,
    min_accuracy: Mapping[str, float] = MIN_ACCURACY,
) -> Contract:
    """Add an int8 network to an artifact, replacing an earlier one, or raise and leave the artifact unchanged.

    Weights and activations of convolutions and matrix products become int8, with ranges calibrated on unlabeled photos
    (NNCF's post-training quantization, with SmoothQuant for transformers). It has golden outputs of its own, for the
    artifact's golden images. Raises ConfigError if the artifact cannot be quantized or there are too few photos;
    BackendUnavailable without OpenVINO or NNCF; ParityError, with the values, if the predictions differ too much from
    the artifact's, or depend on the batch.
    """
    contract = read_contract(artifact)
    if contract.network != "mask_transformer" or contract.precision not in _SOURCE_PRECISIONS:
        raise ConfigError(
            f"{artifact} is a {contract.network} in {contract.precision}: int8 needs a mask_transformer in one of "
            f"{', '.join(_SOURCE_PRECISIONS)}"
        )
    _, reference = load_session(artifact, backend="openvino", threads=threads)
    images = _read_photos(photos, contract, max_calibration_photos)
    calibration, validation = list(images)[:-_VALIDATION_PHOTOS], list(images.values())[-_VALIDATION_PHOTOS:]
    with tempfile.TemporaryDirectory(prefix=f".{artifact.name}.", dir=artifact.resolve().parent) as temporary:
        folder = Path(temporary)
        materialize_fp32(artifact / NETWORK_FILE, folder / NETWORK_FILE)
        versions = _calibrate(folder / NETWORK_FILE, [images[digest] for digest in calibration], folder / INT8_FILES[0])
        session = OpenvinoSession(folder / INT8_FILES[0], threads=threads, backend="openvino-int8")
        session.check_contract(contract)
        accuracy = measure_accuracy(reference, session, validation, contract)
        logger.info("int8 compared with the artifact: %s", accuracy)
        require_accuracy(accuracy, min_accuracy)
        check_batch_invariance(session, validation)
        stored = load_npz(artifact / GOLDEN_FILE)
        write_golden(session, stored["pixels"], stored["sizes"], folder / INT8_GOLDEN_FILE)
        check_golden(session, folder / INT8_GOLDEN_FILE)
        digest = hashlib.sha256("\n".join(calibration).encode()).hexdigest()
        quantization = {**versions, "photos": len(calibration), "photos_hash": digest}
        return _store(artifact, contract, folder, accuracy, quantization)


def measure_accuracy(
    reference: Session, session: Session, images: Sequence[NetworkInput], contract: Contract
) -> Int8Accuracy:
    """Compare the panoptic segmentations of two sessions on the same images."""
    counts = [
        _compare_segments(*(segment_input(each, image, contract) for each in (reference, session))) for image in images
    ]
    pixels, pixels_equal, segments, iou = np.sum(counts, axis=0).tolist()
    return Int8Accuracy(
        photos=len(images), clusters_equal=pixels_equal / pixels, panoptic_quality=2 * iou / max(segments, 1)
    )


def _compare_segments(expected: Segmentation, actual: Segmentation) -> tuple[int, int, int, float]:
    """Match segments of the same cluster with an IoU above 0.5.

    Returns pixels, pixels of equal clusters, segments of both, and the sum of the IoUs of matched segments.
    """
    clusters, others = (np.array([0, *(each.cluster for each in one.segments)]) for one in (expected, actual))
    pairs = expected.label_map.ravel() * np.int64(len(others)) + actual.label_map.ravel()
    shared = np.bincount(pairs, minlength=len(clusters) * len(others)).reshape(len(clusters), len(others))
    is_same = clusters[:, None] == others
    unions = shared.sum(1)[:, None] + shared.sum(0) - shared
    ious = np.where(is_same, shared / np.maximum(unions, 1), 0.0)[1:, 1:]
    segments = len(expected.segments) + len(actual.segments)
    return pairs.size, int(shared[is_same].sum()), segments, float(ious[ious > _MATCH_IOU].sum())


def require_accuracy(accuracy: Int8Accuracy, min_accuracy: Mapping[str, float]) -> None:
    """Raise ParityError, with the values, unless they reach the minimums."""
    for name, minimum in min_accuracy.items():
        if not getattr(accuracy, name) >= minimum:
            values = ", ".join(f"{key} {value:.4g}" for key, value in asdict(accuracy).items())
            raise ParityError(f"int8 differs too much from the artifact: {name} is below {minimum} ({values})")


def _store(
    artifact: Path, contract: Contract, folder: Path, accuracy: Int8Accuracy, quantization: dict[str, Any]
) -> Contract:
    """Move the int8 files into the artifact; interrupted at any moment, the artifact is valid."""
    added = (*INT8_FILES, INT8_GOLDEN_FILE)
    kept = {name: digest for name, digest in contract.files.items() if name not in added}
    replace(contract, int8=None, files=kept).write(artifact)
    for name in added:
        shutil.copy(folder / name, artifact / name)
    quantized = replace(
        contract,
        int8=accuracy,
        files=kept | {name: hash_file(artifact / name) for name in added},
        provenance={**contract.provenance, "quantization": quantization},
    )
    quantized.write(artifact)
    return quantized


def _read_photos(folder: Path, contract: Contract, max_calibration_photos: int) -> dict[str, NetworkInput]:
    """Read distinct photos, by the hashes of their files, in a random order that is the same every time."""
    found: dict[str, NetworkInput] = {}
    for path, image in sample_photos(folder, sys.maxsize):
        found[hash_file(path)] = prepare_image(image, contract).inputs[0]
        if len(found) == max_calibration_photos + _VALIDATION_PHOTOS:
            break
    if len(found) < _MIN_CALIBRATION_PHOTOS + _VALIDATION_PHOTOS:
        raise ConfigError(
            f"{folder} has {len(found)} distinct readable photos: expected at least {_MIN_CALIBRATION_PHOTOS} to "
            f"calibrate and {_VALIDATION_PHOTOS} to validate"
        )
    return found


def _calibrate(network: Path, images: Sequence[NetworkInput], out: Path) -> dict[str, str]:
    """Write the int8 network and return the versions of NNCF and OpenVINO."""
    openvino, nncf = import_without_telemetry("openvino", "service"), import_without_telemetry("nncf", "quantize")
    items = [dict(zip(("pixels", "sizes"), stack_images([image]), strict=True)) for image in images]
    logger.info("calibrating on %d photos", len(items))
    with contextlib.redirect_stdout(sys.stderr):  # NNCF prints its progress
        quantized = nncf.quantize(
            openvino.Core().read_model(network),
            nncf.Dataset(items),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(items),
        )
    openvino.save_model(quantized, out, compress_to_fp16=False)
    return {"nncf": nncf.__version__, "openvino": openvino.__version__}
