"""Contracts: reading, validation, file hashes, and shapes of inputs and outputs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.contract import (
    CONTRACT_FILE,
    GOLDEN_FILE,
    NETWORK_FILE,
    Category,
    Contract,
    Histogram,
    InputSize,
    Thresholds,
    read_contract,
)
from model.errors import ArtifactError, ConfigError, ContractMismatch
from model.files import hash_file
from model.network_io import check_shapes, io_shapes
from model.validation import did_you_mean, reject_unknown_keys


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


def test_things_come_before_stuff() -> None:
    contract = Contract(
        name="a", version="1", network="n", input_sizes=(InputSize.square(8),), stride_px=4, max_detections=1,
        thing_clusters=2, stuff_clusters=3,
    )  # fmt: skip
    assert [contract.is_thing(cluster) for cluster in (0, 1, 2, 3, 5)] == [False, True, True, False, False]


@pytest.mark.parametrize("name", [NETWORK_FILE, GOLDEN_FILE])
def test_a_flipped_bit_is_rejected_with_the_name_of_the_file(tmp_path: Path, name: str) -> None:
    write_artifact(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[3] ^= 1
    (tmp_path / name).write_bytes(content)
    assert f"{name} was changed" in read_error(tmp_path, ArtifactError)


def test_a_missing_file_is_rejected_with_its_name(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    (tmp_path / NETWORK_FILE).unlink()
    assert f"{NETWORK_FILE} is missing" in read_error(tmp_path, ArtifactError)


def test_a_directory_in_place_of_a_file_is_rejected(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    (tmp_path / NETWORK_FILE).unlink()
    (tmp_path / NETWORK_FILE).mkdir()
    assert f"{NETWORK_FILE} is missing" in read_error(tmp_path, ArtifactError)


def test_a_missing_or_truncated_contract_is_rejected(tmp_path: Path) -> None:
    assert "cannot be read" in read_error(tmp_path, ArtifactError)
    write_artifact(tmp_path)
    path = tmp_path / CONTRACT_FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert "not JSON" in read_error(tmp_path, ArtifactError)


def test_bytes_that_are_not_utf_8_are_rejected(tmp_path: Path) -> None:
    (tmp_path / CONTRACT_FILE).write_bytes(b'{"name": "\xff"}')
    assert "not JSON" in read_error(tmp_path, ArtifactError)


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


@pytest.mark.parametrize("version", [4, 2, "3", None])
def test_another_format_version_is_rejected_with_both_versions(tmp_path: Path, version: Any) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, format_version=version)
    assert f"format version {version}, this release reads 3" in read_error(tmp_path, ContractMismatch)


def test_an_unknown_key_is_rejected_with_the_nearest_known_one(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, detection=8)
    assert "unknown key 'detection' in Contract, did you mean 'max_detections'?" in read_error(
        tmp_path, ContractMismatch
    )


def test_an_unknown_threshold_is_rejected_with_the_nearest_known_one(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, thresholds={"score_treshold": 0.5})
    assert "unknown key 'score_treshold' in Thresholds, did you mean 'score_threshold'?" in read_error(
        tmp_path, ContractMismatch
    )


def test_a_key_without_near_match_is_rejected_with_all_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown key 'zzz' in Category; known are id, name"):
        reject_unknown_keys(Category, {"zzz": 1})


def test_a_missing_key_is_rejected_with_its_name(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, stride_px=None)
    assert "stride_px" in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize("name", [NETWORK_FILE, GOLDEN_FILE])
def test_a_contract_without_the_hash_of_a_required_file_is_rejected(tmp_path: Path, name: str) -> None:
    contract = write_artifact(tmp_path)
    edit(tmp_path, files={listed: digest for listed, digest in contract.files.items() if listed != name})
    assert f"no hash for {name}" in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize("name", ["score_threshold", "mask_threshold", "overlap_threshold", "min_stuff_area_fraction"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_rejected_with_its_name_and_value(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must lie in 0\.\.1, got {value}"):
        Thresholds(**{name: value})


def test_a_threshold_out_of_range_in_a_file_is_a_contract_mismatch(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, thresholds={"mask_threshold": 7})
    assert "mask_threshold must lie in 0..1, got 7" in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize(
    "change",
    [
        {"stride_px": "4"},
        {"stride_px": 4.0},
        {"input_sizes": 56},
        {"input_sizes": [56]},
        {"input_sizes": [{"height_px": 56}]},
        {"input_sizes": [{"height_px": 56, "width_px": 56.0}]},
        {"input_sizes": [{"height_px": 56, "width_px": 56, "depth_px": 56}]},
        {"max_detections": True},
        {"name": 7},
        {"thresholds": [0.3]},
        {"thresholds": {"score_threshold": "high"}},
        {"categories": [1]},
        {"categories": {"1": "dog"}},
        {"categories": {"one": {"id": 1, "name": "dog"}}},
        {"files": [NETWORK_FILE, GOLDEN_FILE]},
        {"provenance": "unknown"},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, **change)
    assert CONTRACT_FILE in read_error(tmp_path, ContractMismatch)


def test_a_hash_that_is_not_a_string_is_rejected(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, files={NETWORK_FILE: 5, GOLDEN_FILE: 6})
    assert f"files.{NETWORK_FILE}: input should be a valid string, got 5" in read_error(tmp_path, ArtifactError)


def test_json_that_is_not_an_object_is_rejected(tmp_path: Path) -> None:
    (tmp_path / CONTRACT_FILE).write_text("[1, 2]")
    assert "expected a JSON object" in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize(
    "change",
    [
        {"input_sizes": [{"height_px": 0, "width_px": 56}]},
        {"input_sizes": []},
        {"stride_px": -4},
        {"max_detections": 0},
        {"thing_clusters": 0},
    ],
    ids=str,
)
def test_sizes_and_counts_below_one_are_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, **change)
    assert "must be positive" in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize("change", [{"stuff_clusters": -1}, {"box_mask_size": -28}], ids=str)
def test_negative_counts_are_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, **change)
    assert "must not be negative" in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int4", "precision: input should be 'fp32', 'fp16-stored', 'int8-stored' or 'fp16', got 'int4'"),
        (8, "or 'fp16', got 8"),
    ],
)
def test_an_unknown_precision_is_rejected(tmp_path: Path, precision: object, message: str) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, precision=precision)
    assert message in read_error(tmp_path, ContractMismatch)


def test_an_int8_network_without_its_files_is_rejected(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, int8={"photos": 50, "clusters_equal": 0.9, "panoptic_quality": 0.9})
    assert "no hash for int8.xml" in read_error(tmp_path, ContractMismatch)


def test_a_side_that_is_not_a_multiple_of_the_stride_is_rejected(tmp_path: Path) -> None:
    write_artifact(tmp_path)
    edit(tmp_path, input_sizes=[{"height_px": 56, "width_px": 58}])
    assert "side 58 is not a multiple of the stride 4" in read_error(tmp_path, ContractMismatch)


@pytest.mark.parametrize(("edges", "counts"), [((1.0, 2.0), (1, 1)), ((2.0, 1.0), (1, 1, 1)), ((1.0,), (1, -1))])
def test_an_invalid_histogram_is_rejected(edges: tuple[float, ...], counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="histogram"):
        Histogram(edges=edges, counts=counts)


def test_did_you_mean_returns_the_nearest_word_or_the_alternative() -> None:
    assert did_you_mean("panoptik", ("panoptic", "instance"), ": ask") == ", did you mean 'panoptic'?"
    assert did_you_mean("red", ("panoptic", "instance"), "; known are two") == "; known are two"
    assert did_you_mean("PROT", ["PORT", "HOST"], "", "--{}".format) == ", did you mean --PORT?"


CONTRACT = Contract(
    name="a", version="1", network="n", input_sizes=(InputSize(height_px=56, width_px=84),), stride_px=4,
    max_detections=9, thing_clusters=3, stuff_clusters=2,
)  # fmt: skip


def test_one_input_size_fixes_all_lengths() -> None:
    assert io_shapes(CONTRACT) == {
        "pixels": [3, 56, 84],
        "sizes": [2],
        "scores": [9],
        "clusters": [9],
        "boxes": [9, 4],
        "masks": [9, 14, 21],
        "semantic": [3, 14, 21],
    }


def test_box_masks_have_the_same_size_for_all_input_sizes() -> None:
    several = replace(CONTRACT, box_mask_size=28, input_sizes=(InputSize.square(56), InputSize.square(84)))
    shapes = io_shapes(several)
    assert (shapes["pixels"], shapes["masks"], shapes["semantic"]) == ([3, None, None], [9, 28, 28], [3, None, None])


def test_different_shapes_are_rejected_with_both() -> None:
    check_shapes(io_shapes(CONTRACT), CONTRACT)
    other = {**io_shapes(CONTRACT), "scores": [8], "pixels": [3, None, 84]}
    with pytest.raises(
        ContractMismatch, match=r"\[3, 'any', 84\].*'scores': \[8\].* its contract says .*\[3, 56, 84\]"
    ):
        check_shapes(other, CONTRACT)
