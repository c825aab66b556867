import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.backends.runtime import open_session
from model.contract import Category, read_contract
from model.errors import UsegError
from model.names import name_clusters

CONTENT: dict[str, Any] = {
    "format_version": 1,
    "method": "majority",
    "fitted_on": {"truth": "set, val", "pictures": 2, "sha256": "ab", "photos": ["cd", "ef"]},
    "thing_clusters": 3,
    "stuff_clusters": 4,
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "sky"}],
    "clusters": {"2": {"category": 1}, "3": {"category": None}, "4": {"category": 2}, "7": {"category": 2}},
}


@pytest.fixture
def artifact(tmp_path: Path, tiny_artifact: Path) -> Path:
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def write_names(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**CONTENT, **changes}))
    return path


def test_the_artifact_carries_the_names_where_they_come_from_and_still_opens(tmp_path: Path, artifact: Path) -> None:
    name_clusters(artifact, write_names(tmp_path / "names.json"))
    contract, _ = open_session(artifact, threads=1)
    sky = Category(id=2, name="sky")
    assert contract.categories == {2: Category(id=1, name="cat"), 4: sky, 7: sky}
    origin = {"truth": "set, val", "pictures": 2, "sha256": "ab"}
    assert contract.provenance["names"] == {"method": "majority", "fitted_on": origin}


def test_new_names_replace_all_old_ones(tmp_path: Path, artifact: Path) -> None:
    name_clusters(artifact, write_names(tmp_path / "names.json"))
    name_clusters(artifact, write_names(tmp_path / "names.json", clusters={"1": {"category": 2}}))
    assert read_contract(artifact).categories == {1: Category(id=2, name="sky")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"thing_clusters": 5}, "5 thing and 4 stuff clusters, the artifact has 3 and 4"),
        ({"clusters": {"1": {"category": 9}}}, "KeyError"),
        ({"categories": None}, "TypeError"),
        ({"clusters": {"8": {"category": 1}}}, r"clusters \[8\]"),
    ],
)
def test_names_that_do_not_fit_leave_the_artifact_as_it_was(
    tmp_path: Path, artifact: Path, changes: dict[str, Any], told: str
) -> None:
    before = (artifact / "contract.json").read_bytes()
    with pytest.raises(UsegError, match=told):
        name_clusters(artifact, write_names(tmp_path / "names.json", **changes))
    assert (artifact / "contract.json").read_bytes() == before
