import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.errors import CheckpointError, ConfigError, TrainingError
from model.run import load_run, read_run_card
from training.fitting.fit import fit
from training.fitting.loop.trainer import Trainer
from training.fitting.transformer.data import Batch
from training.fitting.transformer.recipe import PRESETS, FitConfig
from training.fitting.transformer.trainee import TransformerTrainee, schedule
from training.labels.store import LabelStore

TINY = PRESETS["tiny"]


def begin(store: LabelStore, run: Path, recipe: FitConfig = TINY) -> Trainer[Batch]:
    return Trainer(TransformerTrainee(store, store.features, run, recipe), run)


def read_totals(run: Path) -> list[tuple[str, str]]:
    with (run / "history.csv").open(newline="") as stream:
        return [(row["step"], row["total"]) for row in csv.DictReader(stream)]


def test_a_fit_killed_between_checkpoints_gives_the_same_losses_as_one_that_was_not(
    tmp_path: Path, tiny_store: LabelStore, tiny_run: Path
) -> None:
    run = tmp_path / "run"
    killed = begin(tiny_store, run)
    batches = killed.batches()
    for _ in range(2):
        killed.advance(next(batches))
    killed.save()
    killed.advance(next(batches))  # a step that no checkpoint saw
    batches.close()
    (run / "history.csv").write_text((tiny_run / "history.csv").read_text())  # with rows of lost steps
    report = fit(tiny_store, tiny_store.features, run, TINY)
    assert report.step == 4
    assert read_totals(run) == read_totals(tiny_run)
    whole, resumed = load_run(tiny_run)[1].state_dict(), load_run(run)[1].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_fit_is_not_done_again(tiny_store: LabelStore, tiny_run: Path) -> None:
    before = (tiny_run / "decoder.safetensors").stat().st_mtime_ns
    assert fit(tiny_store, tiny_store.features, tiny_run, TINY).step == 4
    assert (tiny_run / "decoder.safetensors").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_run_is_refused(tiny_store: LabelStore, tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="begun with another learning_rate"):
        begin(tiny_store, tiny_run, replace(TINY, learning_rate=1.0))


def test_another_label_store_in_the_same_run_is_refused(tmp_path: Path, tiny_store: LabelStore, tiny_run: Path) -> None:
    other = LabelStore(Path(shutil.copytree(tiny_store.folder, tmp_path / "store")))
    content = json.loads((other.folder / "label.json").read_text())
    (other.folder / "label.json").write_text(json.dumps({**content, "threshold": 0.5}))
    with pytest.raises(ConfigError, match="begun with another label store"):
        begin(other, tiny_run)


def test_rows_of_a_fit_killed_before_its_first_checkpoint_are_forgotten(tmp_path: Path, tiny_store: LabelStore) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "history.csv").write_text("step,total\n1,9.9\n2,9.9\n")
    fit(tiny_store, tiny_store.features, run, TINY, metrics=tmp_path / "fit.prom")
    assert [step for step, _ in read_totals(run)] == ["1", "2", "3", "4"]
    assert f'seg_fit_step{{run="{run}"}} 4.0\n' in (tmp_path / "fit.prom").read_text()


def test_a_changed_encoder_is_refused(tmp_path: Path, tiny_store: LabelStore, tiny_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    with (run / "encoder.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CheckpointError, match="not the encoder"):
        begin(tiny_store, run)


def test_a_loss_that_is_not_finite_stops_the_fit_and_names_the_photos(tmp_path: Path, tiny_store: LabelStore) -> None:
    trainee = TransformerTrainee(tiny_store, tiny_store.features, tmp_path / "run", TINY)
    state = Trainer(trainee, tmp_path / "run", metrics=tmp_path / "fit.prom")
    batch = next(state.batches())
    batch.features[:] = torch.nan
    with pytest.raises(TrainingError, match=r"nan at step 0, on \d\.png, \d\.png"):
        state.advance(batch)
    assert f'seg_fit_not_finite{{run="{tmp_path / "run"}"}} 1.0\n' in (tmp_path / "fit.prom").read_text()


def test_the_run_says_where_it_comes_from_and_holds_no_path(tiny_run: Path, tiny_store: LabelStore) -> None:
    card = read_run_card(tiny_run)
    assert card.step == 4
    assert card.provenance["photos"]["count"] == 8
    assert card.provenance["photos"]["note"] == "drawn"
    assert card.provenance["encoder"]["sha256"] == tiny_store.read_config().encoder_hash
    assert "/" not in json.dumps(card.provenance)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    config = FitConfig(steps=100, warm_up=0.1)
    assert schedule(0, config) == pytest.approx(0.1)
    assert schedule(9, config) == pytest.approx(1.0)
    assert schedule(55, config) == pytest.approx(0.5)
    assert schedule(99, config) < 0.01


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch": -1}, {"warm_up": 1.5}, {"paste_rate": -0.1}, {"clip": 0.0}])
def test_recipes_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(TINY, **change)  # type: ignore[arg-type]
