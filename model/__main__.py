"""`useg-model`: runs to artifacts, artifacts checked, photos segmented."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from model.backends.loader import load_session
from model.backends.session import BACKENDS, HotSwapSession
from model.checkpoints.detectron2 import FAMILIES
from model.command import positive, run_command
from model.commands import carry, glossary
from model.commands.registry import add_registry, add_signing
from model.contract import FLOAT_PRECISIONS, TASKS, InputSize
from model.errors import ConfigError, InputError
from model.export.bench import BenchConfig, run_bench
from model.export.predictor import write_drift_reference
from model.export.quantize import QuantizeConfig, quantize_artifact
from model.files import atomic_write
from model.formats.encoders import encode_overlay, encode_panoptic_png, to_segments_info
from model.images import letterbox_image, read_image
from model.postprocessing.panoptic import postprocess
from model.registry.category_names import apply_mapping_file, names_path, read_names

_PARITY_PHOTOS = 4
_ENCODER = "encoder"
"""What `import` reads beside the families."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as `model.command.run_command` gives it."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("model.release").setLevel(logging.INFO)  # an export takes minutes
    return run_command(build_parser(), arguments, "nothing was written")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="useg-model", description=__doc__)
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_import(commands.add_parser("import", help="a published checkpoint to a run, or an encoder to a file of ours"))
    _add_export(commands.add_parser("export", help="a run to an artifact"))
    _add_check(commands.add_parser("check", help="does an artifact keep its contract here?"))
    _add_name(commands.add_parser("name", help="names from `useg-train match` for an artifact's clusters"))
    glossary.add_options(commands.add_parser("glossary", help="names that people gave to an artifact's clusters"))
    carry.add_options(commands.add_parser("carry", help="an artifact's names proposed for a later one"))
    _add_reference(commands.add_parser("reference", help="what answers look like, for telling drift later"))
    _add_quantise(commands.add_parser("quantise", help="an artifact to one of int8, for OpenVINO on a CPU"))
    _add_segment(commands.add_parser("segment", help="a photo to masks"))
    _add_bench(commands.add_parser("bench", help="how fast is an artifact here?"))
    add_registry(commands.add_parser("registry", help="what a service serves: versions, and which answers"))
    add_signing(commands)
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="path or URL")
    parser.add_argument("--as", dest="family", required=True, choices=[*FAMILIES, _ENCODER], help="what FILE is")
    parser.add_argument("--clusters", type=positive, metavar="K", help="thing clusters; for all but an encoder")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="for an encoder, a .safetensors file")
    parser.set_defaults(work=partial(_run_import, parser))


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT")
    parser.add_argument("--name", default="useg", help="the model's name (%(default)s)")
    parser.add_argument("--version", default="1", help="the model's version (%(default)s)")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photos for the parity check, beside drawn scenes")
    parser.add_argument("--score", type=float, help="least score of a detection (default: what suits the network)")
    parser.add_argument("--part", type=float, help="least part of a detection, see Thresholds (default: the same)")
    parser.add_argument(
        "--precision", choices=FLOAT_PRECISIONS, default="fp16-stored", help="of weights and arithmetic (%(default)s)"
    )
    parser.add_argument(
        "--canvas", type=_parse_canvas, action="append", metavar="HxW",
        help="a size of input of a panoptic cascade, multiples of 32; may be repeated (default: the run's, or five)",
    )  # fmt: skip
    parser.set_defaults(work=_run_export)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    _add_backend(parser)
    parser.set_defaults(work=_run_check)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="its contract is rewritten")
    parser.add_argument("names", type=Path, metavar="NAMES", help="JSON of `useg-train match`")
    parser.set_defaults(work=_run_name)


def _add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="its contract is rewritten")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photos of the kind to come")
    parser.add_argument("--count", type=positive, default=200, help="most photos to look at (%(default)s)")
    _add_backend(parser)
    parser.set_defaults(work=_run_reference)


def _add_quantise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photos of the kind to come")
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT")
    parser.add_argument("--count", type=positive, default=100, help="most photos to calibrate on (%(default)s)")
    parser.set_defaults(work=_run_quantise)


def _add_segment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("photo", type=Path, metavar="PHOTO")
    _add_backend(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="COCO panoptic PNG; .jpg: an overlay")
    parser.add_argument("--task", choices=TASKS, default="panoptic", help="%(default)s")
    parser.set_defaults(work=_run_segment)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    _add_backend(parser)
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 2, 3, 5, 8], metavar="N", help="sizes of batches (1 2 3 5 8)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="timed runs of each (%(default)s)")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="what the hardware could do at best")
    parser.set_defaults(work=_run_bench)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="cpu", help="what runs the network (%(default)s)")


