"""Names that people give to an artifact's clusters, kept beside it: its own files stay as they were hashed."""

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from model.contract import Category, Contract, read_contract, reject_unknown
from model.errors import ConfigError, InvalidCategoryNames, InvalidParameter
from model.files import atomic_write, remove_temp_files

FORMAT_VERSION = 1
MAX_NAME_LENGTH = 80
"""In a name."""
MAX_CHANGES = 100
"""In the history; older ones are forgotten, the names stay."""
NAMES_SUFFIX = ".names.json"
"""Of the file, after the name of the artifact's folder."""
_LOCK_S = 10.0


@dataclass(frozen=True, kw_only=True)
class CategoryName:
    """What a cluster is called, by whom and since when."""

    category: str
    by: str
    at: str
    """ISO 8601, in UTC."""


@dataclass(frozen=True, kw_only=True)
class NameChange:
    """One change, of one cluster or of several."""

    revision: int
    """The one that it led to."""
    by: str
    at: str
    before: dict[int, CategoryName | None]
    """Of each cluster that was changed; None: it went by the contract."""
    after: dict[int, CategoryName | None]


@dataclass(frozen=True, kw_only=True)
class CategoryNames:
    """The names of one artifact; a cluster that is not among them goes by its contract."""

    model: str
    version: str
    network_sha256: str
    """Of the file that its clusters come from: to another network they say nothing."""
    revision: int = 0
    """Counts the edits."""
    names: dict[int, CategoryName] = field(default_factory=dict)
    history: tuple[NameChange, ...] = ()
    """The last edits, oldest first."""

    def rename(self, categories: Mapping[int, str], by: str) -> "CategoryNames":
        """The glossary in which these clusters are called so, one edit later; an empty name gives back the contract's.

        What changes nothing is no edit. Raises InvalidParameter for a name that is none.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        texts = {cluster: normalize_name(text) for cluster, text in categories.items()}
        return self._change(
            {c: CategoryName(category=text, by=by, at=at) if text else None for c, text in texts.items()}, by
        )

    def replace_all(self, names: Mapping[int, CategoryName], by: str) -> "CategoryNames":
        """The glossary in which clusters have these names and no others, one edit later; who gave them stays told."""
        return self._change({cluster: names.get(cluster) for cluster in sorted({*self.names, *names})}, by)

    def undo(self, by: str, revision: int | None = None) -> "CategoryNames":
        """The glossary one edit later, in which the clusters of an edit, by default the last, are called as before it.

        Raises InvalidParameter if the history has no such edit.
        """
        found = next((edit for edit in reversed(self.history) if revision in (None, edit.revision)), None)
        if found is None:
            known = ", ".join(str(edit.revision) for edit in self.history) or "none"
            raise InvalidParameter(f"no edit {revision or ''} to undo: the history holds {known}")
        return self._change(found.before, by)

    def apply(self, contract: Contract) -> Contract:
        """The contract with these names in the place of its own.

        A name that the contract has among things, or among stuff, is that category. A new one is numbered above the
        contract's: by the first cluster that has it, so that it keeps its number as others come and go.
        """
        base = max((category.id for category in contract.categories.values()), default=0)
        known = {
            (category.name, contract.is_thing(cluster)): category.id
            for cluster, category in sorted(contract.categories.items())
        }
        categories = dict(contract.categories)
        for cluster, name in sorted(self.names.items()):
            number = known.setdefault((name.category, contract.is_thing(cluster)), base + cluster)
            categories[cluster] = Category(id=number, name=name.category)
        return replace(contract, categories=dict(sorted(categories.items())))

    def to_json(self) -> str:
        """As JSON; `parse_names` reads it."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def _change(self, changes: Mapping[int, CategoryName | None], by: str) -> "CategoryNames":
        before = {cluster: self.names.get(cluster) for cluster in changes}
        changed = sorted(c for c, name in changes.items() if _read_category(name) != _read_category(before[c]))
        if not changed:
            return self
        edit = NameChange(
            revision=self.revision + 1,
            by=by,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            before={cluster: before[cluster] for cluster in changed},
            after={cluster: changes[cluster] for cluster in changed},
        )
        names = {c: name for c, name in ({**self.names, **edit.after}).items() if name is not None}
        history = (*self.history, edit)[-MAX_CHANGES:]
        return replace(self, revision=edit.revision, names=dict(sorted(names.items())), history=history)


def normalize_name(text: str) -> str:
    """A name without spaces around it, composed (NFC). Raises InvalidParameter unless it is printable and short
    enough."""
    name = unicodedata.normalize("NFC", text).strip()
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidParameter(f"a name has 1 to {MAX_NAME_LENGTH} printable characters, got {text[:100]!r}")
    return name


def names_path(artifact: Path) -> Path:
    """Where the names of an artifact lie: beside its folder, under its name."""
    folder = artifact.resolve()
    return folder.with_name(folder.name + NAMES_SUFFIX)


def network_hash(contract: Contract) -> str:
    """The hash of what makes the clusters."""
    return contract.files.get(contract.network_files[-1], "")


def empty_names(contract: Contract) -> CategoryNames:
    """One without names."""
    return CategoryNames(model=contract.name, version=contract.version, network_sha256=network_hash(contract))


