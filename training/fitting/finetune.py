"""A run that was trained without labels, taught the categories of a labelled set by a share of its pictures."""

from dataclasses import dataclass, replace
from pathlib import Path

from model.contract import CONTRACT_FILE, read_contract
from model.errors import ConfigError
from model.files import hash_file
from model.network.mask_transformer import DecoderShape
from model.run import WEIGHT_FILES, parse_fields, read_run_card
from model.weights.checkpoints import load_encoder
from training.features import fill_cache, open_cache
from training.fitting.annotations import draw_pictures, name_given, store_annotations
from training.fitting.fit import fit
from training.fitting.transformer.recipe import FitConfig
from training.labels.store import LabelStore
from training.scores.sets.truth import Truth

STORE_FOLDER = "annotations"
NAMES_FILE = "names.json"


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """What was taught."""

    step: int
    pictures: int
    names: str
    """File of names, for `useg-train eval`; it knows the pictures, so that none of them is scored."""
    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is fine-tuned."""

    shape: DecoderShape
    encoder: Path
    """File of its encoder, which stays as it is."""


def open_start(folder: Path, encoder: Path | None = None) -> Start:
    """A run, or an artifact with the file of the encoder that it was made with: that is not whole in an artifact.

    Raises ConfigError if it is no mask transformer, or if the encoder is missing, superfluous or another.
    """
    if not (folder / CONTRACT_FILE).is_file():
        if encoder is not None:
            raise ConfigError(f"{folder} is a run and has its encoder: leave {encoder} out")
        card = read_run_card(folder)
        return Start(shape=_require_decoder(folder, card.network, card.shape), encoder=folder / card.encoder_file)
    contract = read_contract(folder)
    origin = contract.provenance.get("encoder", {})
    if encoder is None:
        raise ConfigError(f"{folder} is an artifact: give the --encoder that it was made with ({origin.get('origin')})")
    if hash_file(encoder) != origin.get("sha256"):
        raise ConfigError(f"{encoder} is not the encoder of {folder}, whose sha256 is {origin.get('sha256')}")
    made = parse_fields(contract.settings.get("decoder", {}), DecoderShape)
    shape = DecoderShape(**made) if made else None
    return Start(shape=_require_decoder(folder, contract.network, shape), encoder=encoder)


def finetune(
    start: Path,
    truth: Truth,
    fraction: float,
    out: Path,
    recipe: FitConfig,
    features: Path | None = None,
    encoder: Path | None = None,
) -> FinetuneReport:
    """Fit to that share of the set, from the weights of `start`; what `fit` says of being killed holds here.

    The paper's protocol (section 4.5): the heads of classes begin anew, the rest goes on from where it was.
    Raises ConfigError if the set is not panoptic, and what `open_start` raises.
    """
    opened = open_start(start, encoder)
    side_px = opened.shape.side_px
    network = load_encoder(str(opened.encoder), side_px)
    store = LabelStore(out / STORE_FOLDER)
    pictures = draw_pictures(truth, fraction, recipe.seed)
    photos = store_annotations(truth, pictures, opened.encoder, side_px, store)
    folder = features or store.features
    fill_cache(open_cache(folder, hash_file(opened.encoder), side_px), photos, network, side_px)
    shaped = replace(recipe, queries=opened.shape.queries, layers=opened.shape.layers)
    report = fit(store, folder, out, shaped, start=start)
    weights = hash_file(out / WEIGHT_FILES["mask_transformer"])
    name_given(truth, store, weights).write(out / NAMES_FILE)
    return FinetuneReport(step=report.step, pictures=len(pictures), names=str(out / NAMES_FILE), losses=report.losses)


def _require_decoder(folder: Path, network: str, shape: object) -> DecoderShape:
    if not isinstance(shape, DecoderShape):
        raise ConfigError(f"{folder} is a {network}: a mask transformer can be fine-tuned")
    return shape
