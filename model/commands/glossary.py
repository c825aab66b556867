"""`useg-model glossary`: the names that people gave to an artifact's clusters, beside it."""

import argparse
from pathlib import Path
from typing import Any

from model.contract import Contract, read_contract
from model.errors import InvalidCategoryNames
from model.files import atomic_write
from model.registry.category_names import CategoryNames, check_clusters, edit_names, names_path, parse_names, read_names


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shown = _add_action(actions.add_parser("list", help="every cluster's name, and where it comes from"))
    shown.set_defaults(work=run_list)
    given = _add_action(actions.add_parser("set", help="name a cluster"))
    given.add_argument("cluster", type=int, metavar="CLUSTER", help="its number")
    given.add_argument("category", metavar="NAME", help="an empty one gives back the artifact's own")
    given.set_defaults(work=run_set)
    exported = _add_action(actions.add_parser("export", help="all that was given, with its history, to a file"))
    exported.add_argument("--out", type=Path, required=True, metavar="JSON", help="file to write")
    exported.set_defaults(work=run_export)
    imported = _add_action(actions.add_parser("import", help="names of `export` or `carry`, in the place of all"))
    imported.add_argument("names", type=Path, metavar="JSON", help="file to read")
    imported.set_defaults(work=run_import)
    undone = _add_action(actions.add_parser("undo", help="the names as they were before an edit"))
    undone.add_argument("--revision", type=int, metavar="N", help="of the edit (the last one)")
    undone.set_defaults(work=run_undo)


def run_list(options: argparse.Namespace) -> dict[str, Any]:
    contract = read_contract(options.artifact)
    return _describe(options, contract, read_names(_find(options), contract))


def run_set(options: argparse.Namespace) -> dict[str, Any]:
    contract = read_contract(options.artifact)
    check_clusters({options.cluster: None}, contract)
    names = {options.cluster: options.category}
    named = edit_names(_find(options), contract, lambda old: old.rename(names, options.by))
    return _describe(options, contract, named)


def run_export(options: argparse.Namespace) -> dict[str, Any]:
    glossary = read_names(_find(options), read_contract(options.artifact))
    with atomic_write(options.out) as sibling:
        sibling.write_text(glossary.to_json(), encoding="utf-8")
    return {"names": str(options.out), "revision": glossary.revision, "named": len(glossary.names)}


def run_import(options: argparse.Namespace) -> dict[str, Any]:
    contract = read_contract(options.artifact)
    try:
        content = options.names.read_bytes()
    except OSError as error:
        raise InvalidCategoryNames(f"{options.names} cannot be read: {error.strerror}") from error
    given = parse_names(content, contract, str(options.names))
    adopted = edit_names(_find(options), contract, lambda old: old.replace_all(given.names, options.by))
    return _describe(options, contract, adopted)


def run_undo(options: argparse.Namespace) -> dict[str, Any]:
    contract = read_contract(options.artifact)
    undone = edit_names(_find(options), contract, lambda old: old.undo(options.by, options.revision))
    return _describe(options, contract, undone)


def _add_action(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--file", type=Path, metavar="JSON", help="where the names lie (ARTIFACT.names.json)")
    parser.add_argument("--by", default="useg-model", help="who does it, for the history (%(default)s)")
    return parser


def _find(options: argparse.Namespace) -> Path:
    return options.file or names_path(options.artifact)


def _describe(options: argparse.Namespace, contract: Contract, glossary: CategoryNames) -> dict[str, Any]:
    named = glossary.apply(contract).categories
    return {
        "file": str(_find(options)),
        "revision": glossary.revision,
        "given": {cluster: name.category for cluster, name in glossary.names.items()},
        "clusters": {cluster: category.name for cluster, category in named.items()},
    }