def _run_import(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    is_encoder = options.family == _ENCODER
    if is_encoder and options.clusters is not None:
        parser.error("--clusters: an encoder has none")
    if not is_encoder and options.clusters is None:
        parser.error(f"--clusters is required with --as {options.family}")

    from model.checkpoints.detectron2 import import_cascade
    from model.checkpoints.dino import import_encoder

    if is_encoder:
        return {"encoder": str(options.out), **asdict(import_encoder(options.source, options.out))}
    card = import_cascade(options.source, options.family, options.clusters, options.out)
    return {"run": str(options.out), "shape": asdict(card.shape), **card.provenance}


def _run_export(options: argparse.Namespace) -> dict[str, Any]:
    import torch  # the service's environment has none

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is absent

    from model.export.export import ExportConfig, export_run

    torch.set_num_threads(options.threads)
    config = ExportConfig(
        name=options.name,
        version=options.version,
        precision=options.precision,
        score=options.score,
        part=options.part,
        input_sizes=tuple(options.canvas or ()),
    )
    contract = export_run(options.run_folder, options.out, config, _read_photos(options.photos))
    return {"artifact": str(options.out), "files": contract.files, "parity": contract.provenance["parity"]}


def _read_photos(folder: Path | None) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The first few photos below a folder that can be read."""
    if folder is None:
        return []
    images: list[UInt8[np.ndarray, "H W 3"]] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(InputError):
            images.append(read_image(path).image)
        if len(images) == _PARITY_PHOTOS:
            return images
    if not images:
        raise ConfigError(f"{folder} holds no photo that can be read: give --photos another folder")
    return images


def _parse_canvas(text: str) -> InputSize:
    """For argparse: "800x1088", height first."""
    height, _, width = text.partition("x")
    return InputSize(height_px=positive(height), width_px=positive(width))


def _run_check(options: argparse.Namespace) -> dict[str, Any]:
    contract, session = load_session(options.artifact, backend=options.backend, threads=options.threads)
    if isinstance(session, HotSwapSession):
        session.wait_ready()
    return {"name": contract.name, "version": contract.version, "backend": session.backend, "golden": "matched"}


def _run_name(options: argparse.Namespace) -> dict[str, Any]:
    contract = apply_mapping_file(options.artifact, options.names)
    named = {cluster: category.name for cluster, category in contract.categories.items()}
    return {"artifact": str(options.artifact), "named": len(named), "categories": named}


def _run_reference(options: argparse.Namespace) -> dict[str, Any]:
    described = write_drift_reference(options.artifact, options.photos, options.count, options.backend, options.threads)
    counts = {name: list(each.counts) for name, each in described.reference.items()}
    return {"artifact": str(options.artifact), "reference": counts}


def _run_quantise(options: argparse.Namespace) -> dict[str, Any]:
    config = QuantizeConfig(count=options.count, threads=options.threads)
    contract = quantize_artifact(options.artifact, options.photos, options.out, config)
    return {"artifact": str(options.out), "files": contract.files, **contract.provenance["quantisation"]}


def _run_segment(options: argparse.Namespace) -> dict[str, Any]:
    photo = read_image(options.photo)
    contract, session = load_session(options.artifact, backend=options.backend, threads=options.threads)
    contract = read_names(names_path(options.artifact), contract).apply(contract)
    pixels, placement = letterbox_image(photo.image, contract.input_sizes, contract.stride_px)
    raw = session.run(pixels[None], np.array([placement.size]))[0]
    answer = postprocess(raw, placement, contract, options.task, contract.thresholds)
    is_overlay = options.out.suffix.lower() in (".jpg", ".jpeg")
    content = encode_overlay(photo.image, answer) if is_overlay else encode_panoptic_png(answer.label_map)
    with atomic_write(options.out) as sibling:
        sibling.write_bytes(content)
    return {"task": options.task, "segments_info": to_segments_info(answer, contract)}


def _run_bench(options: argparse.Namespace) -> dict[str, Any]:
    config = BenchConfig(
        backend=options.backend,
        batches=tuple(options.batch),
        rounds=options.rounds,
        threads=options.threads,
        peak_tflops=options.peak_tflops,
    )
    return run_bench(options.artifact, config)


if __name__ == "__main__":
    sys.exit(main())