def read_names(path: Path, contract: Contract) -> CategoryNames:
    """The names of the contract's clusters, none if there is no file. Raises InvalidCategoryNames as `parse_names`
    does."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return empty_names(contract)
    except OSError as error:
        raise InvalidCategoryNames(f"{path} cannot be read: {error.strerror}") from error
    return parse_names(content, contract, str(path))


def parse_names(content: bytes, contract: Contract, source: str) -> CategoryNames:
    """What `CategoryNames.to_json` wrote; `source` is told in errors.

    Raises InvalidCategoryNames if it is none that this version reads, or belongs to another network than the
    contract's.
    """
    try:
        glossary = _parse(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError, InvalidParameter) as error:
        raise InvalidCategoryNames(f"{source} holds no names of clusters, repair or remove it: {error}") from error
    if glossary.network_sha256 != network_hash(contract):
        raise InvalidCategoryNames(
            f"{source} names the clusters of another network ({glossary.model} {glossary.version}), not of "
            f"{contract.name} {contract.version}: `useg-model carry` finds which of them are alike"
        )
    check_clusters(glossary.names, contract)
    return glossary


def check_clusters(clusters: Mapping[int, Any], contract: Contract) -> None:
    """Raise InvalidCategoryNames for a cluster that the contract does not have."""
    count = contract.thing_clusters + contract.stuff_clusters
    if strangers := [each for each in clusters if not 1 <= each <= count]:
        raise InvalidCategoryNames(f"names clusters {strangers[:5]}, {contract.name} {contract.version} has 1..{count}")


def edit_names(path: Path, contract: Contract, change: Callable[[CategoryNames], CategoryNames]) -> CategoryNames:
    """Read the names, change them and write them, while nobody else does; the names as they now are.

    Threads and processes wait for each other. Raises InvalidCategoryNames, and leaves the file as it was, if it
    cannot be read
    or written, and what `change` raises.
    """
    try:
        with FileLock(f"{path}.lock", timeout=_LOCK_S):
            old = read_names(path, contract)
            new = change(old)
            if new != old:
                remove_temp_files(path)
                with atomic_write(path) as sibling:
                    sibling.write_text(new.to_json(), encoding="utf-8")
            return new
    except Timeout as error:
        raise InvalidCategoryNames(f"{path} is being changed by somebody else for {_LOCK_S:g} s: try again") from error
    except OSError as error:
        raise InvalidCategoryNames(f"{path} cannot be written: {error.strerror or error}") from error


def _read_category(name: CategoryName | None) -> str:
    return name.category if name else ""


def _parse(content: dict[str, Any]) -> CategoryNames:
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version}, this release reads {FORMAT_VERSION}")
    reject_unknown(content, CategoryNames)
    glossary = CategoryNames(
        model=_check(content["model"], str),
        version=_check(content["version"], str),
        network_sha256=_check(content["network_sha256"], str),
        revision=_check(content["revision"], int),
        names={int(cluster): _parse_name(name) for cluster, name in content["names"].items()},
        history=tuple(_parse_edit(edit) for edit in content["history"]),
    )
    if glossary.revision < 0:
        raise ValueError(f"revision {glossary.revision}")
    return glossary


def _parse_edit(content: dict[str, Any]) -> NameChange:
    reject_unknown(content, NameChange)
    before, after = (
        {int(cluster): _parse_name(name) if name else None for cluster, name in content[key].items()}
        for key in ("before", "after")
    )
    revision, by, at = _check(content["revision"], int), _check(content["by"], str), _check(content["at"], str)
    return NameChange(revision=revision, by=by, at=at, before=before, after=after)


def _parse_name(content: dict[str, Any]) -> CategoryName:
    reject_unknown(content, CategoryName)
    name = CategoryName(**{key: _check(content[key], str) for key in ("category", "by", "at")})
    if not name.category or normalize_name(name.category) != name.category:
        raise ValueError(f"a name that is none: {name.category!r}")
    return name


def _check(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


_KEPT = ("method", "fitted_on")
"""What the contract tells of the names' origin."""


def apply_mapping_file(artifact: Path, names: Path) -> Contract:
    """Give the artifact the names of a file that `useg-train match` wrote; returns the contract as it now is.

    Clusters without a category there lose the name that they had. Raises ConfigError, and leaves the artifact as it
    was, if the file is none of names or names the clusters of another network; what `read_contract` raises.
    """
    contract = read_contract(artifact)
    try:
        content: dict[str, Any] = json.loads(names.read_bytes())
        categories = _parse_categories(content, contract)
        origin = {key: content[key] for key in _KEPT}
        origin["fitted_on"] = {key: origin["fitted_on"][key] for key in ("truth", "pictures", "sha256")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{names} is no file of names, as `useg-train match` writes it: {error!r}") from error
    named = replace(contract, categories=categories, provenance={**contract.provenance, "names": origin})
    named.write(artifact)
    return named


def _parse_categories(content: dict[str, Any], contract: Contract) -> dict[int, Category]:
    given = content["thing_clusters"], content["stuff_clusters"]
    if given != (contract.thing_clusters, contract.stuff_clusters):
        raise ConfigError(
            f"the names are for {given[0]} thing and {given[1]} stuff clusters, the artifact has "
            f"{contract.thing_clusters} and {contract.stuff_clusters}: run `useg-train match` for it"
        )
    known = {each["id"]: Category(id=int(each["id"]), name=str(each["name"])) for each in content["categories"]}
    matches = {int(cluster): each["category"] for cluster, each in content["clusters"].items()}
    return {cluster: known[category] for cluster, category in sorted(matches.items()) if category is not None}
