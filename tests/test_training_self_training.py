import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import load_file, save_file

from model.errors import ConfigError, LabelStoreError, TrainingError
from training.commands.relabel import add_options, run
from training.data.dataset import PseudoLabelDataset
from training.data.photos import PhotoFile
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.self_training.pseudo_label_update import ClassMaxScores, PseudoLabelUpdater
from training.self_training.rounds import TEACHER_FILE, SelfTrainingConfig, plot_rounds, read_teacher_info, relabel
from training.self_training.tta_merge import MergedPredictions, TeacherPredictions, TtaConsistency
from training.train import train

PLAN = SelfTrainingConfig(share=0.9)


@pytest.fixture(scope="module")
def sure_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """The tiny run with steeper masks: those of four steps are so soft that none counts."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("sure") / "run"))
    weights = load_file(run / "decoder.safetensors")
    steeper = {name: 50.0 * tensor for name, tensor in weights.items() if name.startswith("mask_head.2.")}
    save_file({**weights, **steeper}, run / "decoder.safetensors")
    return run


@pytest.fixture(scope="module")
def second(
    tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset, sure_run: Path
) -> PseudoLabelDataset:
    """The photos of the tiny store as the sure run labels them; not to be changed."""
    out = PseudoLabelDataset(tmp_path_factory.mktemp("relabelled") / "store")
    report = relabel(sure_run, tiny_store, tiny_store.features, out, PLAN)
    assert (report.round, report.photos, report.before, report.is_accepted) == (1, 8, None, True)
    assert report.found > 0
    return out


def test_a_relabelled_store_is_one_that_a_fit_takes(
    tmp_path: Path, tiny_store: PseudoLabelDataset, second: PseudoLabelDataset
) -> None:
    assert [each.digest for each in second.read_photos()] == [each.digest for each in tiny_store.read_photos()]
    masks = [mask for masks in second.read_instances().values() for mask in masks]
    assert all(0.0 < mask["score"] <= 1.0 for mask in masks)
    recipe = replace(MASK_TRANSFORMER_PRESETS["tiny"], targets="instances", drops_unknown=True)
    assert train(second, tiny_store.features, tmp_path / "run", recipe).step == 4


def test_a_store_tells_who_labelled_it(tiny_store: PseudoLabelDataset, second: PseudoLabelDataset) -> None:
    teaching = read_teacher_info(second)
    assert teaching is not None
    assert (teaching.round, teaching.share) == (1, 0.9)
    assert second.read_config().teacher_hash.startswith(teaching.weights)
    assert read_teacher_info(tiny_store) is None


def test_a_round_that_was_killed_goes_on_to_the_same_labels(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sure_run: Path, second: PseudoLabelDataset
) -> None:
    half = PseudoLabelDataset(Path(shutil.copytree(second.folder, tmp_path / "store")))
    for name in ("panoptic.json", "instances.json", TEACHER_FILE):
        (half.folder / name).unlink()
    shutil.rmtree(half.chunks_dir)
    for path in list((half.folder / "findings").iterdir())[:3]:
        path.unlink()
    relabel(sure_run, tiny_store, tiny_store.features, half, PLAN)
    for name in ("panoptic.json", "instances.json", TEACHER_FILE):
        assert (half.folder / name).read_text() == (second.folder / name).read_text()


def pretend(second: PseudoLabelDataset, folder: Path, flip: float) -> PseudoLabelDataset:
    """The same store, its teacher's flips agreeing as told."""
    store = PseudoLabelDataset(Path(shutil.copytree(second.folder, folder)))
    content = json.loads((store.folder / TEACHER_FILE).read_text())
    content["steadiness"]["flip"] = flip
    (store.folder / TEACHER_FILE).write_text(json.dumps(content))
    return store


def test_a_run_less_steady_than_its_teacher_labels_nothing_unless_forced(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sure_run: Path, second: PseudoLabelDataset
) -> None:
    steady, out = pretend(second, tmp_path / "steady", flip=1.1), PseudoLabelDataset(tmp_path / "out")
    with pytest.raises(TrainingError, match=r"no better a teacher than the last \(flip 1\.100 to 0\.\d+\)"):
        relabel(sure_run, steady, tiny_store.features, out, PLAN)
    with pytest.raises(LabelStoreError, match="no finished labels"):
        out.read_photos()
    forced = relabel(sure_run, steady, tiny_store.features, out, replace(PLAN, is_forced=True))
    assert (forced.round, forced.is_accepted) == (2, False)
    assert len(out.read_photos()) == 8


