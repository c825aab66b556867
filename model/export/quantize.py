"""Quantizes an artifact to int8 for OpenVINO, after checking how much its predictions change."""

import contextlib
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from model.backends.loader import check_golden, load_session, write_golden
from model.backends.onnx_runtime import materialize_fp32
from model.backends.openvino import OpenvinoSession, import_nncf, import_openvino
from model.backends.session import Session
from model.contract import CONTRACT_FILE, GOLDEN_FILE, OPENVINO_FILES, Contract, read_contract
from model.errors import ConfigError, InputError, ParityError
from model.export.parity_checks import CHECKED_BATCH_SIZES, InputImage, check_batch_invariance, stack_images
from model.files import atomic_directory, hash_file, list_files, load_npz
from model.images import SUFFIXES, letterbox_image, read_image
from model.postprocessing.panoptic import Segmentation, postprocess

_MATCH_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class QuantizationAccuracy:
    """Agreement of panoptic segmentations with those of a reference."""

    photos: int
    clusters_equal: float
    """Fraction of pixels of the same cluster, or void in both."""
    panoptic_quality: float
    """PQ over the segments of all photos; 0 if there are none."""

    def require(self, thresholds: "AccuracyThresholds") -> None:
        """Raise ParityError, with the values, unless they reach the thresholds."""
        for name, minimum in asdict(thresholds).items():
            if not getattr(self, name) >= minimum:
                values = ", ".join(f"{key} {value:.4g}" for key, value in asdict(self).items())
                raise ParityError(f"int8 differs too much from the artifact: {name} is below {minimum} ({values})")


@dataclass(frozen=True, kw_only=True)
class AccuracyThresholds:
    """Minimum accuracy of an int8 artifact.

    The bundled artifact in int8 measured 0.923 and 0.897 on 100 photos, and of 4,000 samples of 50 of them one in a
    thousand was below 0.839 and 0.853; a broken network measured 0.23 and 0.002 (docs/experiments).
    """

    clusters_equal: float = 0.8
    """A different cluster of one large object changes most of a photo."""
    panoptic_quality: float = 0.85


@dataclass(frozen=True, kw_only=True)
class _SegmentCounts:
    """Comparison of two segmentations of one photo, as additive counts."""

    pixels: int
    pixels_equal: int
    segments: int
    """Segments of both."""
    iou: float
    """Sum over matched segments."""


def measure_accuracy(
    reference: Session, session: Session, images: Sequence[InputImage], contract: Contract
) -> QuantizationAccuracy:
    """Compare the panoptic segmentations of two sessions on the same images."""
    counts = []
    for image in images:
        letterbox = image.letterbox(contract)
        segmentations = [
            postprocess(each.run(*stack_images([image]))[0], letterbox, contract, "panoptic", contract.thresholds)
            for each in (reference, session)
        ]
        counts.append(_compare_segments(*segmentations))
    segments = sum(each.segments for each in counts)
    return QuantizationAccuracy(
        photos=len(counts),
        clusters_equal=sum(each.pixels_equal for each in counts) / sum(each.pixels for each in counts),
        panoptic_quality=2 * sum(each.iou for each in counts) / max(segments, 1),
    )


def _compare_segments(expected: Segmentation, actual: Segmentation) -> _SegmentCounts:
    """Match segments of the same cluster with an IoU above 0.5."""
    clusters, others = (np.array([0, *(each.cluster for each in one.segments)]) for one in (expected, actual))
    pairs = expected.label_map.ravel() * np.int64(len(others)) + actual.label_map.ravel()
    shared = np.bincount(pairs, minlength=len(clusters) * len(others)).reshape(len(clusters), len(others))
    is_same = clusters[:, None] == others
    unions = shared.sum(1)[:, None] + shared.sum(0) - shared
    ious = np.where(is_same, shared / np.maximum(unions, 1), 0.0)[1:, 1:]
    return _SegmentCounts(
        pixels=expected.label_map.size,
        pixels_equal=int(shared[is_same].sum()),
        segments=len(expected.segments) + len(actual.segments),
        iou=float(ious[ious > _MATCH_IOU].sum()),
    )


logger = logging.getLogger(__name__)

_SOURCE_PRECISIONS = ("fp32", "fp16-stored", "int8-stored")
_UNSUPPORTED_NETWORK = "panoptic_cascade"
"""Its box deltas become NaN in int8."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Settings of a quantization."""

    max_calibration_photos: int = 100
    min_calibration_photos: int = 8
    validation_photos: int = 50
    """Photos that are not used for calibration, to measure the accuracy."""
    threads: int = 2
    thresholds: AccuracyThresholds = field(default_factory=AccuracyThresholds)


@dataclass(frozen=True, kw_only=True)
class _Photos:
    calibration: tuple[InputImage, ...]
    validation: tuple[InputImage, ...]
    digest: str
    """sha256 over the hashes of the calibration files, in order."""


