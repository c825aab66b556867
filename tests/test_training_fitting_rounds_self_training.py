import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from model.errors import ConfigError, LabelStoreError, TrainingError
from training.fitting.fit import fit
from training.fitting.rounds.self_training import TEACHER_FILE, RoundPlan, read_teaching, relabel
from training.fitting.transformer.recipe import PRESETS
from training.labels.store import LabelStore

PLAN = RoundPlan(share=0.9)


@pytest.fixture(scope="module")
def sure_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """The tiny run with steeper masks: those of four steps are so soft that none counts."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("sure") / "run"))
    weights = load_file(run / "decoder.safetensors")
    steeper = {name: 50.0 * tensor for name, tensor in weights.items() if name.startswith("mask_head.2.")}
    save_file({**weights, **steeper}, run / "decoder.safetensors")
    return run


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, tiny_store: LabelStore, sure_run: Path) -> LabelStore:
    """The photos of the tiny store as the sure run labels them; not to be changed."""
    out = LabelStore(tmp_path_factory.mktemp("relabelled") / "store")
    report = relabel(sure_run, tiny_store, tiny_store.features, out, PLAN)
    assert (report.round, report.photos, report.before, report.is_accepted) == (1, 8, None, True)
    assert report.found > 0
    return out


def test_a_relabelled_store_is_one_that_a_fit_takes(tmp_path: Path, tiny_store: LabelStore, second: LabelStore) -> None:
    assert [each.digest for each in second.read_photos()] == [each.digest for each in tiny_store.read_photos()]
    masks = [mask for masks in second.read_masks().values() for mask in masks]
    assert all(0.0 < mask["score"] <= 1.0 for mask in masks)
    recipe = replace(PRESETS["tiny"], targets="instances", drops_unknown=True)
    assert fit(second, tiny_store.features, tmp_path / "run", recipe).step == 4


def test_a_store_tells_who_labelled_it(tiny_store: LabelStore, second: LabelStore) -> None:
    teaching = read_teaching(second)
    assert teaching is not None
    assert (teaching.round, teaching.share) == (1, 0.9)
    assert second.read_config().relabelled.startswith(teaching.weights)
    assert read_teaching(tiny_store) is None


def test_a_round_that_was_killed_goes_on_to_the_same_labels(
    tmp_path: Path, tiny_store: LabelStore, sure_run: Path, second: LabelStore
) -> None:
    half = LabelStore(Path(shutil.copytree(second.folder, tmp_path / "store")))
    for name in ("panoptic.json", "instances.json", TEACHER_FILE):
        (half.folder / name).unlink()
    shutil.rmtree(half.shards)
    for path in list((half.folder / "findings").iterdir())[:3]:
        path.unlink()
    relabel(sure_run, tiny_store, tiny_store.features, half, PLAN)
    for name in ("panoptic.json", "instances.json", TEACHER_FILE):
        assert (half.folder / name).read_text() == (second.folder / name).read_text()


def pretend(second: LabelStore, folder: Path, flip: float) -> LabelStore:
    """The same store, its teacher's flips agreeing as told."""
    store = LabelStore(Path(shutil.copytree(second.folder, folder)))
    content = json.loads((store.folder / TEACHER_FILE).read_text())
    content["steadiness"]["flip"] = flip
    (store.folder / TEACHER_FILE).write_text(json.dumps(content))
    return store


def test_a_run_less_steady_than_its_teacher_labels_nothing_unless_forced(
    tmp_path: Path, tiny_store: LabelStore, sure_run: Path, second: LabelStore
) -> None:
    steady, out = pretend(second, tmp_path / "steady", flip=1.1), LabelStore(tmp_path / "out")
    with pytest.raises(TrainingError, match=r"no better a teacher than the last \(flip 1\.100 to 0\.\d+\)"):
        relabel(sure_run, steady, tiny_store.features, out, PLAN)
    with pytest.raises(LabelStoreError, match="no finished labels"):
        out.read_photos()
    forced = relabel(sure_run, steady, tiny_store.features, out, replace(PLAN, is_forced=True))
    assert (forced.round, forced.is_accepted) == (2, False)
    assert len(out.read_photos()) == 8


def test_a_zoomed_round_is_as_steady_as_a_plain_one_and_is_another_store(
    tmp_path: Path, tiny_store: LabelStore, sure_run: Path, second: LabelStore
) -> None:
    out, zoomed = LabelStore(tmp_path / "out"), replace(PLAN, zooms=True)
    report = relabel(sure_run, tiny_store, tiny_store.features, out, zoomed)
    teaching, plain = read_teaching(out), read_teaching(second)
    assert teaching is not None
    assert plain is not None
    assert asdict(teaching.steadiness) == pytest.approx(asdict(plain.steadiness), nan_ok=True)
    assert report.steadiness == teaching.steadiness
    assert (out.folder / "instances.json").read_bytes() != (second.folder / "instances.json").read_bytes()
    with pytest.raises(ConfigError, match="relabelled differ"):
        relabel(sure_run, tiny_store, tiny_store.features, out, PLAN)


def test_later_rounds_ask_for_surer_objects(
    tmp_path: Path, tiny_store: LabelStore, sure_run: Path, second: LabelStore
) -> None:
    unsteady = pretend(second, tmp_path / "unsteady", flip=0.0)
    report = relabel(sure_run, unsteady, tiny_store.features, LabelStore(tmp_path / "out"), PLAN)
    assert report.before is not None
    assert (report.round, report.is_accepted, report.before.flip) == (2, True, 0.0)
    teaching = read_teaching(LabelStore(tmp_path / "out"))
    assert teaching is not None
    assert teaching.share == pytest.approx(0.95)
    assert asdict(teaching.steadiness) == pytest.approx(asdict(report.steadiness), nan_ok=True)


def test_without_out_a_run_is_only_measured(tiny_store: LabelStore, sure_run: Path, second: LabelStore) -> None:
    report = relabel(sure_run, second, tiny_store.features, None, PLAN)
    assert (report.photos, report.found) == (0, 0)
    first = read_teaching(second)
    assert first is not None
    assert np.isclose(report.steadiness.flip, first.steadiness.flip, atol=1e-6)


def test_a_run_of_other_clusters_is_refused(tmp_path: Path, tiny_store: LabelStore, sure_run: Path) -> None:
    run = Path(shutil.copytree(sure_run, tmp_path / "run"))
    store = LabelStore(Path(shutil.copytree(tiny_store.folder, tmp_path / "store")))
    content = json.loads((store.folder / "label.json").read_text())
    (store.folder / "label.json").write_text(json.dumps({**content, "thing_clusters": 7}))
    with pytest.raises(ConfigError, match="another thing clusters"):
        relabel(run, store, store.features, LabelStore(tmp_path / "out"), PLAN)


@pytest.mark.parametrize("change", [{"share": 1.5}, {"rise": -0.1}])
def test_plans_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(PLAN, **change)  # type: ignore[arg-type]
