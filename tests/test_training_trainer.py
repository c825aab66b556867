import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD

from model.checkpoints.runs import load_run, read_run_info
from model.contract import read_contract
from model.errors import CheckpointError, ConfigError, TrainingError
from model.networks.mask_transformer import MaskDecoder
from training.data.dataset import PseudoLabelDataset
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS, MaskTransformerTrainConfig
from training.mask_transformer.feature_dataset import DecoderBatch
from training.mask_transformer.task import MaskTransformerTask, schedule
from training.train import train
from training.trainer.checkpoint import load_checkpoint, read_facts, warm_start, write_checkpoint
from training.trainer.trainer import Trainer, update_ema

TINY = MASK_TRANSFORMER_PRESETS["tiny"]


def begin(store: PseudoLabelDataset, run: Path, recipe: MaskTransformerTrainConfig = TINY) -> Trainer[DecoderBatch]:
    return Trainer(MaskTransformerTask(store, store.features, run, recipe), run)


def read_totals(run: Path) -> list[tuple[str, str]]:
    with (run / "history.csv").open(newline="") as stream:
        return [(row["step"], row["total"]) for row in csv.DictReader(stream)]


def test_a_fit_killed_between_checkpoints_gives_the_same_losses_as_one_that_was_not(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_run: Path
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
    report = train(tiny_store, tiny_store.features, run, TINY)
    assert report.step == 4
    assert read_totals(run) == read_totals(tiny_run)
    whole, resumed = load_run(tiny_run)[1].state_dict(), load_run(run)[1].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_fit_is_not_done_again(tiny_store: PseudoLabelDataset, tiny_run: Path) -> None:
    before = (tiny_run / "decoder.safetensors").stat().st_mtime_ns
    assert train(tiny_store, tiny_store.features, tiny_run, TINY).step == 4
    assert (tiny_run / "decoder.safetensors").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_run_is_refused(tiny_store: PseudoLabelDataset, tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="begun with another learning_rate"):
        begin(tiny_store, tiny_run, replace(TINY, learning_rate=1.0))


def test_another_label_store_in_the_same_run_is_refused(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_run: Path
) -> None:
    other = PseudoLabelDataset(Path(shutil.copytree(tiny_store.folder, tmp_path / "store")))
    content = json.loads((other.folder / "label.json").read_text())
    (other.folder / "label.json").write_text(json.dumps({**content, "maskcut_tau": 0.5}))
    with pytest.raises(ConfigError, match="begun with another label store"):
        begin(other, tiny_run)


def test_rows_of_a_fit_killed_before_its_first_checkpoint_are_forgotten(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "history.csv").write_text("step,total\n1,9.9\n2,9.9\n")
    train(tiny_store, tiny_store.features, run, TINY, metrics=tmp_path / "fit.prom")
    assert [step for step, _ in read_totals(run)] == ["1", "2", "3", "4"]
    assert f'seg_fit_step{{run="{run}"}} 4.0\n' in (tmp_path / "fit.prom").read_text()


def test_a_changed_encoder_is_refused(tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    with (run / "encoder.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CheckpointError, match="not the encoder"):
        begin(tiny_store, run)


def test_a_loss_that_is_not_finite_stops_the_fit_and_names_the_photos(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    trainee = MaskTransformerTask(tiny_store, tiny_store.features, tmp_path / "run", TINY)
    state = Trainer(trainee, tmp_path / "run", metrics=tmp_path / "fit.prom")
    batch = next(state.batches())
    batch.features[:] = torch.nan
    with pytest.raises(TrainingError, match=r"nan at step 0, on \d\.png, \d\.png"):
        state.advance(batch)
    assert f'seg_fit_not_finite{{run="{tmp_path / "run"}"}} 1.0\n' in (tmp_path / "fit.prom").read_text()


def test_the_run_says_where_it_comes_from_and_holds_no_path(tiny_run: Path, tiny_store: PseudoLabelDataset) -> None:
    card = read_run_info(tiny_run)
    assert card.step == 4
    assert card.provenance["photos"]["count"] == 8
    assert card.provenance["photos"]["note"] == "drawn"
    assert card.provenance["encoder"]["sha256"] == tiny_store.read_config().encoder_hash
    assert "/" not in json.dumps(card.provenance)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    config = MaskTransformerTrainConfig(steps=100, warm_up=0.1)
    assert schedule(0, config) == pytest.approx(0.1)
    assert schedule(9, config) == pytest.approx(1.0)
    assert schedule(55, config) == pytest.approx(0.5)
    assert schedule(99, config) < 0.01


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch": -1}, {"warm_up": 1.5}, {"paste_rate": -0.1}, {"clip": 0.0}])
def test_recipes_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(TINY, **change)  # type: ignore[arg-type]


def fill(value: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(1)
    for tensor in norm.state_dict().values():
        tensor.fill_(value)
    return norm


def test_the_average_follows_quickly_at_first_and_then_by_the_decay() -> None:
    average = fill(0.0)
    update_ema(average, fill(10.0), 0.5, 0)
    assert float(average.weight.detach()) == pytest.approx(9.0)  # a tenth of the start is left
    update_ema(average, fill(20.0), 0.5, 1000)
    assert float(average.weight.detach()) == pytest.approx(14.5)
    assert float(average.running_mean) == pytest.approx(14.5)
    assert int(average.num_batches_tracked) == 20


def test_the_average_takes_no_gradient() -> None:
    average, module = nn.Linear(1, 1), nn.Linear(1, 1)
    update_ema(average, module, 0.9, 5)
    assert average.weight.grad_fn is None
    assert not torch.equal(average.weight, module.weight)


def make(value: float) -> tuple[nn.Sequential, SGD, nn.Sequential]:
    """A frozen layer before a trained one, both of one value, its optimiser after a step, and an average."""
    module, average = (nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(2))
    module[0].requires_grad_(False)
    for each, number in ((module, value), (average, 10 * value)):
        for tensor in each.state_dict().values():
            tensor.fill_(number)
    optimiser = SGD(module[1].parameters(), lr=0.0, momentum=0.9)
    module(torch.ones(1, 1)).sum().backward()
    optimiser.step()
    return module, optimiser, average


def test_what_is_trained_its_momentum_and_its_average_come_back_and_what_is_frozen_stays(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    module, optimiser, average = make(1.0)
    write_checkpoint(path, module, optimiser, {"step": 3}, average)
    assert read_facts(path) == {"step": 3}
    assert not [name for name in load_file(path) if name.startswith(("decoder.0.", "average.0."))]
    other, resumed, other_average = make(2.0)
    load_checkpoint(path, other, resumed, other_average)
    assert [float(each.weight.detach()) for each in (other[0], other[1])] == [2.0, 1.0]
    assert [float(each.weight.detach()) for each in (other_average[0], other_average[1])] == [20.0, 10.0]
    momenta = [float(entry["momentum_buffer"].sum()) for entry in resumed.state_dict()["state"].values()]
    assert momenta == [2.0, 1.0]  # of the weight, whose input was 2, and of the bias


def test_a_checkpoint_without_the_average_that_is_wished_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    module, optimiser, average = make(1.0)
    write_checkpoint(path, module, optimiser, {"step": 3})
    with pytest.raises(CheckpointError, match=r"missing 1\.weight"):
        load_checkpoint(path, module, optimiser, average)


def test_an_artifact_starts_a_fit_as_its_run_does_but_for_rounding(tiny_run: Path, tiny_artifact: Path) -> None:
    card, network = load_run(tiny_run)
    decoders = [MaskDecoder(network.decoder.config, network.encoder.config) for _ in range(2)]
    first = warm_start(decoders[0], "mask_transformer", tiny_run)
    second = warm_start(decoders[1], "mask_transformer", tiny_artifact)
    assert first.drawn == ()
    assert {name.split(".")[0] for name in second.drawn} == {"patch_mask"}  # which training alone uses
    assert second.step == first.step == card.step
    assert second.sha256 == read_contract(tiny_artifact).files["network.onnx"]
    states = [decoder.state_dict() for decoder in decoders]
    for name in set(states[0]) - set(second.drawn):
        # stored as fp16: eleven bits
        torch.testing.assert_close(states[1][name], states[0][name], rtol=2**-11, atol=2**-24)


def test_an_artifact_of_another_network_or_of_int8_is_no_start(tmp_path: Path, tiny_artifact: Path) -> None:
    with pytest.raises(ConfigError, match="is a mask_transformer: a panoptic_cascade cannot start from it"):
        warm_start(torch.nn.Linear(1, 1), "panoptic_cascade", tiny_artifact)
    contract = read_contract(tiny_artifact)
    files = {name: contract.files["golden.npz"] for name in ("network.xml", "network.bin", "golden.npz")}
    for name in files:
        (tmp_path / name).write_bytes((tiny_artifact / "golden.npz").read_bytes())
    replace(contract, precision="int8", files=files).write(tmp_path)
    with pytest.raises(ConfigError, match="is of int8, which no fit starts from"):
        warm_start(torch.nn.Linear(1, 1), "mask_transformer", tmp_path)
