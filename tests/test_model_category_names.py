"""Names of clusters: changes, undo, history, files and mappings."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_contract

from model.embeddings import Category, make_examples
from model.errors import InvalidCategoryNames, InvalidParameter, UsegError
from model.formats.coco import get_cluster_category_id
from model.registry.category_names import (
    MAX_CHANGES,
    CategoryName,
    CategoryNames,
    check_clusters,
    edit_names,
    empty_names,
    parse_mapping,
    parse_names,
    read_names,
)

CONTRACT = make_contract(
    3, 2, name="small", version="3", files={"network.onnx": "ab" * 32},
    categories={1: Category(id=10, name="person"), 4: Category(id=21, name="sky")},
)  # fmt: skip
OTHER = replace(CONTRACT, version="4", files={"network.onnx": "cd" * 32})
RENAME_IN_A_PROCESS = """
import sys
from pathlib import Path
from test_model_category_names import CONTRACT, rename
for change in range(4):
    rename(Path(sys.argv[1]), int(sys.argv[2]), f"{sys.argv[2]} {change}")
"""


def rename(path: Path, cluster: int, category: str) -> CategoryNames:
    return edit_names(path, CONTRACT, lambda names: names.rename({cluster: category}, "ann"))


def list_names(names: CategoryNames) -> dict[int, str]:
    return {cluster: name.category_name for cluster, name in names.names.items()}


def test_a_name_is_stored_with_its_author(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    assert read_names(path, CONTRACT) == empty_names(CONTRACT)
    given = rename(path, 2, "  dog ")
    assert read_names(path, CONTRACT) == given
    assert (given.revision, given.names[2].category_name, given.names[2].author) == (1, "dog", "ann")
    assert given.names[2].timestamp.endswith("+00:00")
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".json"] == ["names.json"]


def test_names_override_the_contract_and_known_categories_keep_their_ids() -> None:
    names = empty_names(CONTRACT).rename({1: "dog", 2: "person", 3: "dog", 5: "sky"}, "ann")
    named = names.apply(CONTRACT)
    # "dog" is new: its id is 21 plus its first cluster; only cluster 2 is a person now
    dog, sky = Category(id=22, name="dog"), Category(id=21, name="sky")
    assert named.categories == {1: dog, 2: Category(id=10, name="person"), 3: dog, 4: sky, 5: sky}
    assert replace(named, categories=CONTRACT.categories) == CONTRACT


def test_a_thing_and_stuff_of_the_same_name_are_two_categories() -> None:
    named = empty_names(CONTRACT).rename({2: "sky"}, "ann").apply(CONTRACT)
    assert named.categories[2] == Category(id=23, name="sky")
    assert get_cluster_category_id(3, named) == 26  # a cluster without a name: above all others


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "1 to 80 printable characters") for text in ("x" * 81, "two\nlines", "\x1b[31mred", "\u200b")),
        (" 7 ", "'7' could be taken for a cluster id"),
    ],
)
def test_a_name_that_is_not_printable_or_a_number_is_rejected(text: str, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        empty_names(CONTRACT).rename({1: text}, "ann")


def test_a_change_can_be_undone_and_so_can_the_undo() -> None:
    names = empty_names(CONTRACT).rename({1: "dog", 2: "cat"}, "ann").rename({1: "wolf"}, "ann")
    undone = names.undo("bob")
    assert (list_names(undone), undone.revision) == ({1: "dog", 2: "cat"}, 3)
    assert list_names(undone.undo("bob")) == {1: "wolf", 2: "cat"}
    assert list_names(undone.undo("bob", revision=1)) == {}
    with pytest.raises(InvalidParameter, match="no change 9 to undo: the history has 1, 2, 3"):
        undone.undo("bob", revision=9)


def test_the_history_is_bounded_but_not_the_names() -> None:
    names = empty_names(CONTRACT).rename({2: "dog"}, "ann")
    for change in range(MAX_CHANGES):
        names = names.rename({1: f"name {change}"}, "ann")
    assert [change.revision for change in names.history] == list(range(2, MAX_CHANGES + 2))
    assert list_names(names) == {1: f"name {MAX_CHANGES - 1}", 2: "dog"}


def test_replaced_names_keep_their_authors() -> None:
    mine = empty_names(CONTRACT).rename({1: "dog", 2: "cat"}, "ann")
    theirs = empty_names(CONTRACT).rename({2: "lion", 5: "grass"}, "bob")
    replaced = mine.replace_all(theirs.names, "ann")
    assert list_names(replaced) == {2: "lion", 5: "grass"}
    assert (replaced.names[5].author, replaced.history[-1].author, replaced.revision) == ("bob", "ann", 2)
    assert list_names(replaced.undo("ann")) == {1: "dog", 2: "cat"}


def test_applied_examples_are_replaced_and_restored_with_the_names_and_user_names_come_before_them() -> None:
    contract = replace(CONTRACT, embedding_dim=2)
    cat, dog = (
        make_examples((Category(id=1, name=name),), 1, np.zeros(1, np.int64), np.ones((1, 2), np.float32))
        for name in ("cat", "dog")
    )
    matched = CategoryName(category_name="cat", author="useg match", timestamp="", category_id=1)
    names = empty_names(contract).rename({2: "lion"}, "ann")
    assert names.apply(contract).examples is None
    assert names.apply(replace(contract, examples=dog)).examples == replace(dog, except_clusters=(2,))
    baked = replace(contract, examples=replace(dog, except_clusters=(3,)))
    assert names.apply(baked).examples == replace(dog, except_clusters=(2, 3))
    applied = names.replace_all({1: matched}, "ann", cat)
    assert applied.apply(replace(contract, examples=dog)).examples == cat
    again = applied.replace_all({1: matched}, "ann", dog)
    assert (again.revision, again.undo("ann").examples, again.undo("ann").names) == (3, cat, applied.names)
    without = applied.replace_all({1: matched}, "ann")
    assert without.apply(replace(contract, examples=dog)).examples is None  # names of other categories
    stored = parse_names(applied.to_json().encode(), contract, "names.json")
    assert stored == applied
    with pytest.raises(InvalidCategoryNames, match=r"has examples of 2 values, the embeddings of .* have 0: run"):
        parse_names(applied.to_json().encode(), CONTRACT, "names.json")


def test_concurrent_changes_by_threads_and_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    command = [sys.executable, "-c", RENAME_IN_A_PROCESS, str(path)]
    folder = str(Path(__file__).parent)
    root = str(Path(__file__).parents[1])
    environment = {"PYTHONPATH": f"{folder}:{root}", "OPENBLAS_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, cluster], env=environment) for cluster in "45"]
    with ThreadPoolExecutor(3) as threads:
        edits = [
            threads.submit(rename, path, 1 + change % 3, f"{1 + change % 3} {change // 3}") for change in range(12)
        ]
    assert [change.exception() for change in edits] == [None] * 12
    assert [process.wait(60) for process in processes] == [0, 0]
    names = read_names(path, CONTRACT)
    assert names.revision == 20
    assert sorted(change.revision for change in names.history) == list(range(1, 21))
    assert set(names.names) == {1, 2, 3, 4, 5}
    assert (names.names[4].category_name, names.names[5].category_name) == ("4 3", "5 3")


GOOD = json.loads(empty_names(CONTRACT).rename({1: "dog"}, "ann").to_json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (json.dumps(GOOD).encode()[:-40], "not JSON"),
        (json.dumps({**GOOD, "format_version": 1}).encode(), "format version 1, this release reads 2"),
        (json.dumps({**GOOD, "nams": {}}).encode(), "did you mean 'names'"),
        (json.dumps({**GOOD, "revision": "1"}).encode(), "revision: input should be a valid integer"),
        (
            json.dumps({**GOOD, "names": {"1": {"category_name": "\t", "author": "", "timestamp": ""}}}).encode(),
            "invalid name",
        ),
        (
            json.dumps({**GOOD, "names": {"9": GOOD["names"]["1"]}}).encode(),
            r"unknown clusters \[9\]: small 3 has 1\.\.5",
        ),
    ],
)
def test_an_invalid_file_is_rejected_and_stays_unchanged(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(InvalidCategoryNames, match=message):
        rename(path, 2, "cat")
    assert path.read_bytes() == content


def test_names_of_another_network_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    rename(path, 1, "dog")
    with pytest.raises(
        InvalidCategoryNames, match=r"another network \(small 3\), not of small 4: `useg names transfer`"
    ):
        read_names(path, OTHER)
    with pytest.raises(InvalidCategoryNames, match="another network"):
        parse_names(path.read_bytes(), OTHER, "the body")


def test_a_failing_change_leaves_the_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    rename(path, 1, "dog")
    before = path.read_bytes()
    with pytest.raises(UsegError, match="printable"):
        rename(path, 2, "\n\t!\n.")
    assert path.read_bytes() == before
    with pytest.raises(InvalidCategoryNames, match=r"clusters \[6\]"):
        check_clusters([6], CONTRACT)
    with pytest.raises(InvalidCategoryNames, match="cannot be written"):
        rename(path / "names.json", 1, "dog")


MAPPING: dict[str, Any] = {
    "format_version": 1,
    "method": "majority",
    "thing_clusters": 3,
    "stuff_clusters": 2,
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "sky"}],
    "clusters": {"2": {"category": 1}, "3": {"category": None}, "4": {"category": 2}, "5": {"category": 2}},
}


def test_a_mapping_names_clusters_with_the_ids_of_its_categories() -> None:
    names = parse_mapping(json.dumps(MAPPING).encode(), CONTRACT, "mapping.json")
    assert list_names(names) == {2: "cat", 4: "sky", 5: "sky"}
    assert names.names[2].author == "useg match, majority"
    named = empty_names(CONTRACT).replace_all(names.names, "ann").apply(CONTRACT)
    sky = Category(id=2, name="sky")
    assert named.categories == {1: Category(id=10, name="person"), 2: Category(id=1, name="cat"), 4: sky, 5: sky}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thing_clusters": 5}, "5 thing and 2 stuff clusters, the artifact has 3 and 2"),
        ({"clusters": {"1": {"category": 9}}}, "KeyError"),
        ({"categories": None}, "TypeError"),
        ({"clusters": {"8": {"category": 1}}}, r"unknown clusters \[8\]"),
        ({"categories": [{"id": 1, "name": "two\nlines"}]}, "printable"),
    ],
)
def test_an_invalid_mapping_is_rejected(changes: dict[str, Any], message: str) -> None:
    changes.setdefault("clusters", {"1": {"category": 1}})
    with pytest.raises(InvalidCategoryNames, match=message):
        parse_mapping(json.dumps({**MAPPING, **changes}).encode(), CONTRACT, "mapping.json")
