"""Models on disk, version by version: `MODEL/VERSION/` is an artifact, `MODEL/active.json` says what is served."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from model.contract import CONTRACT_FILE, Contract, read_contract
from model.errors import ConfigError, ModelNotFound, RegistryConflict, RegistryError, UsegError
from model.files import atomic_directory, atomic_write
from model.registry.category_names import NAMES_SUFFIX, names_path
from model.registry.deployment import (
    Action,
    DeploymentEvent,
    DeploymentState,
    TrafficSplit,
    parse_state,
    serialize_state,
)
from model.registry.signatures import SIGNATURE_FILE

DEPLOYMENT_FILE = "active.json"
_RESERVED = (DEPLOYMENT_FILE, NAMES_SUFFIX)
"""Ends of names that files beside the versions have."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", re.ASCII)
_LOCK_FILE = ".lock"
_LOCK_S = 30.0


def utc_now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


class Registry:
    """A folder of models. Whoever reads sees a whole state; those who change it, in whatever process, take turns."""

    def __init__(self, folder: Path, clock: Callable[[], datetime] = utc_now) -> None:
        self.folder = folder
        self._clock = clock

    def list_models(self) -> tuple[str, ...]:
        """The models by name. Raises RegistryError if the folder is none."""
        try:
            return tuple(sorted(each.name for each in self.folder.iterdir() if _is_named(each)))
        except OSError as error:
            raise RegistryError(f"{self.folder} is no registry: {error.strerror}") from error

    def list_versions(self, model: str) -> tuple[str, ...]:
        """The versions of a model, those that were written last last."""
        folder = self._find_model(model)
        found = [each for each in folder.iterdir() if _is_named(each) and (each / CONTRACT_FILE).is_file()]
        return tuple(each.name for each in sorted(found, key=lambda each: (each.stat().st_mtime_ns, each.name)))

    def find_version(self, model: str, version: str) -> Path:
        """The artifact of a version. Raises ModelNotFound."""
        folder = self._find_model(model) / version
        if folder.name != version or not _is_named(folder):
            raise ModelNotFound(f"model {model!r} has no version {version!r}: there is {self._tell_versions(model)}")
        return folder

    def names_path(self, model: str, version: str) -> Path:
        """The file of the names that people give to the clusters of a version; neither need be there."""
        return names_path(self.folder / model / version)

    def read_state(self, model: str) -> DeploymentState:
        """What is to be served of a model. Raises RegistryError if that cannot be read."""
        path = self._find_model(model) / DEPLOYMENT_FILE
        try:
            return parse_state(path.read_bytes())
        except FileNotFoundError:
            return DeploymentState()
        except (OSError, ValueError, KeyError, TypeError, UsegError) as error:
            raise RegistryError(f"{path} does not say what is served: {error!r}") from error

    def add(self, artifact: Path, *, model: str | None = None, version: str | None = None, by: str) -> Contract:
        """Copy an artifact into the registry, whole or not at all, under its own name and version or under others.

        Raises RegistryConflict if there is such a version: versions never change; and what `read_contract` raises.
        """
        contract = read_contract(artifact)
        named = replace(contract, name=model or contract.name, version=version or contract.version)
        if named != contract and (artifact / SIGNATURE_FILE).exists():
            raise RegistryConflict(f"{artifact} is signed as {contract.name} {contract.version}: sign it anew")
        folder = self.folder / check_name(named.name, "model")
        target = folder / check_name(named.version, "version")
        with self._lock(named.name):
            _remove_leftovers(folder)
            if target.exists():
                raise RegistryConflict(f"{target} is there: give another version")
            with atomic_directory(target) as sibling:
                _copy(artifact, contract, sibling)
                if named != contract:
                    named.write(sibling)
                read_contract(sibling)
            self._write(named.name, self.read_state(named.name), "add", named.version, by, "")
        return named

    def activate(self, model: str, version: str, *, by: str, reason: str = "") -> DeploymentState:
        """From now on the version answers."""
        read_contract(self.find_version(model, version))
        return self._change(model, lambda state: ("activate", version, state.activate(version)), by, reason)

    def deploy_as(
        self,
        model: str,
        role: Literal["canary", "shadow"],
        version: str,
        share: float,
        *,
        by: str,
        reason: str = "",
    ) -> DeploymentState:
        """A version is tried: as canary on a share of the callers, as shadow on a share of the pictures, unheard."""
        read_contract(self.find_version(model, version))
        trial = TrafficSplit(version=version, share=share)
        reason = reason or f"a share of {share:g}"
        return self._change(model, lambda state: (role, version, state.deploy_as(role, trial)), by, reason)

    def promote(self, model: str, *, by: str, reason: str = "") -> DeploymentState:
        """The canary becomes active."""

        def change(state: DeploymentState) -> tuple[Action, str | None, DeploymentState]:
            promoted = state.promote()
            return "promote", promoted.active, promoted

        return self._change(model, change, by, reason)

    def roll_back(self, model: str, *, by: str, reason: str = "") -> DeploymentState:
        """Take back the last step: a trial ends, or the version before the active one answers again."""
        return self._change(model, lambda state: ("rollback", *state.roll_back()), by, reason)

    def quarantine(
        self, model: str, version: str, action: Literal["rollback", "refuse"], *, by: str, reason: str
    ) -> DeploymentState:
        """Take a version that is no good out of its role, if it still has one: else nothing changes."""

        def change(state: DeploymentState) -> tuple[Action, str | None, DeploymentState] | None:
            withdrawn = state.quarantine(version)
            noted = [event.action for event in state.history if event.version == version][-1:]
            is_known = withdrawn == state and noted == [action]
            return None if is_known or version not in state.versions_in_use else (action, version, withdrawn)

        return self._change(model, change, by, reason)

    def remove(self, model: str, version: str, *, by: str, reason: str = "") -> DeploymentState:
        """Delete a version. Raises RegistryConflict for one that is served or tried."""
        path = self.find_version(model, version)

        def change(state: DeploymentState) -> tuple[Action, str | None, DeploymentState]:
            if version in state.versions_in_use:
                raise RegistryConflict(f"version {version!r} is active, or tried: it cannot be removed")
            retired = Path(tempfile.mkdtemp(prefix=".removed.", dir=path.parent))
            path.rename(retired / version)
            shutil.rmtree(retired)
            return "remove", version, state.quarantine(version)

        return self._change(model, change, by, reason)

    def _change(
        self,
        model: str,
        change: Callable[[DeploymentState], tuple[Action, str | None, DeploymentState] | None],
        by: str,
        reason: str,
    ) -> DeploymentState:
        self._find_model(model)
        with self._lock(model):
            before = self.read_state(model)
            changed = change(before)
            return before if changed is None else self._write(model, changed[2], changed[0], changed[1], by, reason)

    def _write(
        self, model: str, state: DeploymentState, action: Action, version: str | None, by: str, reason: str
    ) -> DeploymentState:
        at = self._clock().isoformat(timespec="seconds")
        noted = state.record(DeploymentEvent(at=at, action=action, version=version, by=by, reason=reason))
        with atomic_write(self.folder / model / DEPLOYMENT_FILE) as sibling:
            sibling.write_text(serialize_state(noted), encoding="utf-8")
        return noted

    @contextmanager
    def _lock(self, model: str) -> Iterator[None]:
        folder = self.folder / model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / _LOCK_FILE, timeout=_LOCK_S):
                yield
        except Timeout as error:
            raise RegistryError(f"{folder} is locked for more than {_LOCK_S:g} s by another change") from error
        except OSError as error:
            raise RegistryError(f"{folder} cannot be changed: {error}") from error

    def _find_model(self, model: str) -> Path:
        folder = self.folder / model
        if folder.name != model or not _is_named(folder):
            known = ", ".join(self.list_models()) or "none yet"
            raise ModelNotFound(f"{self.folder} holds no model {model!r}: there is {known}")
        return folder

    def _tell_versions(self, model: str) -> str:
        return ", ".join(self.list_versions(model)) or "none yet"


def check_name(text: str, what: str) -> str:
    """The name of a model or a version. Raises ConfigError for one that could lead out of its folder."""
    if not _NAME.fullmatch(text) or text.endswith(_RESERVED):
        raise ConfigError(
            f"a {what} is named by letters, digits and . _ + -, beginning with one of the former: {text!r}"
        )
    return text


def _is_named(folder: Path) -> bool:
    return _NAME.fullmatch(folder.name) is not None and not folder.name.endswith(_RESERVED) and folder.is_dir()


def _copy(artifact: Path, contract: Contract, folder: Path) -> None:
    for name in (CONTRACT_FILE, *contract.files):
        shutil.copyfile(artifact / name, folder / name)
    if (artifact / SIGNATURE_FILE).exists():
        shutil.copyfile(artifact / SIGNATURE_FILE, folder / SIGNATURE_FILE)


def _remove_leftovers(folder: Path) -> None:
    """Delete what changes that were killed have left behind; to be called under the lock."""
    for each in folder.glob(".*"):
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        elif each.name.startswith(f".{DEPLOYMENT_FILE}."):
            each.unlink(missing_ok=True)
