from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from model.errors import ConfigError
from model.files import hash_file
from model.network.mask_transformer import MaskDecoder
from model.run import load_run, read_run_card
from model.weights.checkpoints import read_state
from training.fitting.finetune import finetune, open_start
from training.fitting.finetune_recipe import plan_finetune
from training.fitting.loop.warm_start import warm_start
from training.fitting.transformer.recipe import PRESETS
from training.scores.evaluate import evaluate
from training.scores.meetings.answers import open_source
from training.scores.meetings.comparison import hash_photo
from training.scores.naming.names import read_names
from training.scores.naming.naming import MatchPlan
from training.scores.sets.layouts import TruthSet

RECIPE = replace(PRESETS["tiny"], steps=2, learning_rate=1e-6)


@pytest.mark.parametrize(
    ("fraction", "steps"), [(0.005, 3600), (0.01, 3600), (0.03, 4500), (0.1, 9000), (0.5, 45_000), (1.0, 45_000)]
)
def test_the_published_number_of_steps_goes_with_the_share(fraction: float, steps: int) -> None:
    recipe = plan_finetune(fraction, PRESETS["cpu"])
    assert recipe.steps == steps
    assert (recipe.targets, recipe.doubt, recipe.drops_unknown, recipe.embeds) == ("merged", 0.0, False, False)


def test_a_run_is_taught_a_set_and_scored_on_what_it_did_not_see(tmp_path: Path, tiny_run: Path) -> None:
    folder = tiny.draw_truth(tmp_path / "set")
    truth = TruthSet(folder=folder).read()
    report = finetune(tiny_run, truth, 0.5, tmp_path / "run", RECIPE)
    assert (report.step, report.pictures) == (2, 2)

    card, network = load_run(tmp_path / "run")
    assert (card.shape.thing_clusters, card.shape.stuff_clusters) == (1, 1)
    start = card.provenance["start"]
    assert start["steps"] == read_run_card(tiny_run).step
    assert [name for name in start["drawn"] if "class_head" not in name and "semantic" not in name] == []
    before, after = read_state(tiny_run / "decoder.safetensors"), network.decoder.state_dict()
    assert torch.allclose(before["queries"], after["queries"], atol=1e-4)  # two steps of 1e-6 away, not drawn anew

    names = read_names(Path(report.names))
    source = open_source(tmp_path / "run", threads=1)
    with pytest.raises(ConfigError, match="fitted on 2 of the 4 photos"):
        evaluate(source, truth, MatchPlan(names=names))
    unseen = tuple(each for each in truth.pictures if names.fitted_on.count_shared([hash_photo(each)]) == 0)
    scored, _ = evaluate(source, replace(truth, pictures=unseen), MatchPlan(names=names))
    assert scored.summary.pictures == 2
    assert not scored.summary.matching.scored_what_was_fitted


def test_an_artifact_is_taught_with_the_encoder_that_it_was_made_with(
    tmp_path: Path, tiny_artifact: Path, tiny_encoder: Path
) -> None:
    truth = TruthSet(folder=tiny.draw_truth(tmp_path / "set")).read()
    report = finetune(tiny_artifact, truth, 0.5, tmp_path / "run", RECIPE, encoder=tiny_encoder)
    assert (report.step, report.pictures) == (2, 2)
    start = read_run_card(tmp_path / "run").provenance["start"]
    assert start["sha256"] == hash_file(tiny_artifact / "network.onnx")


def test_an_artifact_wants_its_own_encoder_and_a_run_none(
    tmp_path: Path, tiny_artifact: Path, tiny_run: Path, tiny_encoder: Path
) -> None:
    with pytest.raises(ConfigError, match="give the --encoder that it was made with"):
        open_start(tiny_artifact)
    with pytest.raises(ConfigError, match="is not the encoder of"):
        open_start(tiny_artifact, tiny_artifact / "network.onnx")
    with pytest.raises(ConfigError, match="has its encoder"):
        open_start(tiny_run, tiny_encoder)


def test_a_finished_finetuning_is_not_done_again(tmp_path: Path, tiny_run: Path) -> None:
    truth = TruthSet(folder=tiny.draw_truth(tmp_path / "set")).read()
    finetune(tiny_run, truth, 0.5, tmp_path / "run", RECIPE)
    written = (tmp_path / "run" / "decoder.safetensors").read_bytes()
    assert finetune(tiny_run, truth, 0.5, tmp_path / "run", RECIPE).step == 2
    assert (tmp_path / "run" / "decoder.safetensors").read_bytes() == written


def test_a_cascade_is_no_start(tmp_path: Path, tiny_cascade_run: Path) -> None:
    truth = TruthSet(folder=tiny.draw_truth(tmp_path / "set")).read()
    with pytest.raises(ConfigError, match="is a panoptic_cascade"):
        finetune(tiny_cascade_run, truth, 0.5, tmp_path / "run", RECIPE)


def test_a_run_with_few_parameters_in_common_is_no_start(tmp_path: Path, tiny_run: Path) -> None:
    shape = replace(read_run_card(tiny_run).shape, width=64)
    decoder = MaskDecoder(shape, tiny.SHAPE)
    with pytest.raises(ConfigError, match="not a start for it"):
        warm_start(decoder, "mask_transformer", tiny_run)
