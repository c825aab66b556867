"""`useg` with commands of the model package and `useg gate`: artifacts, names, registries, signatures."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Run, expect_error
from fake_registry import write_artifact

from model.cli import COMMANDS, format_result, main
from model.contract import Category, read_contract

CLUSTERS = range(1, 8)


def test_names_are_set_shown_undone_exported_and_applied(tmp_path: Path, artifact: Path, useg: Run) -> None:
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert useg("names", "set", artifact, 2, "disc").result["given"] == {"2": "disc"}
    useg("names", "set", artifact, 5, "wall")
    assert useg("names", "show", artifact).result["clusters"] == {"2": "disc", "5": "wall"}
    exported = useg("names", "show", artifact, "--out", tmp_path / "names.json").result
    assert (exported["revision"], exported["given"]) == (2, {"2": "disc", "5": "wall"})
    assert useg("names", "undo", artifact).result["given"] == {"2": "disc"}
    assert useg("names", "undo", artifact, "--revision", 1).result["given"] == {}
    assert useg("names", "apply", artifact, tmp_path / "names.json").result["given"] == {"2": "disc", "5": "wall"}
    useg("names", "set", artifact, 6, "sky")
    merged = useg("names", "apply", artifact, tmp_path / "names.json", "--merge").result
    assert merged["given"] == {"2": "disc", "5": "wall", "6": "sky"}
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    assert (tmp_path / "artifact.names.json").is_file()


def test_names_transfer_from_an_artifact_to_itself(
    tmp_path: Path, artifact: Path, tiny_photos: Path, useg: Run
) -> None:
    for cluster in CLUSTERS:
        useg("names", "set", artifact, cluster, f"class {cluster}")
    out = tmp_path / "transferred.json"
    result = useg(
        "names", "transfer", artifact, artifact, "--photos", tiny_photos, "--min-images", 1, "--out", out
    ).result
    assert [(each["category_name"], each["overlap"]) for each in result["clusters"]] == [
        (f"class {each['cluster']}", 1.0) for each in result["clusters"]
    ]
    assert result["transferred"] == len(result["clusters"]) > 1
    seen = {f"class {each['cluster']}" for each in result["clusters"]}
    assert set(result["lost"]) == {f"class {cluster}" for cluster in CLUSTERS} - seen
    copy = shutil.copytree(artifact, tmp_path / "copy")
    assert set(useg("names", "apply", copy, out).result["given"].values()) == seen


def test_segments_have_the_given_names_and_one_category_is_merged_as_by_the_service(
    tmp_path: Path, artifact: Path, tiny_photos: Path, useg: Run
) -> None:
    contract = read_contract(artifact)
    replace(contract, categories=dict.fromkeys(CLUSTERS, Category(id=1, name="all"))).write(artifact)
    command = ["segment", artifact, tiny_photos / "0.png", "--task", "semantic", "--out", tmp_path / "out.png"]
    merged = useg(*command).result["segments_info"]
    apart = useg(*command, "--no-merge-clusters").result["segments_info"]
    assert len(apart) > 1
    assert [sorted(each["cluster_ids"]) for each in merged] == [sorted(each["cluster_id"] for each in apart)]
    useg("names", "set", artifact, apart[0]["cluster_id"], "disc")
    assert {each["category_name"] for each in useg(*command).result["segments_info"]} == {"disc", "all"}


def test_the_gate_passes_an_equal_version_and_rejects_one_that_finds_nothing(
    tmp_path: Path, artifact: Path, tiny_photos: Path, useg: Run
) -> None:
    gate = ("gate", artifact, artifact, "--photos", tiny_photos)
    assert useg(*gate).result["passed"]
    blind = shutil.copytree(artifact, tmp_path / "blind")
    contract = read_contract(blind)
    thresholds = replace(contract.thresholds, score_threshold=1.0, min_stuff_area_fraction=1.0)
    replace(contract, thresholds=thresholds).write(blind)
    gated = useg("gate", blind, *gate[2:], "--out", tmp_path / "gate.json")
    assert gated.status == 4
    assert gated.error.startswith("useg: rejected: segmentation covering is 0.00, minimum 0.4; ")
    assert json.loads((tmp_path / "gate.json").read_text()) == gated.result
    expect_error(useg("gate", blind, artifact), "give --dataset or --photos")
    expect_error(useg(*gate, "--drift-photos", tiny_photos), "--drift-photos must be other photos")


def test_annotations_that_were_left_out_are_listed_with_status_3(
    tmp_path: Path, artifact: Path, tiny_truth: Path, useg: Run
) -> None:
    dataset = shutil.copytree(tiny_truth, tmp_path / "set") / "panoptic.json"
    content = json.loads(dataset.read_text())
    content["annotations"].append({**content["annotations"][0], "image_id": 99})
    dataset.write_text(json.dumps(content))
    matched = useg("match", artifact, "--dataset", dataset, "--out", tmp_path / "names.json")
    skipped = ["1 annotations of images that are not listed; the first: annotation of image 99"]
    assert (matched.status, matched.result["skipped"]) == (3, skipped)


def test_the_gate_compares_metrics_on_a_dataset(artifact: Path, tiny_truth: Path, useg: Run) -> None:
    checks = useg("gate", artifact, artifact, "--dataset", tiny_truth, "--max-score-drop", 0).result["checks"]
    assert [(each["name"], each["value"], each["is_passed"]) for each in checks] == [
        ("PQ", 0.0, True),
        ("AP", 0.0, True),
    ]


def test_a_result_without_a_number_is_null() -> None:
    assert json.loads(format_result({"a": [float("nan"), 1]}), parse_constant=pytest.fail) == {"a": [None, 1]}


@pytest.mark.parametrize("path", [path for commands in COMMANDS.values() for path, _ in commands.values()])
def test_every_subcommand_exists(path: str) -> None:
    module, _, name = path.partition(":")
    tree = ast.parse((Path(__file__).parent.parent / f"{module.replace('.', '/')}.py").read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert name in functions + [ast.unparse(target) for target in targets]


@pytest.mark.parametrize("command", ["import", "export", "check", "quantize", "bench", "segment", "names transfer"])
def test_the_help_of_a_subcommand_describes_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert ".py" not in printed
    undescribed = [line for line in printed.splitlines() if re.match(r"│[ *]+--[a-z-]+ ?[A-Z]* +\[", line)]
    assert undescribed == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprt"], "unknown command 'exprt', did you mean 'export'?"),
        (["export"], "RUN requires an argument"),
        (["check", "artifact", "--bakend", "cpu"], "Did you mean --backend?"),
        (["import", "a.pth", "--format", "u2seg", "--out", "run"], "--clusters is required"),
        (["bench", "artifact", "--rounds", "0"], "--rounds"),
        (["registry", "canary", "registry", "2", "--traffic-fraction", "1.1"], "Must be <= 1"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact", "1")


def test_a_version_is_added_deployed_rolled_back_and_removed(tmp_path: Path, drawn: Path, useg: Run) -> None:
    registry = tmp_path / "registry"
    added = useg("registry", "add", registry, drawn).result
    assert added == {"model": "fake", "version": "1", "artifact": str(registry / "fake" / "1")}
    useg("registry", "add", registry, drawn, "--version", "2")
    assert useg("registry", "activate", registry, "1", "--author", "alice", "--reason", "first").result["active"] == "1"
    canary = useg("registry", "canary", registry, "2", "--traffic-fraction", "0.25").result
    assert canary["canary"] == {"version": "2", "traffic_fraction": 0.25}
    assert useg("registry", "shadow", registry, "2").result["shadow"] == {"version": "2", "traffic_fraction": 0.1}
    useg("registry", "canary", registry, "2")
    promoted = useg("registry", "promote", registry).result
    assert (promoted["active"], promoted["previous_versions"]) == ("2", ["1"])
    back = useg("registry", "rollback", registry, "--reason", "worse masks").result
    assert (back["active"], back["history"][0]["reason"]) == ("1", "worse masks")
    assert useg("registry", "remove", registry, "2").result["versions"] == ["1"]
    (model,) = useg("registry", "list", registry).result["models"]
    assert [event["action"] for event in model["history"]][-3:] == ["promote", "rollback", "remove"]
    assert model["history"][2]["author"] == "alice"


def test_errors_are_one_line(tmp_path: Path, drawn: Path, useg: Run) -> None:
    registry = tmp_path / "registry"
    expect_error(useg("registry", "list", registry), "is not a registry")
    useg("registry", "add", registry, drawn)
    expect_error(useg("registry", "add", registry, drawn), "give another version")
    expect_error(useg("registry", "canary", registry, "1"), "activate one before a canary")
    expect_error(useg("registry", "activate", registry, "9"), "no version '9'")
    useg("registry", "add", registry, drawn, "--model", "other")
    expect_error(useg("registry", "activate", registry, "1"), "holds fake, other: give --model")
    assert useg("registry", "activate", registry, "1", "--model", "other").result["name"] == "other"
