"""Contracts: reading, validation, file hashes, and shapes of inputs and outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_contract

from model.contract import (
    CONTRACT_FILE,
    GOLDEN_FILE,
    NETWORK_FILE,
    Category,
    Contract,
    Histogram,
    InputSize,
    Thresholds,
    check_shapes,
    io_shapes,
    read_contract,
)
from model.errors import ArtifactError, ConfigError, ContractMismatch
from model.files import hash_file


def write_artifact(folder: Path) -> Contract:
    """Write two small files and the contract that lists them."""
    (folder / NETWORK_FILE).write_bytes(b"a graph")
    (folder / GOLDEN_FILE).write_bytes(b"outputs")
    contract = Contract(
        name="garden",
        version="3",
        network="mask_transformer",
        input_sizes=(InputSize(height_px=56, width_px=84), InputSize.square(56)),
        stride_px=4,
        max_detections=8,
        thing_clusters=5,
        stuff_clusters=2,
        thresholds=Thresholds(score_threshold=0.4),
        categories={1: Category(id=18, name="Hündin"), 6: Category(id=184, name="tree")},
        files={name: hash_file(folder / name) for name in (NETWORK_FILE, GOLDEN_FILE)},
        provenance={"encoder": "tiny", "photos": 3},
    )
    contract.write(folder)
    return contract


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of a written contract; None removes a key."""
    path = folder / CONTRACT_FILE
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def read_error(folder: Path, expected: type[ArtifactError]) -> str:
    """Return the error message of reading the contract."""
    with pytest.raises(expected) as caught:
        read_contract(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_written_contract_reads_back_equal(tmp_path: Path) -> None:
    assert write_artifact(tmp_path) == read_contract(tmp_path)


@pytest.mark.parametrize("name", [NETWORK_FILE, GOLDEN_FILE])
def test_a_changed_or_missing_file_is_rejected_with_its_name(tmp_path: Path, name: str) -> None:
    write_artifact(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[3] ^= 1
    (tmp_path / name).write_bytes(content)
    assert f"{name} was changed" in read_error(tmp_path, ArtifactError)
    (tmp_path / name).unlink()
    assert f"{name} is missing" in read_error(tmp_path, ArtifactError)
    (tmp_path / name).mkdir()
    assert f"{name} is missing" in read_error(tmp_path, ArtifactError)


def test_a_missing_or_truncated_contract_is_rejected(tmp_path: Path) -> None:
    assert "cannot be read" in read_error(tmp_path, ArtifactError)
    write_artifact(tmp_path)
    path = tmp_path / CONTRACT_FILE
    for content, message in (
        (path.read_bytes()[:-20], "not JSON"),
        (b'{"name": "\xff"}', "not JSON"),
        (b"[1, 2]", "expected a JSON object"),
    ):
        path.write_bytes(content)
        assert message in read_error(tmp_path, ArtifactError)


@pytest.mark.parametrize("path_kind", ["../outside.bin", "sub/../../outside.bin", "ABSOLUTE", "sub/inside.bin"])
def test_a_listed_file_outside_the_artifact_is_rejected_even_if_its_hash_is_right(
    tmp_path: Path, path_kind: str
) -> None:
    artifact = tmp_path / "artifact"
    (artifact / "sub").mkdir(parents=True)
    contract = write_artifact(artifact)
    for target in (tmp_path / "outside.bin", artifact / "sub" / "inside.bin"):
        target.write_bytes(b"secret")
    name = str(tmp_path / "outside.bin") if path_kind == "ABSOLUTE" else path_kind
    edit(artifact, files={**contract.files, name: hash_file(tmp_path / "outside.bin")})
    assert f"lists {name!r}: only files in the same folder" in read_error(artifact, ArtifactError)


@pytest.mark.parametrize("name", ["score_threshold", "mask_threshold", "overlap_threshold", "min_stuff_area_fraction"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_rejected_with_its_name_and_value(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must lie in 0\.\.1, got {value}"):
        Thresholds(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 5}, "format version 5, this release reads 4"),
        ({"format_version": "4"}, "format version 4, this release reads 4"),
        ({"detection": 8}, "unknown key 'detection' in Contract, did you mean 'max_detections'?"),
        ({"thresholds": {"score_treshold": 0.5}}, "thresholds.score_treshold' in Contract, did you mean 'score_th"),
        ({"thresholds": {"mask_threshold": 7}}, "mask_threshold must lie in 0..1, got 7"),
        ({"zzz": 1}, "unknown key 'zzz' in Contract"),
        ({"stride_px": None}, "stride_px"),
        ({"files": {GOLDEN_FILE: "0" * 64}}, f"no hash for {NETWORK_FILE}"),
        ({"files": {NETWORK_FILE: 5, GOLDEN_FILE: 6}}, f"files.{NETWORK_FILE}: input should be a valid string, got 5"),
        ({"int8": {"photos": 5, "clusters_equal": 0.9, "panoptic_quality": 0.9}}, "no hash for int8.xml"),
        ({"precision": "int4"}, "precision: input should be 'fp32', 'fp16-stored', 'int8-stored' or 'fp16', got"),
        ({"input_sizes": []}, "input_sizes: tuple should have at least 1 item"),
        ({"input_sizes": [{"height_px": 56, "width_px": 58}]}, "side 58 is not a multiple of the stride 4"),
        ({"thing_clusters": 0}, "thing_clusters: input should be greater than 0"),
        ({"stuff_clusters": -1}, "stuff_clusters: input should be greater than or equal to 0"),
        ({"stride_px": "4"}, "stride_px"),
        ({"max_detections": True}, "max_detections"),
        ({"categories": {"one": {"id": 1, "name": "dog"}}}, "categories"),
    ],
    ids=str,
)  # fmt: skip
def test_an_invalid_entry_is_rejected_with_its_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, **change)
    assert message in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize(("edges", "counts"), [((1.0, 2.0), (1, 1)), ((2.0, 1.0), (1, 1, 1))])
def test_an_invalid_histogram_is_rejected(edges: tuple[float, ...], counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="histogram"):
        Histogram(edges=edges, counts=counts)


CONTRACT = make_contract(3, 2, max_detections=9, input_sizes=(InputSize(height_px=56, width_px=84),))


def test_different_shapes_are_rejected_with_both() -> None:
    check_shapes(io_shapes(CONTRACT), CONTRACT)
    other = {**io_shapes(CONTRACT), "scores": [8], "pixels": [3, None, 84]}
    with pytest.raises(ContractMismatch, match=r"\[3, None, 84\].*'scores': \[8\].* its contract says .*\[3, 56, 84\]"):
        check_shapes(other, CONTRACT)
