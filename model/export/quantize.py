"""How true a network of coarser weights stays to the one that it was made from, where rounding alone is no measure."""

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
from model.files import atomic_directory, hash_file, load_npz
from model.images import letterbox_image, read_image
from model.postprocessing.panoptic import Segmentation, postprocess

_MATCH_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class QuantizationAccuracy:
    """Panoptic answers held against those of a reference, in shares of one."""

    photos: int
    clusters_equal: float
    """Share of pixels of the same cluster, or void in both."""
    panoptic_quality: float
    """All segments of all photos counted together; 0 where there is none, as such photos judge nothing."""

    def require(self, limits: "AccuracyThresholds") -> None:
        """Raise ParityError, with the figures, unless they reach the limits."""
        for name, least in asdict(limits).items():
            if not getattr(self, name) >= least:
                figures = ", ".join(f"{key} {value:.4g}" for key, value in asdict(self).items())
                raise ParityError(f"int8 answers otherwise than the artifact: {name} below {least} ({figures})")


@dataclass(frozen=True, kw_only=True)
class AccuracyThresholds:
    """What is refused below.

    The bundled artifact in int8 measured 0.923 and 0.897 on 100 photos, and of 4,000 draws of 50 of them one in a
    thousand lay below 0.839 and 0.853; a broken network measured 0.23 and 0.002 (docs/experiments).
    """

    clusters_equal: float = 0.8
    """Where the cluster of one large thing turns, most of a photo turns with it."""
    panoptic_quality: float = 0.85


@dataclass(frozen=True, kw_only=True)
class _SegmentCounts:
    """Of two answers to one photo, as numbers that add up."""

    pixels: int
    pixels_equal: int
    segments: int
    """Of both answers."""
    iou: float
    """Of segments that match."""


def measure_accuracy(
    reference: Session, session: Session, pictures: Sequence[InputImage], contract: Contract
) -> QuantizationAccuracy:
    """What two sessions' panoptic answers to the same pictures have in common."""
    likenesses = []
    for picture in pictures:
        placement = picture.place(contract)
        answers = [
            postprocess(each.run(*stack_images([picture]))[0], placement, contract, "panoptic", contract.thresholds)
            for each in (reference, session)
        ]
        likenesses.append(_compare_segments(*answers))
    segments = sum(each.segments for each in likenesses)
    return QuantizationAccuracy(
        photos=len(likenesses),
        clusters_equal=sum(each.pixels_equal for each in likenesses) / sum(each.pixels for each in likenesses),
        panoptic_quality=2 * sum(each.iou for each in likenesses) / max(segments, 1),
    )


def _compare_segments(expected: Segmentation, given: Segmentation) -> _SegmentCounts:
    """Segments of the same cluster match if they share more than half of what they cover together."""
    clusters, others = (np.array([0, *(each.cluster for each in one.segments)]) for one in (expected, given))
    pairs = expected.label_map.ravel() * np.int64(len(others)) + given.label_map.ravel()
    shared = np.bincount(pairs, minlength=len(clusters) * len(others)).reshape(len(clusters), len(others))
    is_same = clusters[:, None] == others
    unions = shared.sum(1)[:, None] + shared.sum(0) - shared
    ious = np.where(is_same, shared / np.maximum(unions, 1), 0.0)[1:, 1:]
    return _SegmentCounts(
        pixels=expected.label_map.size,
        pixels_equal=int(shared[is_same].sum()),
        segments=len(expected.segments) + len(given.segments),
        iou=float(ious[ious > _MATCH_IOU].sum()),
    )


logger = logging.getLogger(__name__)

_SOURCE_PRECISIONS = ("fp32", "fp16-stored", "int8-stored")
_UNSUPPORTED_NETWORK = "panoptic_cascade"
"""Its boxes, decoded in int8, are no numbers any more."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How photos are used."""

    count: int = 100
    """Most photos to calibrate on."""
    least: int = 8
    """Fewest photos to calibrate on."""
    judges: int = 50
    """Photos that are kept from the calibration, to measure how true the answers stay."""
    threads: int = 2
    limits: AccuracyThresholds = field(default_factory=AccuracyThresholds)


@dataclass(frozen=True, kw_only=True)
class _Photos:
    calibration: tuple[InputImage, ...]
    judges: tuple[InputImage, ...]
    digest: str
    """One sha256 over those of the calibration's files, in order."""


