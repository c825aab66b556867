"""A run that was trained without labels, taught the categories of a labelled set by a share of its pictures."""

from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import ConfigError
from model.files import hash_file
from model.network.mask_transformer import DecoderShape
from model.run import WEIGHT_FILES, read_run_card
from model.weights.checkpoints import load_encoder
from training.features import fill_cache, open_cache
from training.fitting.annotations import draw_pictures, name_given, store_annotations
from training.fitting.fit import fit
from training.fitting.transformer.recipe import FitConfig
from training.labels.store import LabelStore
from training.scores.truth import Truth

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


def finetune(
    start: Path, truth: Truth, fraction: float, out: Path, recipe: FitConfig, features: Path | None = None
) -> FinetuneReport:
    """Fit to that share of the set, from the weights of the run `start`; what `fit` says of being killed holds here.

    The paper's protocol (section 4.5): the heads of classes begin anew, the rest goes on from where it was.
    Raises ConfigError if the set is not panoptic, or `start` is no mask transformer.
    """
    card = read_run_card(start)
    if not isinstance(card.shape, DecoderShape):
        raise ConfigError(f"{start} is a {card.network}: a mask transformer can be fine-tuned")
    encoder_file, side_px = start / card.encoder_file, card.shape.side_px
    encoder = load_encoder(str(encoder_file), side_px)
    store = LabelStore(out / STORE_FOLDER)
    pictures = draw_pictures(truth, fraction, recipe.seed)
    photos = store_annotations(truth, pictures, encoder_file, side_px, store)
    folder = features or store.features
    fill_cache(open_cache(folder, hash_file(encoder_file), side_px), photos, encoder, side_px)
    shaped = replace(recipe, queries=card.shape.queries, layers=card.shape.layers)
    report = fit(store, folder, out, shaped, start=start)
    weights = hash_file(out / WEIGHT_FILES[card.network])
    name_given(truth, store, weights).write(out / NAMES_FILE)
    return FinetuneReport(step=report.step, pictures=len(pictures), names=str(out / NAMES_FILE), losses=report.losses)
