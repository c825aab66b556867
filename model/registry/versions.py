"""Versions of models on disk: `MODEL/VERSION/` is an artifact, `MODEL/deployment.json` says which ones are served."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from model.contract import CONTRACT_FILE, Contract, read_contract
from model.errors import ConfigError, ModelNotFound, RegistryConflict, RegistryError, UsegError
from model.files import atomic_directory, remove_temp_files, replace_file
from model.registry.category_names import NAMES_SUFFIX, get_timestamp, names_path
from model.registry.signatures import SIGNATURE_FILE
from model.validation import parse_versioned_json, to_versioned_json

FORMAT_VERSION = 2
DEPLOYMENT_FILE = "deployment.json"
_RESERVED_SUFFIXES = (DEPLOYMENT_FILE, NAMES_SUFFIX)
"""Of files next to the versions."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", re.ASCII)
_LOCK_FILE = ".lock"
_LOCK_TIMEOUT_S = 30.0
MAX_EVENTS = 200
"""Events in the history; older ones are removed."""
_MAX_PREVIOUS = 20

Role = Literal["canary", "shadow"]
Action = Literal["add", "activate", "shadow", "canary", "promote", "rollback", "reject", "remove"]


@dataclass(frozen=True, kw_only=True)
class DeploymentEvent:
    """An entry of the history."""

    timestamp: str
    """ISO 8601, in UTC."""
    action: Action
    version: str | None
    author: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrafficSplit:
    """A version that receives a fraction of the traffic."""

    version: str
    traffic_fraction: Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True)
class DeploymentState:
    """The versions to serve. Changes return a new state, and raise RegistryConflict if they contradict this one."""

    active: str | None = None
    previous_versions: tuple[str, ...] = ()
    """Versions that were active before, the latest last, without those that were rolled back."""
    canary: TrafficSplit | None = None
    """Serves a fraction of the clients."""
    shadow: TrafficSplit | None = None
    """Runs on a copy of a fraction of the images; its results are only measured."""
    revision: int = 0
    """Number of changes."""
    history: tuple[DeploymentEvent, ...] = ()

    @property
    def versions_in_use(self) -> frozenset[str]:
        """Versions that must be loaded."""
        splits = (self.canary, self.shadow)
        return frozenset({*([self.active] if self.active else []), *(each.version for each in splits if each)})

    def activate(self, version: str) -> "DeploymentState":
        """Return the state that serves the version to everybody; the active one stays available for a rollback."""
        if version == self.active:
            return self
        previous = [each for each in (*self.previous_versions, self.active) if each and each != version]
        return replace(self.remove_split(version), active=version, previous_versions=tuple(previous[-_MAX_PREVIOUS:]))

    def deploy_as(self, role: Role, split: TrafficSplit) -> "DeploymentState":
        """Return the state with the version as canary or shadow, in place of another in that role."""
        if self.active is None:
            raise RegistryConflict(f"no version is active: activate one before a {role}")
        if split.version == self.active:
            raise RegistryConflict(f"version {split.version!r} is active already")
        state = self.remove_split(split.version)
        return replace(state, canary=split) if role == "canary" else replace(state, shadow=split)

    def remove_split(self, version: str) -> "DeploymentState":
        """Return the state without the version as canary or shadow."""
        return replace(
            self,
            canary=None if self.canary and self.canary.version == version else self.canary,
            shadow=None if self.shadow and self.shadow.version == version else self.shadow,
        )

    def promote(self) -> tuple[str, "DeploymentState"]:
        """Return the version of the canary, and the state in which it is active."""
        if not self.canary:
            raise RegistryConflict("there is no canary to promote")
        return self.canary.version, self.activate(self.canary.version)

    def roll_back(self) -> tuple[str, "DeploymentState"]:
        """Return the version that is rolled back, and the state without it.

        That is the canary, else the shadow, else the active version, in whose place the previous one becomes active.
        """
        if split := self.canary or self.shadow:
            return split.version, self.remove_split(split.version)
        if not self.active or not self.previous_versions:
            raise RegistryConflict("there is no previous version to roll back to")
        return self.active, self.quarantine(self.active)

    def quarantine(self, version: str) -> "DeploymentState":
        """Return the state without the version in any role; an active one stays if there is no previous one."""
        previous = tuple(each for each in self.previous_versions if each != version)
        state = replace(self.remove_split(version), previous_versions=previous)
        if version == self.active and previous:
            state = replace(state, active=previous[-1], previous_versions=previous[:-1])
        return state

    def record(self, event: DeploymentEvent) -> "DeploymentState":
        """Return the next revision, with the event in its history."""
        return replace(self, revision=self.revision + 1, history=(*self.history, event)[-MAX_EVENTS:])


