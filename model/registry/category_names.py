"""Names of an artifact's clusters: one JSON file next to the artifact, with a history of changes.

The artifact itself stays unchanged, as its contract is hashed and signed.
"""

import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import Field

from model.contract import NETWORK_FILE, Contract
from model.embeddings import Category, CategoryExamples, CategoryId
from model.errors import ConfigError, InvalidCategoryNames, InvalidParameter
from model.files import remove_temp_files, replace_file
from model.validation import parse, parse_versioned_json, to_versioned_json

FORMAT_VERSION = 2
MAX_NAME_LENGTH = 80
MAX_CHANGES = 100
"""Changes in the history; older ones are removed, the names stay."""
NAMES_SUFFIX = ".names.json"
"""Suffix of the file; the name of the artifact's folder precedes it."""
_LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class CategoryName:
    """The name of a cluster."""

    category_name: str
    author: str = field(compare=False)
    timestamp: str = field(compare=False)
    """ISO 8601, in UTC."""
    category_id: CategoryId | None = None
    """Id of the category in the dataset that the name comes from; None for a name given by a user."""

    def __post_init__(self) -> None:
        if not self.category_name or normalize_name(self.category_name) != self.category_name:
            raise InvalidParameter(f"invalid name {self.category_name!r}")


@dataclass(frozen=True, kw_only=True)
class NameChange:
    """A change of the names of one or more clusters."""

    revision: int
    """The revision after the change."""
    author: str
    timestamp: str
    before: dict[int, CategoryName | None]
    """Names by cluster; None: the name in the contract, if any."""
    after: dict[int, CategoryName | None]
    examples_before: CategoryExamples | None = None
    """The examples that the change replaced, if `is_example_change`."""
    is_example_change: bool = False