def test_a_zoomed_round_is_as_steady_as_a_plain_one_and_is_another_store(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sure_run: Path, second: PseudoLabelDataset
) -> None:
    out, zoomed = PseudoLabelDataset(tmp_path / "out"), replace(PLAN, zooms=True)
    report = relabel(sure_run, tiny_store, tiny_store.features, out, zoomed)
    teaching, plain = read_teacher_info(out), read_teacher_info(second)
    assert teaching is not None
    assert plain is not None
    assert asdict(teaching.steadiness) == pytest.approx(asdict(plain.steadiness), nan_ok=True)
    assert report.steadiness == teaching.steadiness
    assert (out.folder / "instances.json").read_bytes() != (second.folder / "instances.json").read_bytes()
    with pytest.raises(ConfigError, match="teacher_hash differ"):
        relabel(sure_run, tiny_store, tiny_store.features, out, PLAN)


def test_later_rounds_ask_for_surer_objects(
    tmp_path: Path, tiny_store: PseudoLabelDataset, sure_run: Path, second: PseudoLabelDataset
) -> None:
    unsteady = pretend(second, tmp_path / "unsteady", flip=0.0)
    report = relabel(sure_run, unsteady, tiny_store.features, PseudoLabelDataset(tmp_path / "out"), PLAN)
    assert report.before is not None
    assert (report.round, report.is_accepted, report.before.flip) == (2, True, 0.0)
    teaching = read_teacher_info(PseudoLabelDataset(tmp_path / "out"))
    assert teaching is not None
    assert teaching.share == pytest.approx(0.95)
    assert asdict(teaching.steadiness) == pytest.approx(asdict(report.steadiness), nan_ok=True)


def test_without_out_a_run_is_only_measured(
    tiny_store: PseudoLabelDataset, sure_run: Path, second: PseudoLabelDataset
) -> None:
    report = relabel(sure_run, second, tiny_store.features, None, PLAN)
    assert (report.photos, report.found) == (0, 0)
    first = read_teacher_info(second)
    assert first is not None
    assert np.isclose(report.steadiness.flip, first.steadiness.flip, atol=1e-6)


def test_a_run_of_other_clusters_is_refused(tmp_path: Path, tiny_store: PseudoLabelDataset, sure_run: Path) -> None:
    run = Path(shutil.copytree(sure_run, tmp_path / "run"))
    store = PseudoLabelDataset(Path(shutil.copytree(tiny_store.folder, tmp_path / "store")))
    content = json.loads((store.folder / "label.json").read_text())
    (store.folder / "label.json").write_text(json.dumps({**content, "thing_clusters": 7}))
    with pytest.raises(ConfigError, match="another thing clusters"):
        relabel(run, store, store.features, PseudoLabelDataset(tmp_path / "out"), PLAN)


@pytest.mark.parametrize("change", [{"share": 1.5}, {"rise": -0.1}])
def test_plans_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(PLAN, **change)  # type: ignore[arg-type]


SIDE, CELLS = 32, 8


def describe(photo: str = "a") -> PhotoFile:
    return PhotoFile(path=Path(photo), name=photo, digest=photo, height=SIDE, width=SIDE)


def draw_found(scores: list[float], clusters: list[int]) -> MergedPredictions:
    """Objects of one row of cells each, from the top; below the fourth row stuff 1, 0.9 sure, in the last row 0.3."""
    soft = np.zeros((len(scores), CELLS, CELLS), np.float32)
    for row, mask in enumerate(soft):
        mask[row] = 1.0
    semantic = np.zeros((CELLS, CELLS), np.int16)
    semantic[4:] = 1
    certainty = np.full((CELLS, CELLS), 0.9, np.float32)
    certainty[7] = 0.3
    return MergedPredictions(
        soft=soft,
        scores=np.array(scores, np.float32),
        clusters=np.array(clusters, np.int64),
        semantic=semantic,
        certainty=certainty,
    )


def describe_old(rows: slice, cluster: int, **more: float) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[rows] = 1
    rle = coco.encode(mask)
    return {"category_id": cluster, "segmentation": {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}, **more}


def make_relabeller(found: MergedPredictions, old: list[dict[str, Any]], share: float = 0.5) -> PseudoLabelUpdater:
    steadiness = TtaConsistency(flip=1.0, scale=1.0, covered=1.0)
    findings = TeacherPredictions(found=found, steadiness=steadiness, height=SIDE, width=SIDE)
    return PseudoLabelUpdater(
        read=lambda photo: findings,
        old_masks={"a": old},
        maxima=ClassMaxScores.survey([found], thing_clusters=3, stuff_clusters=2),
        share=share,
        side_px=SIDE,
        thing_clusters=3,
    )