class Registry:
    """A folder of models. Readers always see a complete state; writers, in any process, take turns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list_models(self) -> tuple[str, ...]:
        """Return the names of the models, sorted. Raises RegistryError if the folder cannot be read."""
        try:
            return tuple(sorted(each.name for each in self.folder.iterdir() if _has_valid_name(each)))
        except OSError as error:
            raise RegistryError(f"{self.folder} is not a registry: {error.strerror}") from error

    def list_versions(self, model: str) -> tuple[str, ...]:
        """Return the versions of a model, the latest last."""
        folder = self._find_model(model)
        found = [each for each in folder.iterdir() if _has_valid_name(each) and (each / CONTRACT_FILE).is_file()]
        return tuple(each.name for each in sorted(found, key=lambda each: (each.stat().st_mtime_ns, each.name)))

    def find_version(self, model: str, version: str) -> Path:
        """Return the artifact of a version. Raises ModelNotFound."""
        folder = self._find_model(model) / version
        if folder.name != version or not _has_valid_name(folder):
            known = ", ".join(self.list_versions(model)) or "none yet"
            raise ModelNotFound(f"model {model!r} has no version {version!r}: there is {known}")
        return folder

    def read_state(self, model: str) -> DeploymentState:
        """Return the deployment of a model. Raises RegistryError if it cannot be read."""
        path = self._find_model(model) / DEPLOYMENT_FILE
        try:
            hint = ": add the versions to a new registry"
            return parse_versioned_json(DeploymentState, path.read_bytes(), FORMAT_VERSION, hint)
        except FileNotFoundError:
            return DeploymentState()
        except (OSError, UsegError) as error:
            raise RegistryError(f"{path} is not a valid deployment: {error}") from error

    def add(self, artifact: Path, *, model: str | None = None, version: str | None = None, author: str) -> Contract:
        """Copy an artifact into the registry, under its own name and version or others; names of its clusters too.

        Raises RegistryConflict if the version exists (versions never change), and what `read_contract` raises.
        """
        contract = read_contract(artifact)
        named = replace(contract, name=model or contract.name, version=version or contract.version)
        if named != contract and (artifact / SIGNATURE_FILE).exists():
            raise RegistryConflict(f"{artifact} is signed as {contract.name} {contract.version}: sign it again")
        folder = self.folder / check_name(named.name, "model")
        target = folder / check_name(named.version, "version")
        with self._lock(named.name):
            _remove_leftovers(folder)
            if target.exists():
                raise RegistryConflict(f"{target} exists: give another version")
            with atomic_directory(target) as temporary:
                _copy_artifact(artifact, contract, temporary)
                if named != contract:
                    named.write(temporary)
                read_contract(temporary)
            if (names := names_path(artifact)).is_file():
                replace_file(names_path(target), names.read_bytes())
            self._write(named.name, self.read_state(named.name), "add", named.version, author, "")
        return named

    def activate(self, model: str, version: str, *, author: str, reason: str = "") -> DeploymentState:
        """Serve the version to everybody."""
        read_contract(self.find_version(model, version))
        return self._change(model, "activate", lambda state: (version, state.activate(version)), author, reason)

    def deploy_as(
        self, model: str, role: Role, version: str, traffic_fraction: float, *, author: str, reason: str = ""
    ) -> DeploymentState:
        """Serve a version to a fraction of the clients (canary), or run it on a fraction of the images (shadow)."""
        read_contract(self.find_version(model, version))
        split = TrafficSplit(version=version, traffic_fraction=traffic_fraction)
        reason = reason or f"traffic fraction {traffic_fraction:g}"
        return self._change(model, role, lambda state: (version, state.deploy_as(role, split)), author, reason)

    def promote(self, model: str, *, author: str, reason: str = "") -> DeploymentState:
        """Serve the canary to everybody."""
        return self._change(model, "promote", DeploymentState.promote, author, reason)

    def roll_back(self, model: str, *, author: str, reason: str = "") -> DeploymentState:
        """Stop the canary or the shadow; without either, serve the previous version again."""
        return self._change(model, "rollback", DeploymentState.roll_back, author, reason)

    def quarantine(
        self, model: str, version: str, action: Literal["rollback", "reject"], *, author: str, reason: str
    ) -> DeploymentState:
        """Remove a faulty version from its role. Nothing changes if it has none, or if that was recorded already."""

        def change(state: DeploymentState) -> tuple[str, DeploymentState] | None:
            without = state.quarantine(version)
            last = [event.action for event in state.history if event.version == version][-1:]
            is_recorded = without == state and last == [action]
            return None if is_recorded or version not in state.versions_in_use else (version, without)

        return self._change(model, action, change, author, reason)

    def remove(self, model: str, version: str, *, author: str, reason: str = "") -> DeploymentState:
        """Delete a version. Raises RegistryConflict for one that is in use."""
        path = self.find_version(model, version)

        def change(state: DeploymentState) -> tuple[str, DeploymentState]:
            if version in state.versions_in_use:
                raise RegistryConflict(f"version {version!r} is active, a canary or a shadow: it cannot be removed")
            trash = Path(tempfile.mkdtemp(prefix=".removed.", dir=path.parent))
            path.rename(trash / version)
            shutil.rmtree(trash)
            return version, state.quarantine(version)

        return self._change(model, "remove", change, author, reason)

    def _change(
        self,
        model: str,
        action: Action,
        change: Callable[[DeploymentState], tuple[str, DeploymentState] | None],
        author: str,
        reason: str,
    ) -> DeploymentState:
        """Apply `change`, which returns the version that changes and the new state, or None to change nothing."""
        self._find_model(model)
        with self._lock(model):
            state = self.read_state(model)
            if (changed := change(state)) is None:
                return state
            version, new = changed
            return self._write(model, new, action, version, author, reason)

    def _write(
        self, model: str, state: DeploymentState, action: Action, version: str, author: str, reason: str
    ) -> DeploymentState:
        event = DeploymentEvent(timestamp=get_timestamp(), action=action, version=version, author=author, reason=reason)
        recorded = state.record(event)
        replace_file(self.folder / model / DEPLOYMENT_FILE, to_versioned_json(recorded, FORMAT_VERSION))
        return recorded

    @contextmanager
    def _lock(self, model: str) -> Iterator[None]:
        folder = self.folder / model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / _LOCK_FILE, timeout=_LOCK_TIMEOUT_S):
                yield
        except Timeout as error:
            raise RegistryError(f"{folder} is locked by another change for more than {_LOCK_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise RegistryError(f"{folder} cannot be changed: {error}") from error

    def _find_model(self, model: str) -> Path:
        folder = self.folder / model
        if folder.name != model or not _has_valid_name(folder):
            known = ", ".join(self.list_models()) or "none yet"
            raise ModelNotFound(f"{self.folder} has no model {model!r}: there is {known}")
        return folder


def check_name(text: str, what: str) -> str:
    """Return the name of a model or version. Raises ConfigError for one that is not a plain file name."""
    if not _is_plain(text):
        raise ConfigError(
            f"the name of a {what} has letters, digits and . _ + -, and starts with a letter or digit: {text!r}"
        )
    return text


def _is_plain(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and not name.endswith(_RESERVED_SUFFIXES)


def _has_valid_name(folder: Path) -> bool:
    return _is_plain(folder.name) and folder.is_dir()


def _copy_artifact(artifact: Path, contract: Contract, folder: Path) -> None:
    signature = (SIGNATURE_FILE,) if (artifact / SIGNATURE_FILE).exists() else ()
    for name in (CONTRACT_FILE, *contract.files, *signature):
        shutil.copyfile(artifact / name, folder / name)


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files of changes that were killed. The caller holds the lock."""
    remove_temp_files(folder / DEPLOYMENT_FILE)
    for each in folder.glob(".*/"):
        shutil.rmtree(each, ignore_errors=True)
