"""Names for the clusters of an artifact: data, written into its contract without touching weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.contract import Category, Contract, read_contract
from model.errors import ConfigError

_KEPT = ("method", "fitted_on")
"""What the contract tells of the names' origin."""


def name_clusters(artifact: Path, names: Path) -> Contract:
    """Give the artifact the names of a file that `useg-train match` wrote; returns the contract as it now is.

    Clusters without a category there lose the name that they had. Raises ConfigError, and leaves the artifact as it
    was, if the file is none of names or names the clusters of another network; what `read_contract` raises.
    """
    contract = read_contract(artifact)
    try:
        content: dict[str, Any] = json.loads(names.read_bytes())
        categories = _read_categories(content, contract)
        origin = {key: content[key] for key in _KEPT}
        origin["fitted_on"] = {key: origin["fitted_on"][key] for key in ("truth", "pictures", "sha256")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{names} is no file of names, as `useg-train match` writes it: {error!r}") from error
    named = replace(contract, categories=categories, provenance={**contract.provenance, "names": origin})
    named.write(artifact)
    return named


def _read_categories(content: dict[str, Any], contract: Contract) -> dict[int, Category]:
    given = content["thing_clusters"], content["stuff_clusters"]
    if given != (contract.thing_clusters, contract.stuff_clusters):
        raise ConfigError(
            f"the names are for {given[0]} thing and {given[1]} stuff clusters, the artifact has "
            f"{contract.thing_clusters} and {contract.stuff_clusters}: run `useg-train match` for it"
        )
    known = {each["id"]: Category(id=int(each["id"]), name=str(each["name"])) for each in content["categories"]}
    matches = {int(cluster): each["category"] for cluster, each in content["clusters"].items()}
    return {cluster: known[category] for cluster, category in sorted(matches.items()) if category is not None}
