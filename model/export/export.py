"""Exports a run as an artifact: an ONNX graph, its contract and golden outputs, after parity checks."""

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from model.backends.loader import check_golden, write_golden
from model.backends.onnx_runtime import OnnxSession
from model.backends.parity import EXPORT_TOLERANCE, FP16_TOLERANCE, FP32_TOLERANCE, Tolerance
from model.backends.session import Session
from model.backends.torch_session import TorchSession, load_torch_network
from model.checkpoints.dino import is_same_encoder
from model.checkpoints.runs import RunInfo, load_run
from model.contract import CONTRACT_FILE, GOLDEN_FILE, NETWORK_FILE, Contract, InputSize, Precision, Thresholds
from model.detail import NetworkInput, prepare_image
from model.embeddings import CategoryExamples, fit_whitening
from model.errors import ConfigError
from model.export.onnx_graph import MIN_DYNAMIC_SIDE_PX, round_to_fp16, write_graph
from model.export.parity_checks import check_batch_invariance, check_parity, stack_images
from model.export.precision import round_to_int8
from model.files import atomic_directory, hash_file
from model.images import letterbox_image
from model.networks.backbones import STAGE_STRIDES_PX
from model.networks.interface import Network, normalize
from model.networks.mask_transformer import MASK_STRIDE_PX, MaskTransformer, PatchEmbedding, embedding_layers
from model.networks.panoptic_cascade import PanopticCascade, fold_batch_norms
from model.networks.roi_heads import MASK_SIZE
from model.networks.vit import VisionTransformer

logger = logging.getLogger(__name__)

PAPER_INPUT_SIZES = tuple(
    InputSize(height_px=height, width_px=width)
    for height, width in ((800, 1088), (1088, 800), (800, 800), (800, 1216), (1216, 800))
)
"""For a short side of 800 px: photos are 0.99 times as large as with the paper's 800 to 1,333 px."""
TRANSFORMER_THRESHOLDS = Thresholds(mask_threshold=0.4, min_component_area_fraction=0.25)
"""For a mask transformer, whose masks are slightly small and sometimes join objects; see docs/experiments."""
_SCENES_PER_SIZE = 2
EMBEDDING_DIM = 64
MAX_PHOTOS = 200
"""Photos that are sufficient to fit the embedding."""
_PATCHES_PER_PHOTO = 250


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Name of an artifact, and settings that the weights do not determine."""

    name: str = "useg"
    version: str = "1"
    precision: Precision = "fp16-stored"
    score_threshold: float | None = None
    """None: the default of the network."""
    min_component_area_fraction: float | None = None
    """None: the default of the network."""
    input_sizes: tuple[InputSize, ...] = ()
    """Empty: the square that the network was trained for, or the paper's sizes."""
    low_input_sizes: tuple[InputSize, ...] = ()
    """Input sizes of detail "low"."""


def load_embedding(
    artifact: Path, contract: Contract, encoder: VisionTransformer
) -> tuple[PatchEmbedding, CategoryExamples] | None:
    """Return the embedding and the examples of an artifact, for another network with this encoder.

    Names that users gave to clusters do not apply to the clusters of another network. None, after a warning, if the
    artifact has no examples or another encoder, whose features are not comparable.
    """
    network = load_torch_network(contract, artifact) if contract.examples else None
    if not contract.examples or not isinstance(network, MaskTransformer) or network.embedding is None:
        logger.warning("%s has no examples: segments get the category of their cluster", artifact)
        return None
    if not is_same_encoder(network.encoder.state_dict(), encoder.state_dict()):
        logger.warning("%s has another encoder: its examples cannot be taken over", artifact)
        return None
    return network.embedding, replace(contract.examples, except_clusters=())


