"""A run: what a fit leaves behind, everything that an export needs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from model.checkpoints import load_encoder, load_exactly, read_state
from model.contract import reject_unknown
from model.errors import CheckpointError, ConfigError
from model.files import replace_file
from model.network.mask_transformer import DecoderShape, MaskDecoder, MaskTransformer

RUN_FILE = "run.json"
DECODER_FILE = "decoder.safetensors"
ENCODER_STEM = "encoder"


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What a run says about itself."""

    decoder: DecoderShape
    encoder_file: str
    """Name of the encoder's file inside the run."""
    step: int
    """Optimiser steps behind the decoder's weights."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where encoder, photos and labels come from; goes into the contract."""
    fit: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the fit."""


def write_run(run: Path, card: RunCard, decoder: MaskDecoder) -> None:
    """Replace the run's card and decoder; the card last, so that a run with a card is whole."""
    with replace_file(run / DECODER_FILE) as sibling:
        save_file({name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}, sibling)
    with replace_file(run / RUN_FILE) as sibling:
        sibling.write_text(json.dumps(asdict(card), indent=2) + "\n")


def read_run_card(run: Path) -> RunCard:
    """Raises CheckpointError if the folder is no finished run."""
    path = run / RUN_FILE
    try:
        content = json.loads(path.read_bytes())
        reject_unknown(content, RunCard)
        shape = content.pop("decoder")
        reject_unknown(shape, DecoderShape)
        return RunCard(decoder=DecoderShape(**shape), **content)
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} is not the card of a finished run: {error}") from error


def load_run(run: Path) -> tuple[RunCard, MaskTransformer]:
    """The network of a run, ready for inference. Raises CheckpointError if a file is missing or does not fit."""
    card = read_run_card(run)
    encoder = load_encoder(str(run / card.encoder_file), card.decoder.side_px)
    decoder = MaskDecoder(card.decoder, encoder.shape)
    load_exactly(decoder, read_state(run / DECODER_FILE))
    return card, MaskTransformer(encoder, decoder).eval()