@dataclass(frozen=True, kw_only=True)
class CategoryNames:
    """Names of the clusters of one network. A cluster without a name here has the name in its contract, if any."""

    model: str
    version: str
    network_sha256: str
    """Hash of the network that the clusters belong to."""
    revision: Annotated[int, Field(ge=0)] = 0
    """Number of changes."""
    names: dict[int, CategoryName] = field(default_factory=dict)
    examples: CategoryExamples | None = None
    """Examples that came with applied names; None: those of the contract, unless names were applied without any."""
    history: tuple[NameChange, ...] = ()
    """The last changes, oldest first."""

    def rename(self, names: Mapping[int, str], author: str) -> "CategoryNames":
        """Return the names after naming these clusters; an empty name restores the one in the contract.

        The result is `self` if nothing changes. Raises InvalidParameter for an invalid name, or for a number.
        """
        timestamp = get_timestamp()
        texts = {cluster: normalize_name(text) for cluster, text in names.items()}
        if number := next((text for text in texts.values() if text.isdecimal()), None):
            raise InvalidParameter(f"the name {number!r} could be taken for a cluster id: give it a letter")
        changes = {
            cluster: CategoryName(category_name=text, author=author, timestamp=timestamp) if text else None
            for cluster, text in texts.items()
        }
        return self._change(changes, author, self.examples)

    def replace_all(
        self, names: Mapping[int, CategoryName], author: str, examples: CategoryExamples | None = None
    ) -> "CategoryNames":
        """Return the names after replacing all of them, and the examples; `names` keep their authors."""
        changes = {cluster: names.get(cluster) for cluster in sorted({*self.names, *names})}
        return self._change(changes, author, examples)

    def undo(self, author: str, revision: int | None = None) -> "CategoryNames":
        """Return the names after restoring what a change replaced; None: the last change.

        Undoing is a change itself. Raises InvalidParameter if the history does not contain the revision.
        """
        found = next((change for change in reversed(self.history) if revision in (None, change.revision)), None)
        if found is None:
            known = ", ".join(str(change.revision) for change in self.history) or "no change"
            raise InvalidParameter(f"no change {revision or ''} to undo: the history has {known}")
        examples = found.examples_before if found.is_example_change else self.examples
        return self._change(found.before, author, examples)

    def apply(self, contract: Contract) -> Contract:
        """Return the contract with these names in place of its own.

        A name that the contract has among things, or among stuff, keeps its category id. A new name without an id gets
        one above the contract's: it depends on the first cluster of that name only, so that it is stable.
        """
        given = [name.category_id for name in self.names.values() if name.category_id is not None]
        base = max([*given, *(category.id for category in contract.categories.values())], default=0)
        known = {
            (category.name, contract.is_thing(cluster)): category.id
            for cluster, category in sorted(contract.categories.items())
        }
        categories = dict(contract.categories)
        for cluster, name in sorted(self.names.items()):
            category_id = name.category_id
            if category_id is None:
                category_id = known.setdefault((name.category_name, contract.is_thing(cluster)), base + cluster)
            categories[cluster] = Category(id=category_id, name=name.category_name)
        return replace(contract, categories=dict(sorted(categories.items())), examples=self._apply_examples(contract))

    def to_json(self) -> str:
        """Return the JSON that `parse_names` reads."""
        return to_versioned_json(self, FORMAT_VERSION)

    def _apply_examples(self, contract: Contract) -> CategoryExamples | None:
        """Return the examples in force: names given by users come first, then examples, then the names of clusters."""
        is_applied = any(name.category_id is not None for name in self.names.values())
        examples = self.examples if self.examples or is_applied else contract.examples
        given = {cluster for cluster, name in self.names.items() if name.category_id is None}
        if examples is None:
            return None
        return replace(examples, except_clusters=tuple(sorted({*examples.except_clusters, *given})))

    def _change(
        self, changes: Mapping[int, CategoryName | None], author: str, examples: CategoryExamples | None
    ) -> "CategoryNames":
        is_example_change = examples != self.examples
        changed = {cluster: name for cluster, name in sorted(changes.items()) if name != self.names.get(cluster)}
        if not changed and not is_example_change:
            return self
        change = NameChange(
            revision=self.revision + 1,
            author=author,
            timestamp=get_timestamp(),
            before={cluster: self.names.get(cluster) for cluster in changed},
            after=changed,
            examples_before=self.examples if is_example_change else None,
            is_example_change=is_example_change,
        )
        names = {cluster: name for cluster, name in sorted({**self.names, **changed}.items()) if name is not None}
        history = (*self.history, change)[-MAX_CHANGES:]
        return replace(self, revision=change.revision, names=names, examples=examples, history=history)


def normalize_name(text: str) -> str:
    """Return a name in Unicode's composed form (NFC), without surrounding spaces.

    Raises InvalidParameter if it is too long or not printable.
    """
    name = unicodedata.normalize("NFC", text).strip()
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidParameter(f"a name has 1 to {MAX_NAME_LENGTH} printable characters, got {text[:100]!r}")
    return name


def names_path(artifact: Path) -> Path:
    """Return the path of an artifact's names: next to its folder."""
    folder = artifact.resolve()
    return folder.with_name(folder.name + NAMES_SUFFIX)


def empty_names(contract: Contract) -> CategoryNames:
    """Return no names, for the clusters that the network of the contract defines."""
    network = contract.files.get(NETWORK_FILE, "")
    return CategoryNames(model=contract.name, version=contract.version, network_sha256=network)


def apply_names(artifact: Path, contract: Contract) -> Contract:
    """Return the contract of an artifact with the names that were given since. Raises as `parse_names` does."""
    return read_names(names_path(artifact), contract).apply(contract)


