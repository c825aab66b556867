import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.contract import Category
from model.errors import ConfigError
from training.evaluation.matching.cluster_matching import VoteThresholds
from training.evaluation.matching.mapping_file import (
    ClusterAssignment,
    ClusterMapping,
    fingerprint_photos,
    read_mapping,
)

DIGESTS = ["a" * 64, "b" * 64]
NAMES = ClusterMapping(
    source="c" * 64,
    method="votes",
    thresholds=VoteThresholds(score=0.5),
    fitted_on=fingerprint_photos("set, val", DIGESTS),
    thing_clusters=2,
    stuff_clusters=1,
    things=1,
    categories=(Category(id=1, name="cat"), Category(id=2, name="wall")),
    clusters={
        1: ClusterAssignment(category=1, purity=0.75, support=4),
        2: ClusterAssignment(category=None, purity=0.0, support=0),
        3: ClusterAssignment(category=2, purity=1.0, support=9),
    },
)


def test_names_come_back_as_they_were_written(tmp_path: Path) -> None:
    NAMES.write(tmp_path / "names.json")
    assert read_mapping(tmp_path / "names.json") == NAMES
    pixels = replace(NAMES, thresholds=None, method="cups")
    pixels.write(tmp_path / "names.json")
    assert read_mapping(tmp_path / "names.json") == pixels


def test_the_table_has_a_place_for_every_cluster_that_has_a_name() -> None:
    assert NAMES.make_table().tolist() == [-1, 0, -1, 1]


def test_a_photo_is_known_again_and_the_order_of_photos_does_not_matter() -> None:
    assert NAMES.fitted_on.count_overlap(["b" * 64, "d" * 64]) == 1
    assert fingerprint_photos("set, val", DIGESTS[::-1]) == NAMES.fitted_on
    assert fingerprint_photos("set, val", ["a" * 64]).sha256 != NAMES.fitted_on.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this release reads 1"),
        ({"methd": "votes"}, "did you mean 'method'"),
        ({"method": "hungarian"}, "unknown method 'hungarian'"),
        ({"clusters": {"9": {"category": 1, "share": 1, "met": 1}}}, r"clusters \[9\] do not fit"),
        ({"clusters": {"1": {"category": 8, "share": 1, "met": 1}}}, r"clusters \[1\] do not fit"),
        ({"fitted_on": {}}, "photos"),
        ({"categories": 3}, "not iterable"),
    ],
)
def test_a_file_that_is_not_such_names_is_refused_by_its_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "names.json"
    NAMES.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=f"names.json is no file of names: .*{message}"):
        read_mapping(path)


def test_a_missing_file_and_a_list_are_no_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json is no file of names"):
        read_mapping(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"list\.json is no file of names"):
        read_mapping(tmp_path / "list.json")