def export_run(
    run: Path,
    out: Path,
    config: ExportConfig,
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
    embedding_photos: Iterable[UInt8[np.ndarray, "H W 3"]] = (),
    examples_from: tuple[Path, Contract] | None = None,
) -> Contract:
    """Write the complete artifact, or raise and leave an existing one unchanged.

    `images` are photos on which torch and ONNX Runtime must agree, in addition to drawn scenes; only the scenes are
    stored, as golden inputs. A mask transformer takes over the embedding of patches and the examples of the artifact
    `examples_from` (its folder, and its contract with the names that apply), if its encoder is the same; else the
    embedding is fitted to `embedding_photos`, if there are any.

    Raises ConfigError if `out` is not an artifact, and ParityError, with the values, if the graph differs from torch,
    or in a batch from alone.
    """
    if out.exists() and not (out / CONTRACT_FILE).is_file():
        raise ConfigError(f"{out} exists and is not an artifact: choose another --out")
    info, network = load_run(run)
    deployed = fold_batch_norms(network) if isinstance(network, PanopticCascade) else network
    examples = None
    if isinstance(deployed, MaskTransformer):
        if examples_from and (found := load_embedding(*examples_from, deployed.encoder)):
            deployed.embedding, examples = found
        else:
            side_px = deployed.decoder.config.side_px
            deployed.embedding = fit_patch_embedding(deployed.encoder, embedding_photos, side_px)
    if config.precision != "fp32":
        round_to_fp16(deployed)
    if config.precision == "int8-stored":
        round_to_int8(deployed)
    contract = replace(make_contract(info, deployed, config), examples=examples)
    tolerance, export_tolerance = FP32_TOLERANCE, EXPORT_TOLERANCE
    if config.precision == "fp16":
        tolerance = export_tolerance = FP16_TOLERANCE
    with atomic_directory(out) as folder:
        write_graph(deployed, contract.all_input_sizes, config.precision, folder / NETWORK_FILE)
        session = OnnxSession(folder / NETWORK_FILE, threads=torch.get_num_threads())
        session.check_contract(contract)
        logger.info("wrote %s; comparing it with torch, alone and in batches", NETWORK_FILE)
        contract.provenance["parity"] = _check_outputs(deployed, session, contract, export_tolerance, images)
        scenes = [draw_scene(seed, contract.input_sizes[0]) for seed in range(_SCENES_PER_SIZE)]
        write_golden(session, *stack_images(scenes), folder / GOLDEN_FILE)
        check_golden(session, folder / GOLDEN_FILE, tolerance)
        files = {file: hash_file(folder / file) for file in (NETWORK_FILE, GOLDEN_FILE)}
        contract = replace(contract, files=files)
        contract.write(folder)
    return contract


def make_contract(info: RunInfo, network: Network, config: ExportConfig) -> Contract:
    """Return the contract of the artifact, without its files."""
    _check_input_sizes((*config.input_sizes, *config.low_input_sizes), network.side_multiple_px)
    match network:
        case MaskTransformer():
            own = _describe_transformer(network)
        case PanopticCascade():
            own = _describe_cascade(network, info)
    contract = Contract(
        name=config.name,
        version=config.version,
        network=info.network,
        low_input_sizes=config.low_input_sizes,
        precision=config.precision,
        embedding_dim=network.embedding_dim,
        provenance={**copy.deepcopy(info.provenance), "steps": info.step, "train_config": info.train_config},
        **own,
    )
    chosen = {
        name: value
        for name in ("score_threshold", "min_component_area_fraction")
        if (value := getattr(config, name)) is not None
    }
    input_sizes = config.input_sizes or contract.input_sizes
    return replace(contract, thresholds=replace(contract.thresholds, **chosen), input_sizes=input_sizes)


def _check_input_sizes(sizes: Sequence[InputSize], multiple_px: int) -> None:
    for size in sizes:
        shortest = min(size.height_px, size.width_px)
        if shortest < 1 or size.height_px % multiple_px or size.width_px % multiple_px:
            raise ConfigError(f"input size {size.height_px}x{size.width_px}: expected multiples of {multiple_px} px")
        if len(sizes) > 1 and shortest < MIN_DYNAMIC_SIDE_PX:
            raise ConfigError(f"with several input sizes, sides must be at least {MIN_DYNAMIC_SIDE_PX} px")


