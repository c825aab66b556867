"""Subcommands that make, check and run artifacts."""

import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import CycloptsError, Parameter
from cyclopts.types import PositiveInt

from model.backends.session import Backend
from model.contract import (
    Contract,
    Detail,
    InputSize,
    Precision,
    SegmentFormat,
    Task,
    find_bundled_artifact,
    read_contract,
)
from model.errors import ConfigError

_MAX_PARITY_PHOTOS = 4

Artifact = Annotated[Path, Parameter(name="ARTIFACT", help="Folder of the artifact.")]
NewArtifact = Annotated[Path, Parameter(help="Folder of the new artifact.")]
BackendName = Annotated[Backend, Parameter(help="What runs the network.")]
Threads = Annotated[PositiveInt, Parameter(help="CPU threads.")]
Photos = Annotated[Path, Parameter(help="Folder of photos like those to be segmented later.")]


def import_checkpoint(
    source: str,
    /,
    *,
    format: Literal["u2seg", "cutler", "cups", "detectron2", "encoder"],
    out: Path,
    clusters: PositiveInt | None = None,
) -> dict[str, Any]:
    """Convert a published checkpoint to a run that `useg export` takes, or an encoder to safetensors.

    Parameters
    ----------
    source
        Path or URL of the checkpoint (.pth, .pkl, .ckpt or .safetensors).
    format
        What the checkpoint is: a detectron2 model of U2Seg, CutLER or CUPS, another Panoptic Cascade Mask R-CNN in
        detectron2's names (such as `useg export --format detectron2` writes), or a self-supervised encoder (DINO,
        DINOv2, a ResNet-50).
    out
        Folder of the new run; for an encoder, a .safetensors file.
    clusters
        Number of thing clusters of the model. Required for u2seg, cutler and cups.
    """
    if (clusters is None) != (format in ("encoder", "detectron2")):
        raise CycloptsError(msg="--clusters is required with --format u2seg, cutler or cups, and only there")
    if format == "encoder":
        from model.checkpoints.dino import import_encoder

        return {"encoder": str(out), **import_encoder(source, out)}
    from model.checkpoints.detectron2 import import_cascade

    run = import_cascade(source, format, clusters, out)
    return {"run": str(out), "network_config": asdict(run.network_config), **run.provenance}


def export(
    run: Path,
    /,
    *,
    out: NewArtifact,
    format: Literal["onnx", "detectron2"] = "onnx",
    name: str = "useg",
    version: str = "1",
    photos: Path | None = None,
    examples_from: Path | None = None,
    score_threshold: float | None = None,
    min_component_area_fraction: float | None = None,
    precision: Precision = "fp16-stored",
    input_sizes: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    low_input_sizes: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    threads: Threads = 2,
) -> dict[str, Any]:
    """Export a run as an artifact: an ONNX graph, its contract and reference outputs.

    Fails unless ONNX Runtime gives the outputs of torch, alone and in batches.

    Parameters
    ----------
    run
        Folder of a training run or of an imported checkpoint.
    format
        onnx: an artifact. detectron2: a folder with model_final.pth and config.yaml, from which detectron2 builds the
        same network; for a panoptic cascade with ResNet-50. The other options do not apply to it.
    name
        Name of the model.
    version
        Version of the model.
    photos
        Folder of photos for the parity check, and to fit the embeddings by which segments get categories.
    examples_from
        Artifact, or `bundled`, whose embeddings and examples are taken over if it has the same encoder: segments get
        the same categories without new labels.
    score_threshold
        Minimum score of a detection, 0 to 1 (default: what suits the network).
    min_component_area_fraction
        Drop connected components of a mask below this fraction of the largest; 0 keeps masks whole (default: what
        suits the network).
    precision
        Precision of weights and arithmetic. `fp16-stored` and `int8-stored` store smaller weights and compute in fp32.
    input_sizes
        Input sizes as HEIGHTxWIDTH, multiples of 28 for a mask transformer and of 32 for a panoptic cascade; an image
        is resized to the one that shows it largest (default: that of the run, or five of the paper's cascade).
    low_input_sizes
        Input sizes for requests with `detail=low`.
    """
    if format == "detectron2":
        from model.checkpoints.detectron2 import CONFIG_FILE, WEIGHTS_FILE, export_detectron2

        export_detectron2(run, out)
        return {"weights": str(out / WEIGHTS_FILE), "config": str(out / CONFIG_FILE)}
    import torch  # not installed with the service

    from model.export.export import MAX_PHOTOS, ExportConfig, export_run
    from model.export.predictor import sample_photos

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # warns that torchvision is not installed
    torch.set_num_threads(threads)
    config = ExportConfig(
        name=name,
        version=version,
        precision=precision,
        score_threshold=score_threshold,
        min_component_area_fraction=min_component_area_fraction,
        input_sizes=tuple(_parse_input_size(text) for text in input_sizes),
        low_input_sizes=tuple(_parse_input_size(text) for text in low_input_sizes),
    )
    images = [image for _, image in sample_photos(photos, _MAX_PARITY_PHOTOS)] if photos else []
    embedding_photos = (image for _, image in sample_photos(photos, MAX_PHOTOS)) if photos else ()
    source = _read_names(examples_from) if examples_from else None
    contract = export_run(run, out, config, images, embedding_photos, source)
    return {"artifact": str(out), "files": contract.files, "parity": contract.provenance["parity"]}