def quantize_artifact(artifact: Path, photos: Path, out: Path, config: QuantizeConfig) -> Contract:
    """Write the int8 artifact whole, or raise and leave what was there.

    Weights and the activations of convolutions and matrix products become int8, their ranges those of photos that need
    no label (NNCF's post-training quantisation, for transformers with SmoothQuant). The golden pictures stay, their
    answers are new. Raises ConfigError if `artifact` is not of fp32 arithmetic, `out` something else than an artifact
    or photos too few; BackendUnavailable without OpenVINO or NNCF; ParityError, with the figures, if the answers are
    too far from the artifact's, or depend on the batch.
    """
    if out.exists() and not (out / CONTRACT_FILE).is_file():
        raise ConfigError(f"{out} exists and is no artifact: choose another --out")
    contract = read_contract(artifact)
    if contract.precision not in _SOURCE_PRECISIONS:
        raise ConfigError(
            f"{artifact} computes in {contract.precision}: quantise one of {', '.join(_SOURCE_PRECISIONS)}"
        )
    if contract.network == _UNSUPPORTED_NETWORK:
        raise ConfigError(f"{artifact} is a {_UNSUPPORTED_NETWORK}, which int8 breaks: quantise a mask_transformer")
    _, reference = load_session(artifact, backend="openvino", threads=config.threads)
    given = _read_photos(photos, contract, config)
    with atomic_directory(out) as folder:
        network = folder / "wide.onnx"
        materialize_fp32(artifact / contract.network_files[0], network)
        versions = _calibrate(network, given.calibration, folder / OPENVINO_FILES[0])
        network.unlink()
        session = _load_quantized(folder / OPENVINO_FILES[0], contract, config.threads)
        fidelity = _check_accuracy(reference, session, given.judges, contract, config.limits)
        stored = load_npz(artifact / GOLDEN_FILE)
        write_golden(session, stored["pixels"], stored["sizes"], folder / GOLDEN_FILE)
        check_golden(session, folder / GOLDEN_FILE)
        quantised = _describe(contract, given, fidelity, versions, folder)
        quantised.write(folder)
    return quantised


def _read_photos(folder: Path, contract: Contract, config: QuantizeConfig) -> _Photos:
    """Photos that can be read, each content once, in a drawn order that is the same each time."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found: dict[str, InputImage] = {}
    for index in np.random.default_rng(0).permutation(len(paths)):
        with contextlib.suppress(InputError):
            image = read_image(paths[index]).image
            pixels, placement = letterbox_image(image, contract.input_sizes, contract.stride_px)
            found[hash_file(paths[index])] = InputImage(pixels=pixels, size=placement.size)
        if len(found) == config.count + config.judges:
            break
    if len(found) < config.least + config.judges:
        raise ConfigError(
            f"{folder} holds {len(found)} different photos that can be read: "
            f"{config.least} to calibrate and {config.judges} to judge are the fewest"
        )
    digests, pictures = list(found)[: -config.judges], list(found.values())
    return _Photos(
        calibration=tuple(pictures[: -config.judges]),
        judges=tuple(pictures[-config.judges :]),
        digest=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
    )


def _calibrate(network: Path, pictures: Sequence[InputImage], out: Path) -> dict[str, str]:
    """Write the int8 network; gives the versions of what made it."""
    openvino, nncf = import_openvino(), import_nncf()
    items = [dict(zip(("pixels", "sizes"), stack_images([picture]), strict=True)) for picture in pictures]
    logger.info("calibrating on %d photos", len(items))
    with contextlib.redirect_stdout(sys.stderr):  # NNCF shows its progress
        quantised = nncf.quantize(
            openvino.Core().read_model(network),
            nncf.Dataset(items),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(items),
        )
    openvino.save_model(quantised, out, compress_to_fp16=False)
    return {"nncf": nncf.__version__, "openvino": openvino.__version__}


def _load_quantized(network: Path, contract: Contract, threads: int) -> Session:
    session = OpenvinoSession(network, threads=threads)
    session.check_contract(contract)
    return session


def _check_accuracy(
    reference: Session, session: Session, pictures: Sequence[InputImage], contract: Contract, limits: AccuracyThresholds
) -> QuantizationAccuracy:
    """How true the int8 answers are. Batches are tried on the first picture's canvas."""
    fidelity = measure_accuracy(reference, session, pictures, contract)
    logger.info("int8 beside the artifact: %s", fidelity)
    fidelity.require(limits)
    check_batch_invariance(
        session,
        [each for each in pictures if each.pixels.shape == pictures[0].pixels.shape][: max(CHECKED_BATCH_SIZES)],
    )
    return fidelity


def _describe(
    contract: Contract, given: _Photos, fidelity: QuantizationAccuracy, versions: dict[str, str], folder: Path
) -> Contract:
    """The contract of what lies in the folder: the artifact's own, but for its version, precision and files."""
    quantisation = {
        "of": {name: contract.files[name] for name in contract.network_files},
        **versions,
        "photos": len(given.calibration),
        "photos_hash": given.digest,
        "fidelity": asdict(fidelity),
    }
    return replace(
        contract,
        version=f"{contract.version}-int8",
        precision="int8",
        files={name: hash_file(folder / name) for name in (*OPENVINO_FILES, GOLDEN_FILE)},
        provenance={**contract.provenance, "quantisation": quantisation},
    )
