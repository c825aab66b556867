"""An artifact to one that computes in int8 on a CPU, refused unless it stays true to the first."""

import contextlib
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from model.backends.intel import import_nncf, import_openvino
from model.backends.onnx_session import widen
from model.backends.openvino_session import OpenvinoSession
from model.backends.runtime import check_golden, open_session, write_golden
from model.backends.session import Session
from model.contract import CONTRACT_FILE, GOLDEN_FILE, OPENVINO_FILES, Contract, read_contract
from model.errors import ConfigError, InputError
from model.files import hash_file, read_arrays, replace_directory
from model.pixels import place, read_photo
from model.release.fidelity import Fidelity, FidelityLimits, measure_fidelity
from model.release.gate import BATCHES, Picture, check_batches, stack

logger = logging.getLogger(__name__)

_SOURCES = ("fp32", "fp16-stored", "int8-stored")
_FAILING = "panoptic_cascade"
"""Its boxes, decoded in int8, are no numbers any more."""


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """How photos are used."""

    count: int = 100
    """Most photos to calibrate on."""
    least: int = 8
    """Fewest photos to calibrate on."""
    judges: int = 50
    """Photos that are kept from the calibration, to measure how true the answers stay."""
    threads: int = 2
    limits: FidelityLimits = field(default_factory=FidelityLimits)


@dataclass(frozen=True, kw_only=True)
class _Photos:
    calibration: tuple[Picture, ...]
    judges: tuple[Picture, ...]
    digest: str
    """One sha256 over those of the calibration's files, in order."""


def quantise_artifact(artifact: Path, photos: Path, out: Path, config: QuantiseConfig) -> Contract:
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
    if contract.precision not in _SOURCES:
        raise ConfigError(f"{artifact} computes in {contract.precision}: quantise one of {', '.join(_SOURCES)}")
    if contract.network == _FAILING:
        raise ConfigError(f"{artifact} is a {_FAILING}, which int8 breaks: quantise a mask_transformer")
    _, reference = open_session(artifact, backend="openvino", threads=config.threads)
    given = _read_photos(photos, contract, config)
    with replace_directory(out) as folder:
        network = folder / "wide.onnx"
        widen(artifact / contract.network_files[0], network)
        versions = _calibrate(network, given.calibration, folder / OPENVINO_FILES[0])
        network.unlink()
        session = _open_quantised(folder / OPENVINO_FILES[0], contract, config.threads)
        fidelity = _pass_gates(reference, session, given.judges, contract, config.limits)
        stored = read_arrays(artifact / GOLDEN_FILE)
        write_golden(session, stored["pixels"], stored["sizes"], folder / GOLDEN_FILE)
        check_golden(session, folder / GOLDEN_FILE)
        quantised = _describe(contract, given, fidelity, versions, folder)
        quantised.write(folder)
    return quantised


def _read_photos(folder: Path, contract: Contract, config: QuantiseConfig) -> _Photos:
    """Photos that can be read, each content once, in a drawn order that is the same each time."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found: dict[str, Picture] = {}
    for index in np.random.default_rng(0).permutation(len(paths)):
        with contextlib.suppress(InputError):
            image = read_photo(paths[index]).image
            pixels, placement = place(image, contract.canvases, contract.stride_px)
            found[hash_file(paths[index])] = Picture(pixels=pixels, size=placement.size)
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


def _calibrate(network: Path, pictures: Sequence[Picture], out: Path) -> dict[str, str]:
    """Write the int8 network; gives the versions of what made it."""
    openvino, nncf = import_openvino(), import_nncf()
    items = [dict(zip(("pixels", "sizes"), stack([picture]), strict=True)) for picture in pictures]
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


def _open_quantised(network: Path, contract: Contract, threads: int) -> Session:
    session = OpenvinoSession(network, threads=threads)
    session.check_contract(contract)
    return session


def _pass_gates(
    reference: Session, session: Session, pictures: Sequence[Picture], contract: Contract, limits: FidelityLimits
) -> Fidelity:
    """How true the int8 answers are. Batches are tried on the first picture's canvas."""
    fidelity = measure_fidelity(reference, session, pictures, contract)
    logger.info("int8 beside the artifact: %s", fidelity)
    fidelity.require(limits)
    check_batches(session, [each for each in pictures if each.pixels.shape == pictures[0].pixels.shape][: max(BATCHES)])
    return fidelity


def _describe(
    contract: Contract, given: _Photos, fidelity: Fidelity, versions: dict[str, str], folder: Path
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