def _describe_transformer(network: MaskTransformer) -> dict[str, Any]:
    decoder = network.decoder.config
    return {
        "input_sizes": (InputSize.square(decoder.side_px),),
        "stride_px": MASK_STRIDE_PX,
        "max_detections": decoder.num_queries,
        "thing_clusters": decoder.thing_clusters,
        "stuff_clusters": decoder.stuff_clusters,
        "embedding_stride_px": network.encoder.config.patch_px,
        "network_config": {"decoder": asdict(decoder), "encoder": asdict(network.encoder.config)},
        "thresholds": TRANSFORMER_THRESHOLDS,
    }


def _describe_cascade(network: PanopticCascade, info: RunInfo) -> dict[str, Any]:
    return {
        "input_sizes": (InputSize.square(info.side_px),) if info.side_px else PAPER_INPUT_SIZES,
        "stride_px": STAGE_STRIDES_PX[0],
        "max_detections": network.inference.detections.max_detections,
        "thing_clusters": network.config.thing_clusters,
        "stuff_clusters": network.config.stuff_clusters,
        "box_mask_size": MASK_SIZE,
        "network_config": {"cascade": asdict(network.config), "inference": asdict(network.inference)},
        "thresholds": Thresholds(score_threshold=0.5),  # detectron2's confidence threshold for panoptic maps
    }


def _check_outputs(
    network: Network,
    session: Session,
    contract: Contract,
    tolerance: Tolerance,
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
) -> dict[str, float]:
    """Compare with torch, and batches of the first input size; returns the worst differences from torch."""
    inputs = [draw_scene(seed, size) for size in contract.all_input_sizes for seed in range(_SCENES_PER_SIZE)]
    inputs += [prepare_image(image, contract).inputs[0] for image in images]
    worst = check_parity(TorchSession(network), session, inputs, contract, tolerance)
    check_batch_invariance(session, inputs, tolerance)
    return worst


def draw_scene(seed: int, input_size: InputSize) -> NetworkInput:
    """Draw a synthetic image, equal on every machine: a gradient with a few bright ellipses."""
    generator = np.random.default_rng(seed)
    height, width = input_size.height_px, input_size.width_px
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    scene = np.stack([80 + 90 * rows, 110 + 40 * columns, 150 - 60 * rows])
    for _ in range(3):
        x, y, radius = generator.uniform(0.2, 0.8), generator.uniform(0.2, 0.8), generator.uniform(0.08, 0.2)
        stretch = generator.uniform(0.6, 1.6)
        inside = ((columns - x) / stretch) ** 2 + (rows - y) ** 2 < radius**2
        scene[:, inside] = generator.uniform(20, 235, (3, 1)) * (0.8 + 0.2 * rows[inside])
    return NetworkInput(pixels=scene.clip(0, 255).astype(np.uint8), size=(height, width))


@torch.no_grad()
def fit_patch_embedding(
    encoder: VisionTransformer, photos: Iterable[UInt8[np.ndarray, "H W 3"]], side_px: int
) -> PatchEmbedding | None:
    """Return the embedding whose values have mean 0 and variance 1 on patches of these photos; None without photos.

    They are the principal components with the largest variance.
    """
    generator = np.random.default_rng(0)
    samples = []
    for photo in photos:
        pixels, letterbox = letterbox_image(photo, [InputSize.square(side_px)], MASK_STRIDE_PX)
        features = encoder(normalize(torch.from_numpy(pixels[None])), embedding_layers(encoder.config.depth))
        rows, columns = (-(-side // encoder.config.patch_px) for side in letterbox.size)
        width = side_px // encoder.config.patch_px
        inside = (np.arange(rows)[:, None] * width + np.arange(columns)).ravel()
        chosen = generator.permutation(inside)[:_PATCHES_PER_PHOTO]
        samples.append(PatchEmbedding.join(features)[0, torch.from_numpy(chosen)])
    if not samples:
        return None
    sample = torch.cat(samples).double().numpy()
    dim = min(EMBEDDING_DIM, len(sample) - 1)
    mean, projection = fit_whitening(sample, dim)
    embedding = PatchEmbedding(encoder.config, dim)
    embedding.projection.weight.copy_(torch.from_numpy(projection.T))
    embedding.projection.bias.copy_(torch.from_numpy(-mean @ projection))
    return embedding.eval().requires_grad_(False)
