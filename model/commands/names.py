"""`useg names`: show and change the names of an artifact's clusters."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.types import PositiveInt

from model.contract import read_contract
from model.files import replace_file
from model.registry.category_names import (
    CategoryNames,
    check_clusters,
    edit_names,
    names_path,
    parse_mapping,
    parse_names,
    read_names,
)
from model.registry.name_transfer import TransferThresholds, keep_user_names, propose_names, transfer_names

_AUTHOR = "useg"

Artifact = Annotated[Path, Parameter(name="ARTIFACT", help="Folder of the artifact.")]
Author = Annotated[str, Parameter(help="Who makes the change, for the history.")]

app = App(name="names", help="Show and change the names of clusters.")


@app.command
def show(artifact: Artifact, /, *, out: Path | None = None) -> dict[str, Any]:
    """Show the name of every cluster that has one.

    Parameters
    ----------
    out
        File to write all names to, with their history; `useg names apply` reads it.
    """
    names = read_names(names_path(artifact), read_contract(artifact))
    if out is not None:
        _write(names, out)
    return _describe(artifact, names)


@app.command(name="set")
def set_name(artifact: Artifact, cluster: int, name: str, /, *, author: Author = _AUTHOR) -> dict[str, Any]:
    """Name a cluster.

    Parameters
    ----------
    cluster
        Id of the cluster, from 1.
    name
        The name; an empty one restores the name in the artifact's contract.
    """
    contract = read_contract(artifact)
    check_clusters([cluster], contract)
    names = edit_names(names_path(artifact), contract, lambda old: old.rename({cluster: name}, author))
    return _describe(artifact, names)


@app.command
def undo(artifact: Artifact, /, *, revision: PositiveInt | None = None, author: Author = _AUTHOR) -> dict[str, Any]:
    """Undo a change.

    Parameters
    ----------
    revision
        Revision of the change (default: the last one).
    """
    names = edit_names(names_path(artifact), read_contract(artifact), lambda old: old.undo(author, revision))
    return _describe(artifact, names)


@app.command
def apply(
    artifact: Artifact,
    names: Path,
    /,
    *,
    merge: Annotated[bool, Parameter(negative="")] = False,
    into_artifact: Annotated[bool, Parameter(negative="")] = False,
    author: Author = _AUTHOR,
) -> dict[str, Any]:
    """Replace all names by those of a file, as one change.

    Parameters
    ----------
    names
        File written by `useg match`, `useg names transfer` or `useg names show --out`.
    merge
        Keep the names of clusters that the file does not name.
    into_artifact
        Write names and examples into the artifact's contract instead of the names file, so that they are part of the
        artifact. A signature has to be made again.
    """
    contract = read_contract(artifact)
    content = names.read_bytes()
    given = (parse_mapping if _is_mapping(content) else parse_names)(content, contract, str(names))
    if into_artifact:
        given.apply(contract if merge else replace(contract, categories={}, examples=None)).write(artifact)
        return _describe(artifact, read_names(names_path(artifact), read_contract(artifact)))

    def change(old: CategoryNames) -> CategoryNames:
        if not merge:
            return old.replace_all(given.names, author, given.examples)
        return old.replace_all({**old.names, **given.names}, author, given.examples or old.examples)

    applied = edit_names(names_path(artifact), contract, change)
    return _describe(artifact, applied)


@app.command
def transfer(
    old: Path,
    new: Path,
    /,
    *,
    photos: Path,
    out: Path,
    max_photos: PositiveInt = 200,
    thresholds: Annotated[TransferThresholds, Parameter(name="*")] = TransferThresholds(),  # noqa: B008
    user_names_only: bool = False,
    threads: PositiveInt = 2,
) -> dict[str, Any]:
    """Propose names for an artifact from those of an earlier version.

    Both artifacts segment the same photos; a name goes to the new cluster that covers the same pixels.

    Parameters
    ----------
    old
        Artifact that has names.
    new
        Artifact that needs names.
    photos
        Folder of photos to segment.
    out
        File to write the proposed names to; `useg names apply` reads it.
    max_photos
        Maximum number of photos to segment.
    user_names_only
        Transfer only names given by users, not those of the old artifact's contract.
    threads
        CPU threads.
    """
    from model.export.predictor import load_artifact_predictor, sample_photos

    before, after = (load_artifact_predictor(folder, threads=threads) for folder in (old, new))
    names = read_names(names_path(old), before.contract)
    named = keep_user_names(before.contract, names) if user_names_only else names.apply(before.contract)
    pairs = ((before.segment(image), after.segment(image)) for _, image in sample_photos(photos, max_photos))
    proposals = propose_names(pairs, named, after.contract, thresholds)
    transferred = transfer_names(proposals, named, after.contract)
    _write(transferred, out)
    return {
        "names": str(out),
        "from": f"{named.name} {named.version}",
        "to": f"{after.contract.name} {after.contract.version}",
        "transferred": len(transferred.names),
        "lost": sorted(
            {each.name for each in named.categories.values()}
            - {each.category_name for each in transferred.names.values()}
        ),
        "clusters": [asdict(each) for each in proposals],
    }


def _is_mapping(content: bytes) -> bool:
    """Whether a file is one that `useg match` wrote; if it is not JSON at all, `parse_names` reports that."""
    try:
        return "clusters" in json.loads(content)
    except (ValueError, TypeError):
        return False


def _write(names: CategoryNames, path: Path) -> None:
    replace_file(path, names.to_json())


def _describe(artifact: Path, names: CategoryNames) -> dict[str, Any]:
    categories = names.apply(read_contract(artifact)).categories
    return {
        "file": str(names_path(artifact)),
        "revision": names.revision,
        "given": {cluster: name.category_name for cluster, name in names.names.items()},
        "clusters": {cluster: category.name for cluster, category in categories.items()},
    }