def read_names(path: Path, contract: Contract) -> CategoryNames:
    """Read the names of the contract's clusters; without a file there are none. Raises as `parse_names` does."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return empty_names(contract)
    except OSError as error:
        raise InvalidCategoryNames(f"{path} cannot be read: {error.strerror}") from error
    return parse_names(content, contract, str(path))


def parse_names(content: bytes, contract: Contract, source: str) -> CategoryNames:
    """Parse the output of `CategoryNames.to_json`; `source` is named in errors.

    Raises InvalidCategoryNames if the content is invalid or names the clusters of another network.
    """
    try:
        names = parse_versioned_json(CategoryNames, content, FORMAT_VERSION, ": name the clusters again")
    except (ConfigError, InvalidParameter) as error:
        raise InvalidCategoryNames(f"{source} has no valid names, fix or delete it: {error}") from error
    if names.network_sha256 != empty_names(contract).network_sha256:
        raise InvalidCategoryNames(
            f"{source} names the clusters of another network ({names.model} {names.version}), not of "
            f"{contract.name} {contract.version}: `useg names transfer` finds corresponding clusters"
        )
    return _check_names(names, contract, source)


def parse_mapping(content: bytes, contract: Contract, source: str) -> CategoryNames:
    """Return the names in a file written by `useg match`; `source` is named in errors.

    Raises InvalidCategoryNames if the file is invalid or was made for other clusters.
    """
    try:
        decoded = json.loads(content)
        sizes = decoded["thing_clusters"], decoded["stuff_clusters"]
        categories = {each["id"]: str(each["name"]) for each in decoded["categories"]}
        assigned = {int(cluster): each["category"] for cluster, each in decoded["clusters"].items()}
        examples = parse(CategoryExamples, decoded["examples"]) if decoded.get("examples") else None
        author, timestamp = f"useg match, {decoded['method']}", get_timestamp()
        names = {
            cluster: CategoryName(
                category_name=categories[number], author=author, timestamp=timestamp, category_id=int(number)
            )
            for cluster, number in sorted(assigned.items())
            if number is not None
        }
    except (ValueError, KeyError, TypeError, AttributeError, InvalidParameter, ConfigError) as error:
        raise InvalidCategoryNames(f"{source} is not a file written by `useg match`: {error!r}") from error
    if sizes != (contract.thing_clusters, contract.stuff_clusters):
        raise InvalidCategoryNames(
            f"{source} is for {sizes[0]} thing and {sizes[1]} stuff clusters, the artifact has "
            f"{contract.thing_clusters} and {contract.stuff_clusters}: run `useg match` for it"
        )
    return _check_names(replace(empty_names(contract), names=names, examples=examples), contract, source)


def _check_names(names: CategoryNames, contract: Contract, source: str) -> CategoryNames:
    """Return the names. Raises InvalidCategoryNames if clusters or embeddings are not those of the contract."""
    check_clusters(names.names, contract)
    examples = names.examples
    if examples and examples.embedding_dim != contract.embedding_dim:
        raise InvalidCategoryNames(
            f"{source} has examples of {examples.embedding_dim} values, the embeddings of {contract.name} "
            f"{contract.version} have {contract.embedding_dim}: run `useg match` for it"
        )
    return names


def check_clusters(clusters: Iterable[int], contract: Contract) -> None:
    """Raise InvalidCategoryNames for a cluster that the contract does not have."""
    count = contract.thing_clusters + contract.stuff_clusters
    if unknown := [cluster for cluster in clusters if not 1 <= cluster <= count]:
        raise InvalidCategoryNames(f"unknown clusters {unknown[:5]}: {contract.name} {contract.version} has 1..{count}")


def edit_names(path: Path, contract: Contract, change: Callable[[CategoryNames], CategoryNames]) -> CategoryNames:
    """Read, change and write the names under a lock between threads and processes; return the new names.

    Raises InvalidCategoryNames if the file cannot be read or written, and what `change` raises; the file then stays as
    it was.
    """
    try:
        with FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S):
            old = read_names(path, contract)
            new = change(old)
            if new != old:
                remove_temp_files(path)
                replace_file(path, new.to_json())
            return new
    except Timeout as error:
        raise InvalidCategoryNames(f"{path} is locked by another change for {_LOCK_TIMEOUT_S:g} s: retry") from error
    except OSError as error:
        raise InvalidCategoryNames(f"{path} cannot be written: {error.strerror or error}") from error


def get_timestamp() -> str:
    """Return the current time as names store it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