def test_the_map_has_what_reaches_a_share_of_its_clusters_best_and_the_masks_are_all() -> None:
    found = draw_found([0.8, 0.5, 0.3, 0.2], [1, 1, 1, 2])
    relabeller = make_relabeller(found, [])
    label = relabeller.label(describe())
    assert label.things == [1, 1, 1, 2]
    assert label.scores == pytest.approx([0.8, 0.5, 0.3, 0.2])
    assert label.masks.any((2,)).argmax(1).tolist() == [0, 4, 8, 12]
    assert label.is_in_panoptic == [True, True, False, True]  # 0.3 is less than half of 0.8
    assert sorted(label.panoptic.categories.values()) == [1, 1, 2, 4]
    assert relabeller.count_sure(found) == 3


def test_old_masks_stay_where_no_new_one_explains_them() -> None:
    old = [
        describe_old(slice(0, 6), 3, score=0.4),  # IoU 4 / 6 with the new
        describe_old(slice(0, 16), 3, score=0.25, in_panoptic=0),  # 4 / 16
        describe_old(slice(8, 12), 2),
    ]
    label = make_relabeller(draw_found([0.8], [1]), old).label(describe())
    assert label.things == [1, 3, 2]
    assert label.scores == pytest.approx([0.8, 0.25 * 0.25, 0.25])
    assert label.is_in_panoptic == [True, False, True]
    segments = label.panoptic.categories
    assert segments[int(label.panoptic.label_map[0, 0])] == 1
    assert segments[int(label.panoptic.label_map[9, 0])] == 2
    assert label.panoptic.label_map[5, 0] == 0  # the mask that is not painted leaves no trace


def test_stuff_is_kept_where_the_teacher_is_half_as_sure_as_it_gets() -> None:
    label = make_relabeller(draw_found([], []), []).label(describe())
    assert set(label.panoptic.categories.values()) == {4}
    rows = label.panoptic.label_map[:, 0] > 0
    assert rows.tolist() == [False] * 16 + [True] * 12 + [False] * 4
    assert label.masks.shape == (0, SIDE, SIDE)


def test_the_best_scores_and_chances_are_over_all_photos() -> None:
    maxima = ClassMaxScores.survey([draw_found([0.2, 0.6], [1, 3]), draw_found([0.4], [1])], 3, 2)
    assert maxima.things.tolist() == pytest.approx([0.4, 0.0, 0.6])
    assert maxima.stuff.tolist() == pytest.approx([0.9, 0.9, 0.0])


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def score(pq: float, ap: float) -> dict[str, Any]:
    headline = {"ap": {"value": ap, "low": 0.0, "high": 9.0}}
    instance = {"agnostic_mask": {"headline": headline, "others": {}}}
    return {"panoptic": {"pq": {"value": pq, "low": 0.0, "high": 9.0}}, "semantic": {}, "instance": instance}


def test_scores_of_each_round_are_a_table_and_a_picture(tmp_path: Path) -> None:
    results = [write(tmp_path / f"{number}.json", score(4.0 + number, 2.0)) for number in range(3)]
    for _ in range(2):  # drawn again, it is not longer
        figures = plot_rounds(results, tmp_path)
    assert figures == [{"PQ": 4.0, "AP": 2.0}, {"PQ": 5.0, "AP": 2.0}, {"PQ": 6.0, "AP": 2.0}]
    assert (tmp_path / "rounds.csv").read_text().split() == [
        "step,PQ,AP",
        *(f"{n},{4 + n}.00000,2.00000" for n in range(3)),
    ]
    with Image.open(tmp_path / "rounds.png") as picture:
        assert picture.format == "PNG"


def test_without_truth_it_is_the_steadiness_that_is_drawn(tmp_path: Path) -> None:
    result = {"round": 1, "steadiness": {"flip": 0.9, "scale": 0.8, "covered": 0.7}, "before": None}
    assert plot_rounds([write(tmp_path / "a.json", result)], tmp_path) == [{"flip": 0.9, "scale": 0.8, "covered": 0.7}]


def test_results_of_two_kinds_or_of_none_are_refused(tmp_path: Path) -> None:
    steady = write(tmp_path / "a.json", {"steadiness": {"flip": 0.9, "scale": 0.8, "covered": 0.7}})
    with pytest.raises(ConfigError, match="results of one kind"):
        plot_rounds([steady, write(tmp_path / "b.json", score(1.0, 1.0))], tmp_path)
    with pytest.raises(ConfigError, match=r"c\.json is no result"):
        plot_rounds([write(tmp_path / "c.json", {})], tmp_path)


def test_what_is_not_given_is_as_the_plan_has_it(
    tmp_path: Path, tiny_run: Path, tiny_store: PseudoLabelDataset
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    add_options(parser)
    given = ["--features", str(tiny_store.features), "--out", str(tmp_path / "store")]
    run(parser.parse_args([str(tiny_run), str(tiny_store.folder), *given]))
    teaching = read_teacher_info(PseudoLabelDataset(tmp_path / "store"))
    assert teaching is not None
    assert teaching.share == SelfTrainingConfig().share