def _read_names(artifact: Path) -> tuple[Path, Contract]:
    """Return the folder of an artifact and its contract with the names that apply to it."""
    from model.registry.category_names import apply_names

    folder = find_bundled_artifact() if str(artifact) == "bundled" else artifact
    return folder, apply_names(folder, read_contract(folder))


def check(artifact: Artifact, /, *, backend: BackendName = "auto", threads: Threads = 2) -> dict[str, Any]:
    """Load an artifact and compare its outputs with its reference outputs."""
    from model.backends.loader import load_session
    from model.backends.session import AutoSession, find_hot_swap

    contract, session = load_session(artifact, backend=backend, threads=threads)
    if hot_swap := find_hot_swap(session):
        hot_swap.wait_ready()
    skipped = {"skipped_backends": session.skipped_backends} if isinstance(session, AutoSession) else {}
    found = {"name": contract.name, "version": contract.version, "backend": session.backend, "golden": "matched"}
    return {**found, **skipped}


def quantize(
    artifact: Artifact, /, *, photos: Photos, max_photos: PositiveInt = 100, threads: Threads = 2
) -> dict[str, Any]:
    """Add the network in int8 weights and activations to an artifact, for OpenVINO on a CPU.

    Fails, leaving the artifact unchanged, if the int8 network segments photos too differently.

    Parameters
    ----------
    max_photos
        Maximum number of photos to calibrate on.
    """
    from model.export.quantize import quantize_artifact

    contract = quantize_artifact(artifact, photos, max_calibration_photos=max_photos, threads=threads)
    return {"artifact": str(artifact), "files": contract.files, **contract.provenance["quantization"]}


def segment(
    artifact: Artifact,
    photos: list[Path],
    /,
    *,
    out: Path,
    format: SegmentFormat | None = None,
    task: Task = "panoptic",
    detail: Detail = "standard",
    merge_clusters: bool = True,
    backend: BackendName = "auto",
    threads: Threads = 2,
) -> dict[str, Any]:
    """Segment photos: one file to one file, or several files and folders to a COCO dataset or a folder of files.

    An interrupted run is continued by the same command; in a folder, photos that were segmented before are kept. The
    exit status is 3 if photos were unreadable and left out.

    Parameters
    ----------
    photos
        Photos and folders of photos: JPEG, PNG, WebP, HEIC, AVIF, JPEG 2000, GIF, BMP or TIFF.
    out
        File, or folder for several photos; coco-instances and coco-polygons also write one .json for all photos.
    format
        coco-panoptic: panoptic.json and a folder of PNGs; coco-instances, coco-polygons: one JSON, with RLE masks or
        polygons; png: COCO's panoptic PNG of each photo; overlay: segments drawn over each photo, as JPEG; geojson:
        polygons with holes (default: by the suffix of OUT: .png, .jpg, .geojson, or .json for coco-instances).
    task
        Kind of segmentation; instance has objects only.
    detail
        high: also run the network on overlapping windows, which finds smaller objects for five times the computation;
        low: a smaller input, where the artifact has one.
    merge_clusters
        Merge the clusters of one category into one segment: all in the semantic result, those of stuff in the panoptic
        one; as the service does.
    """
    from model.backends.loader import load_session
    from model.export.predictor import ArtifactPredictor
    from model.export.segment import choose_format, encode_segmentation, list_inputs, segment_photos
    from model.files import replace_file
    from model.formats.coco import to_segments_info
    from model.images import read_image
    from model.registry.category_names import apply_names

    form = choose_format(out, format)
    inputs, other_files = list_inputs(photos, out)
    is_single = len(photos) == 1 and not photos[0].is_dir() and not out.is_dir() and not form.startswith("coco-")
    image = read_image(photos[0]).image if is_single else None
    contract, session = load_session(artifact, backend=backend, threads=threads)
    contract = apply_names(artifact, contract)
    predictor = ArtifactPredictor(contract, session, detail, merge_clusters=merge_clusters)
    if image is None:
        return {**segment_photos(predictor, inputs, out, form, task), "other_files": other_files}
    segmentation = predictor.segment(image, task)
    replace_file(out, encode_segmentation(image, segmentation, contract, form))
    return {"task": task, "segments_info": to_segments_info(segmentation)}


def drift_reference(
    artifact: Artifact,
    /,
    *,
    photos: Photos,
    max_photos: PositiveInt = 200,
    backend: BackendName = "auto",
    threads: Threads = 2,
) -> dict[str, Any]:
    """Store statistics of an artifact's outputs in its contract, to detect drift of later outputs.

    Parameters
    ----------
    max_photos
        Maximum number of photos to segment.
    """
    from model.backends.loader import load_session
    from model.drift import build_histograms
    from model.export.predictor import ArtifactPredictor, sample_photos
    from model.postprocessing.panoptic import output_statistics

    predictor = ArtifactPredictor(*load_session(artifact, backend=backend, threads=threads))
    statistics = (output_statistics(predictor.segment(image)) for _, image in sample_photos(photos, max_photos))
    reference = {str(name): histogram for name, histogram in build_histograms(statistics).items()}
    replace(predictor.contract, drift_reference=reference).write(artifact)
    counts = {name: list(histogram.counts) for name, histogram in reference.items()}
    return {"artifact": str(artifact), "drift_reference": counts}


def _parse_input_size(text: str) -> InputSize:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if not found:
        raise ConfigError(f"an input size is HEIGHTxWIDTH, such as 336x448, got {text!r}")
    return InputSize(height_px=int(found[1]), width_px=int(found[2]))