def quantize_artifact(artifact: Path, photos: Path, out: Path, config: QuantizeConfig) -> Contract:
    """Write the complete int8 artifact, or raise and leave an existing one unchanged.

    Weights and activations of convolutions and matrix products become int8, with ranges calibrated on unlabeled photos
    (NNCF's post-training quantization, with SmoothQuant for transformers). The golden images are kept, with new
    outputs. Raises ConfigError if `artifact` does not compute in fp32, `out` is not an artifact or there are too few
    photos; BackendUnavailable without OpenVINO or NNCF; ParityError, with the values, if the predictions differ too
    much from the artifact's, or depend on the batch.
    """
    if out.exists() and not (out / CONTRACT_FILE).is_file():
        raise ConfigError(f"{out} exists and is not an artifact: choose another --out")
    contract = read_contract(artifact)
    if contract.precision not in _SOURCE_PRECISIONS:
        raise ConfigError(
            f"{artifact} computes in {contract.precision}: quantize one of {', '.join(_SOURCE_PRECISIONS)}"
        )
    if contract.network == _UNSUPPORTED_NETWORK:
        raise ConfigError(
            f"{artifact} is a {_UNSUPPORTED_NETWORK}, which does not work in int8: quantize a mask_transformer"
        )
    _, reference = load_session(artifact, backend="openvino", threads=config.threads)
    images = _read_photos(photos, contract, config)
    with atomic_directory(out) as folder:
        network = folder / "fp32.onnx"
        materialize_fp32(artifact / contract.network_files[0], network)
        versions = _calibrate(network, images.calibration, folder / OPENVINO_FILES[0])
        network.unlink()
        session = _load_quantized(folder / OPENVINO_FILES[0], contract, config.threads)
        accuracy = _check_accuracy(reference, session, images.validation, contract, config.thresholds)
        stored = load_npz(artifact / GOLDEN_FILE)
        write_golden(session, stored["pixels"], stored["sizes"], folder / GOLDEN_FILE)
        check_golden(session, folder / GOLDEN_FILE)
        quantized = _describe(contract, images, accuracy, versions, folder)
        quantized.write(folder)
    return quantized


def _read_photos(folder: Path, contract: Contract, config: QuantizeConfig) -> _Photos:
    """Read distinct photos, in a random order that is the same every time."""
    paths = [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES]
    found: dict[str, InputImage] = {}
    for index in np.random.default_rng(0).permutation(len(paths)):
        with contextlib.suppress(InputError):
            image = read_image(paths[index]).image
            pixels, letterbox = letterbox_image(image, contract.input_sizes, contract.stride_px)
            found[hash_file(paths[index])] = InputImage(pixels=pixels, size=letterbox.size)
        if len(found) == config.max_calibration_photos + config.validation_photos:
            break
    if len(found) < config.min_calibration_photos + config.validation_photos:
        raise ConfigError(
            f"{folder} has {len(found)} distinct readable photos: expected at least {config.min_calibration_photos} to "
            f"calibrate and {config.validation_photos} to validate"
        )
    digests, photos = list(found)[: -config.validation_photos], list(found.values())
    return _Photos(
        calibration=tuple(photos[: -config.validation_photos]),
        validation=tuple(photos[-config.validation_photos :]),
        digest=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
    )


def _calibrate(network: Path, images: Sequence[InputImage], out: Path) -> dict[str, str]:
    """Write the int8 network and return the versions of NNCF and OpenVINO."""
    openvino, nncf = import_openvino(), import_nncf()
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


def _load_quantized(network: Path, contract: Contract, threads: int) -> Session:
    session = OpenvinoSession(network, threads=threads)
    session.check_contract(contract)
    return session


def _check_accuracy(
    reference: Session,
    session: Session,
    images: Sequence[InputImage],
    contract: Contract,
    thresholds: AccuracyThresholds,
) -> QuantizationAccuracy:
    """Measure the accuracy, and check batches of the first image's input size."""
    accuracy = measure_accuracy(reference, session, images, contract)
    logger.info("int8 compared with the artifact: %s", accuracy)
    accuracy.require(thresholds)
    check_batch_invariance(
        session,
        [each for each in images if each.pixels.shape == images[0].pixels.shape][: max(CHECKED_BATCH_SIZES)],
    )
    return accuracy


def _describe(
    contract: Contract, images: _Photos, accuracy: QuantizationAccuracy, versions: dict[str, str], folder: Path
) -> Contract:
    """The artifact's contract with the version, precision and files of the int8 network."""
    quantization = {
        "source": {name: contract.files[name] for name in contract.network_files},
        **versions,
        "photos": len(images.calibration),
        "photos_hash": images.digest,
        "accuracy": asdict(accuracy),
    }
    return replace(
        contract,
        version=f"{contract.version}-int8",
        precision="int8",
        files={name: hash_file(folder / name) for name in (*OPENVINO_FILES, GOLDEN_FILE)},
        provenance={**contract.provenance, "quantization": quantization},
    )
