"""The commands as a user types them, one after the other, and what they say when something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from training.data.dataset import PseudoLabelDataset, read_label_map
from training.trainer.checkpoint import read_checkpoint_metadata

LIMIT_S = 120
LABEL_OPTIONS = (
    *("--side-px", 56, "--proposals", "maskcut", "--maskcut-n", 2, "--maskcut-tau", 0.6, "--pca-dim", 6),
    *("--thing-clusters", 3, "--stuff-clusters", 4),
)


def run(package: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", package, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def expect_error(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    last = ended.stderr.strip().splitlines()[-1]
    assert (ended.returncode, ended.stdout) == (1, "")
    assert last.startswith(("useg-train: ", "useg: "))
    assert all(word in last for word in words), last
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_photos_become_labels_a_run_an_artifact_and_masks(tmp_path: Path, tiny_encoder: Path) -> None:
    photos = tiny.draw_photos(tmp_path / "photos")
    (photos / "broken.jpg").write_text("no photo")
    store, result, artifact, masks = (tmp_path / name for name in ("store", "run", "artifact", "masks.png"))

    labelled = run("model", "label", photos, "--out", store, "--encoder", tiny_encoder, *LABEL_OPTIONS)
    assert labelled.returncode == 3, labelled.stderr
    report = json.loads(labelled.stdout)
    assert report["photos"] == 8
    assert [line.split(":")[0] for line in report["skipped"]] == ["broken.jpg"]

    fitted = run("training", "fit", store, "--out", result, "--preset", "tiny")
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["step"] == 4

    exported = run("model", "export", result, "--out", artifact, "--photos", photos, "--score-threshold", 0)
    assert exported.returncode == 0, exported.stderr

    checked = run("model", "check", artifact)
    assert json.loads(checked.stdout)["golden"] == "matched"

    segmented = run("model", "segment", artifact, photos / "2.png", "--out", masks)
    assert segmented.returncode == 0, segmented.stderr
    segments = json.loads(segmented.stdout)["segments_info"]
    with Image.open(masks) as picture:
        ids = np.asarray(picture).astype(int) @ [1, 256, 65536]
    assert ids.shape == (56, 64)
    assert {segment["id"]: segment["area"] for segment in segments} == {
        int(each): int((ids == each).sum()) for each in np.unique(ids) if each
    }


def test_every_task_and_an_overlay_come_from_the_same_artifact(tmp_path: Path, tiny_artifact: Path) -> None:
    photo = tmp_path / "photo.jpg"
    cv2.imwrite(str(photo), np.full((50, 70, 3), 99, np.uint8))
    for task in ("panoptic", "instance", "semantic"):
        ended = run("model", "segment", tiny_artifact, photo, "--task", task, "--out", tmp_path / f"{task}.jpg")
        assert json.loads(ended.stdout)["task"] == task
        with Image.open(tmp_path / f"{task}.jpg") as overlay:
            assert (overlay.format, overlay.size) == ("JPEG", (70, 50))


@pytest.mark.slow
def test_a_mapping_is_fitted_and_not_evaluated_on_the_same_images(
    tmp_path: Path, tiny_artifact: Path, tiny_truth: Path
) -> None:
    mapping, out = tmp_path / "mapping.json", tmp_path / "report"
    matched = run("model", "match", tiny_artifact, "--dataset", tiny_truth, "--matching", "cups", "--out", mapping)
    assert matched.returncode == 0, matched.stderr
    assert json.loads(matched.stdout)["images"] == 4
    assert json.loads(mapping.read_text())["method"] == "cups"

    command = ("model", "eval", tiny_artifact, "--dataset", tiny_truth, "--mapping", mapping)
    expect_error(run(*command), "fitted on 4 of the 4 images", "--allow-train-test-overlap")
    allowed = (*command, "--allow-train-test-overlap")
    expect_error(run(*allowed, "--shard", "1/2"), "store their results in a folder: give --out")

    part = run(*allowed, "--out", out, "--shard", "0/2")
    assert json.loads(part.stdout) == {"shard": "0/2", "images": 4}
    assert [path.parent.name for path in out.rglob("*.json")] == ["image-results"]
    scored = run(*allowed, "--out", out)
    assert scored.returncode == 0, scored.stderr
    assert not (out / "image-results").exists()
    summary = json.loads(scored.stdout)
    assert summary["matching"]["evaluated_on_fit_set"]
    assert json.loads((out / "report.json").read_text())["summary"] == summary
    assert (out / "report.html").read_text().count("<img") == 3 * 4
    expect_error(run(*command, "--matching", "cups"), "--mapping is fitted already")


def test_runs_and_pseudo_labels_are_evaluated_like_artifacts(
    tmp_path: Path, tiny_run: Path, tiny_encoder: Path
) -> None:
    dataset, store = tiny.draw_truth(tmp_path / "set"), tmp_path / "store"
    labelled = run(*("model", "label", dataset / "images", "--out", store, "--encoder", tiny_encoder, *LABEL_OPTIONS))
    assert labelled.returncode == 0, labelled.stderr
    for source in (tiny_run, store):
        scored = run("model", "eval", source, "--dataset", dataset)
        assert scored.returncode == 0, scored.stderr
        summary = json.loads(scored.stdout)
        assert (summary["images"], summary["matching"]["evaluated_on_fit_set"]) == (4, False)
        for metrics in (summary["panoptic"], summary["semantic"], summary["instance"]["agnostic_mask"]["headline"]):
            for interval in metrics.values():
                assert 0.0 <= interval["low"] <= interval["high"] <= 100.0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nncf") is None, reason="useg[quantise] is not installed")
def test_an_artifact_in_int8_is_checked_shown_and_scored(tmp_path: Path, tiny_artifact: Path, tiny_truth: Path) -> None:
    photos, out = tiny.draw_photos(tmp_path / "photos", count=58), tmp_path / "int8"
    source = Path(shutil.copytree(tiny_artifact, tmp_path / "source"))
    content = json.loads((source / "contract.json").read_text())
    content["thresholds"]["stuff_area"] = 0.2  # small stuff, after four steps of training, is noise in any precision
    (source / "contract.json").write_text(json.dumps(content))

    quantised = run("model", "quantize", source, "--photos", photos, "--out", out, "--max-photos", 40)
    assert quantised.returncode == 0, quantised.stderr
    assert json.loads(quantised.stdout)["fidelity"]["photos"] == 50

    expect_error(run("model", "check", out), "backend cpu", "OpenVINO alone")
    assert json.loads(run("model", "check", out, "--backend", "openvino").stdout)["golden"] == "matched"
    shown = run("model", "segment", out, photos / "2.png", "--backend", "openvino", "--out", tmp_path / "masks.png")
    assert json.loads(shown.stdout)["task"] == "panoptic"
    scored = run("model", "eval", out, "--dataset", tiny_truth)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["predictor"] == "tiny 3-int8 on openvino"


def test_errors_are_one_line_that_names_the_culprit(tmp_path: Path, tiny_artifact: Path, tiny_encoder: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    out = tmp_path / "out"
    expect_error(run("model", "segment", tiny_artifact, text, "--out", out), "text.jpg", "no supported image format")
    expect_error(run("model", "segment", tiny_artifact, tmp_path / "none.jpg", "--out", out), "none.jpg")
    photo = tiny.draw_photos(tmp_path / "photos", count=1) / "0.png"
    expect_error(run("model", "segment", tmp_path, photo, "--out", out), "contract.json")
    expect_error(run("model", "export", tmp_path, "--out", out), "run.json")
    expect_error(run("training", "fit", tmp_path, "--out", out), "no readable pseudo-labels")
    expect_error(run("model", "label", photo.parent, "--out", out, "--encoder", "none.pth"), "none.pth does not exist")
    expect_error(run("model", "label", tmp_path, "--out", out, "--encoder", tiny_encoder), "lies in")
    expect_error(run("model", "label", tmp_path / "empty", "--out", out, "--encoder", tiny_encoder), "not a folder")
    expect_error(
        run("model", "eval", tiny_artifact, "--dataset", tmp_path, "--format", "voc-masks"), "not a VOC folder"
    )
    assert not out.exists()


def test_a_published_checkpoint_becomes_a_run_or_one_line(tmp_path: Path) -> None:
    source, out = tmp_path / "cups.ckpt", tmp_path / "run"
    weights = load_file(tiny.write_cascade_run(tmp_path / "drawn") / "weights.safetensors")
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}}, source)
    imported = run("model", "import", source, "--format", "cups", "--clusters", 3, "--out", out)
    assert imported.returncode == 0, imported.stderr
    report = json.loads(imported.stdout)
    assert (report["shape"]["thing_clusters"], report["checkpoint"]["family"]) == (3, "CUPS")
    files = {path.name: path.read_bytes() for path in out.iterdir()}

    def refuse(source: Path, *words: str, family: str = "cups", clusters: int = 3) -> None:
        command = ("model", "import", source, "--format", family, "--clusters", clusters, "--out", out)
        expect_error(run(*command), source.name, *words)

    refuse(source, "3 thing clusters, not 800", clusters=800)
    refuse(source, "looks like cups", family="cutler", clusters=1)
    refuse(tmp_path, "is a folder")
    (tmp_path / "cut.pth").write_bytes(source.read_bytes()[:1000])
    refuse(tmp_path / "cut.pth", "holds no readable weights")
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    refuse(tmp_path / "evil.pkl", "it names os.system")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_an_encoder_is_imported_to_a_file_that_labelling_takes(tmp_path: Path, tiny_encoder: Path) -> None:
    out = tmp_path / "encoder.safetensors"
    imported = run("model", "import", tiny_encoder.as_uri(), "--format", "encoder", "--out", out)
    assert imported.returncode == 0, imported.stderr
    assert json.loads(imported.stdout)["kind"] == "vision transformer"
    assert load_file(out).keys() == load_file(tiny_encoder).keys()


@pytest.mark.slow
def test_a_codebook_labels_other_photos_with_the_same_clusters(tmp_path: Path, tiny_encoder: Path) -> None:
    photos, others = tiny.draw_photos(tmp_path / "photos"), tiny.draw_photos(tmp_path / "others", count=3)
    first, second = tmp_path / "first", tmp_path / "second"
    encoder = ("--encoder", tiny_encoder)
    chosen = (
        *("--stuff", "stego", "--stego-preset", "tiny", "--stego-steps", 4),
        *("--thing-embedding", "crop", "--crop-px", 28, "--kmeans-init", "k-means++"),
    )
    fitted = run("model", "label", photos, "--out", first, *encoder, *LABEL_OPTIONS, *chosen)
    assert fitted.returncode == 0, fitted.stderr
    assert PseudoLabelDataset(first).read_config().stego_steps == 4
    command = ("model", "label", others, "--out", second, *encoder, "--codebook", first / "codebook.npz")
    expect_error(run(*command, "--thing-clusters", 5), "the codebook was fitted with thing_clusters 3")
    assert not second.exists()
    reused = run(
        *command,
        "--proposals",
        "maskcut",
        "--maskcut-n",
        2,
        "--maskcut-tau",
        0.6,
        "--max-stuff-in-things",
        0.2,
    )
    assert reused.returncode == 0, reused.stderr
    one, other = (PseudoLabelDataset(folder).read_config() for folder in (first, second))
    assert (other.stuff, other.thing_embedding, other.thing_clusters) == ("stego", "crop", one.thing_clusters)
    labelled = [
        {each["file_name"]: each["annotations"] for each in list_instances(folder)} for folder in (first, second)
    ]
    assert len(labelled[1]) == 3
    assert all(labelled[0][name] == annotations for name, annotations in labelled[1].items())


def list_instances(store: Path) -> list[dict[str, object]]:
    """Photos and what they hold, without numbers that depend on the other photos."""
    content = json.loads((store / "instances.json").read_text())
    held: dict[int, list[object]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        held[annotation["image_id"]].append((annotation["category_id"], annotation["segmentation"]))
    return [{"file_name": each["file_name"], "annotations": held[each["id"]]} for each in content["images"]]


def test_stuff_is_read_from_a_folder_of_maps(tmp_path: Path, tiny_encoder: Path) -> None:
    photos, maps, out = tiny.draw_photos(tmp_path / "photos"), tmp_path / "maps", tmp_path / "store"
    command = ("model", "label", photos, "--out", out, "--encoder", tiny_encoder, *LABEL_OPTIONS)
    command += ("--stuff-merge-rule", "u2seg", "--stuff", "maps", "--stuff-maps-dir", maps)
    expect_error(run(*command), "maps is not a folder")
    maps.mkdir()
    for index in range(8):
        rows = np.arange(48 + 4 * index)[:, None] * 4 // (48 + 4 * index)
        np.save(maps / f"{index}.npy", rows.repeat(64, 1))
    labelled = run(*command)
    assert labelled.returncode == 0, labelled.stderr
    seen = set()
    for photo in PseudoLabelDataset(out).read_photos():
        labels, given = read_label_map(photo.label), np.load(maps / f"{photo.path.stem}.npy")
        stuff = [segment for segment, category in photo.categories.items() if category > 3]
        assert all((given[labels == each] + 4 == photo.categories[each]).all() for each in stuff)
        seen |= {photo.categories[each] for each in stuff}
    assert seen == {4, 5, 6, 7}
    np.save(maps / "5.npy", np.zeros((3, 3), int))
    (maps / "6.npy").unlink()
    expect_error(run(*command), "6.npy")
    np.save(maps / "6.npy", np.zeros((3, 3), int))
    expect_error(run(*command), "5.npy has shape (3, 3), its photo (68, 64)")


def test_visualize_plots_pseudo_labels(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    shown = run("model", "visualize", tiny_store.folder, "--out", tmp_path / "sheet.jpg", "--count", 3, "--seed", 1)
    assert json.loads(shown.stdout) == {"figure": str(tmp_path / "sheet.jpg"), "photos": 3}
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
    refused = run("model", "visualize", tiny_store.folder, "--out", tmp_path / "none.jpg", "--seed", -1)
    expect_error(refused, "seed must be 0 or more")


def test_wrong_usage_ends_with_status_2(tiny_store: PseudoLabelDataset, tmp_path: Path) -> None:
    assert run("model", "segmnt").returncode == 2
    assert "--clusters is required" in run("model", "import", "a.pth", "--format", "u2seg", "--out", tmp_path).stderr
    command = ("model", "import", "a.pth", "--out", tmp_path, "--clusters", 3, "--format")
    assert [run(*command, family).returncode for family in ("encoder", "u2segg")] == [2, 2]
    assert run("training", "fit").returncode == 2
    assert run("training", "--threads", "0", "fit", tiny_store.folder, "--out", tmp_path / "run").returncode == 2


def test_a_recipe_out_of_range_is_told_before_anything_is_written(
    tiny_store: PseudoLabelDataset, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    expect_error(run("training", "fit", tiny_store.folder, "--out", out, "--steps", "0"), "steps must be positive")
    assert not out.exists()


@pytest.mark.parametrize("package", ["model", "training", "service"])
def test_help_is_quick_and_needs_no_heavy_library(package: str) -> None:
    code = f"import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module({package!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: useg-")


def test_ctrl_c_in_a_fit_keeps_its_steps_and_the_same_command_goes_on(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    command = [sys.executable, "-m", "training", "fit", tiny_store.folder, "--out", tmp_path / "run"]
    command += ["--preset", "tiny", "--steps", "100000"]
    history = tmp_path / "run" / "history.csv"
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        while not (history.exists() and len(history.read_text().splitlines()) > 3):
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "go on where they were" in errors
    assert "Traceback" not in errors
    facts = read_checkpoint_metadata(tmp_path / "run" / "checkpoint.safetensors")
    assert facts["step"] == len(history.read_text().splitlines()) - 1
