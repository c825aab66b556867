"""A run to an artifact: one ONNX graph, its contract and its golden answers, refused unless they agree."""

import copy
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import UInt8
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from model.contract import CONTRACT_FILE, GOLDEN_FILE, NETWORK_FILE, Contract, Thresholds
from model.errors import ConfigError
from model.files import hash_file, replace_directory
from model.network.mask_transformer import STRIDE_PX, MaskTransformer
from model.parity import Agreement, compare, decide
from model.raw import PARTS, Raw
from model.run import RunCard, load_run
from model.runtime import OnnxSession, Session, check_golden, write_golden

logger = logging.getLogger(__name__)

BATCHES = (1, 2, 3, 5)
_GOLDEN_PICTURES = 2
_LEAST_WEIGHTS = 1024
"""Smaller tensors stay fp32: nothing to gain."""


def export_run(
    run: Path, out: Path, *, name: str, version: str, thresholds: Thresholds, pictures: list[UInt8[np.ndarray, "3 S S"]]
) -> Contract:
    """Write the artifact whole, or raise and leave what was there.

    `pictures` are placed photos on which torch and ONNX Runtime must agree; drawn scenes are added, and are the only
    ones that the artifact keeps. Weights are stored as fp16 and computed with as fp32.
    Raises ConfigError if `out` is something else than an artifact, and ParityError, with the figures, if the graph
    answers otherwise than torch, or otherwise in a batch than alone.
    """
    if out.exists() and not (out / CONTRACT_FILE).is_file():
        raise ConfigError(f"{out} exists and is no artifact: choose another --out")
    card, network = load_run(run)
    _round_to_half(network)
    side = card.decoder.side_px
    scenes = [draw_scene(seed, side) for seed in range(_GOLDEN_PICTURES)]
    with replace_directory(out) as folder:
        write_graph(network, folder / NETWORK_FILE)
        session = OnnxSession(folder / NETWORK_FILE, threads=torch.get_num_threads())
        agreement = check_parity(network, session, np.stack(scenes + pictures))
        check_batches(session, (scenes + pictures)[: max(BATCHES)])
        write_golden(session, np.stack(scenes), folder / GOLDEN_FILE)
        check_golden(session, folder / GOLDEN_FILE)
        contract = _make_contract(card, folder, name, version, thresholds, agreement)
        session.check_contract(contract)
        contract.write(folder)
    return contract


def write_graph(network: MaskTransformer, path: Path) -> None:
    """One static graph with a dynamic batch axis; fp32 weights that fp16 holds exactly are stored as fp16."""
    side = network.decoder.shape.side_px
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own dependencies
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["pixels"],
            output_names=PARTS,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=1024)}},
            opset_version=18,
        )
    assert program is not None, "the exporter gave no program"
    graph = program.model_proto
    _store_as_half(graph)
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def check_parity(network: MaskTransformer, session: Session, pixels: UInt8[np.ndarray, "B 3 S S"]) -> Agreement:
    """How far torch and the session are apart on these pictures; raises ParityError if too far."""
    answers = []
    for picture in pixels:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(picture[None]))
        answers.append(Raw(**{key: value[0].numpy() for key, value in outputs._asdict().items()}))
    alone = [session.run(picture[None])[0] for picture in pixels]
    agreement = compare(decide(answers), decide(alone))
    agreement.require(f"torch and {session.backend} on {len(pixels)} pictures")
    logger.info("torch and %s on %d pictures: %s", session.backend, len(pixels), agreement)
    return agreement


def check_batches(session: Session, pictures: list[UInt8[np.ndarray, "3 S S"]]) -> None:
    """Raise ParityError unless each picture has the same answer alone and at every position of every batch size."""
    alone = [session.run(picture[None])[0] for picture in pictures]
    for size in BATCHES:
        for shift in range(size):
            order = [(shift + index) % len(pictures) for index in range(size)]
            together = session.run(np.stack([pictures[index] for index in order]))
            for index, answer in zip(order, together, strict=True):
                agreement = compare(decide([alone[index]]), decide([answer]))
                agreement.require(f"picture {index} alone and in a batch of {size}")


def draw_scene(seed: int, side: int) -> UInt8[np.ndarray, "3 S S"]:
    """A made-up picture, the same on every machine: a shaded ground with a few bright shapes on it."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:side, 0:side] / side
    scene = np.stack([80 + 90 * rows, 110 + 40 * columns, 150 - 60 * rows])
    for _ in range(3):
        x, y, radius = generator.uniform(0.2, 0.8), generator.uniform(0.2, 0.8), generator.uniform(0.08, 0.2)
        stretch = generator.uniform(0.6, 1.6)
        inside = ((columns - x) / stretch) ** 2 + (rows - y) ** 2 < radius**2
        scene[:, inside] = generator.uniform(20, 235, (3, 1)) * (0.8 + 0.2 * rows[inside])
    return scene.clip(0, 255).astype(np.uint8)


def _make_contract(
    card: RunCard, folder: Path, name: str, version: str, thresholds: Thresholds, agreement: Agreement
) -> Contract:
    provenance: dict[str, Any] = {
        **copy.deepcopy(card.provenance),
        "steps": card.step,
        "fit": card.fit,
        "parity": asdict(agreement),
    }
    contract = Contract(
        name=name,
        version=version,
        network="mask_transformer",
        side_px=card.decoder.side_px,
        stride_px=STRIDE_PX,
        detections=card.decoder.queries,
        thing_clusters=card.decoder.thing_clusters,
        stuff_clusters=card.decoder.stuff_clusters,
        thresholds=thresholds,
        provenance=provenance,
    )
    return replace(contract, files={file: hash_file(folder / file) for file in (NETWORK_FILE, GOLDEN_FILE)})


def _round_to_half(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.numel() >= _LEAST_WEIGHTS:
            parameter.data = parameter.data.half().float()


def _store_as_half(model: onnx.ModelProto) -> None:
    """Keep large fp32 weights as fp16 behind a Cast, which ONNX Runtime folds once at loading."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        halved = values.astype(np.float16)
        if values.size < _LEAST_WEIGHTS or not np.array_equal(halved.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(halved, f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for position, cast in enumerate(casts):
        model.graph.node.insert(position, cast)
