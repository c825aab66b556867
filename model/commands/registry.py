"""`useg registry`, `useg sign` and `useg create-signing-key`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.types import PositiveFloat

from model.errors import ConfigError
from model.registry.deployment import DeploymentState
from model.registry.signatures import create_signing_key as write_signing_key
from model.registry.signatures import sign_artifact
from model.registry.versions import Registry

_SHOWN_EVENTS = 10

app = App(name="registry", help="Manage the versions of models that a service serves.")

RegistryFolder = Annotated[Path, Parameter(name="REGISTRY", help="Folder of the registry.")]
Version = Annotated[str, Parameter(name="VERSION", help="Version of the model.")]


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """What every change of a model's state takes."""

    model: str | None = None
    """Name of the model; required if the registry has several."""
    author: str = "useg"
    """Who makes the change, for the history."""
    reason: str = ""
    """Why, for the history."""


_NO_OPTIONS = ChangeOptions()
Change = Annotated[ChangeOptions, Parameter(name="*")]
TrafficFraction = Annotated[PositiveFloat, Parameter(help="Fraction of the clients or images, above 0, at most 1.")]


@app.command(name="list")
def list_models(registry: RegistryFolder, /) -> dict[str, Any]:
    """List models, their versions and which of them are served."""
    opened = Registry(registry)
    return {"models": [_describe(opened, name, opened.read_state(name)) for name in opened.list_models()]}


@app.command
def add(
    registry: RegistryFolder,
    artifact: Path,
    /,
    *,
    model: str | None = None,
    version: str | None = None,
    author: str = "useg",
) -> dict[str, Any]:
    """Copy an artifact into the registry as a new version, which is not served yet.

    Parameters
    ----------
    artifact
        Folder of the artifact.
    model
        Name of the model (default: that of the artifact).
    version
        Version of the model (default: that of the artifact).
    author
        Who makes the change, for the history.
    """
    opened = Registry(registry)
    contract = opened.add(artifact, model=model, version=version, author=author)
    folder = opened.find_version(contract.name, contract.version)
    return {"model": contract.name, "version": contract.version, "artifact": str(folder)}


@app.command
def activate(registry: RegistryFolder, version: Version, /, *, change: Change = _NO_OPTIONS) -> dict[str, Any]:
    """Serve a version to all requests."""
    opened, name = _open(registry, change.model)
    return _describe(opened, name, opened.activate(name, version, author=change.author, reason=change.reason), events=1)


@app.command
def canary(
    registry: RegistryFolder,
    version: Version,
    /,
    *,
    traffic_fraction: TrafficFraction = 0.1,
    change: Change = _NO_OPTIONS,
) -> dict[str, Any]:
    """Serve a version to a fraction of the clients."""
    return _deploy_as("canary", registry, version, traffic_fraction, change)


@app.command
def shadow(
    registry: RegistryFolder,
    version: Version,
    /,
    *,
    traffic_fraction: TrafficFraction = 0.1,
    change: Change = _NO_OPTIONS,
) -> dict[str, Any]:
    """Run a version on a copy of a fraction of the images; its results are only measured."""
    return _deploy_as("shadow", registry, version, traffic_fraction, change)


@app.command
def promote(registry: RegistryFolder, /, *, change: Change = _NO_OPTIONS) -> dict[str, Any]:
    """Serve the canary to all requests."""
    opened, name = _open(registry, change.model)
    return _describe(opened, name, opened.promote(name, author=change.author, reason=change.reason), events=1)


@app.command
def rollback(registry: RegistryFolder, /, *, change: Change = _NO_OPTIONS) -> dict[str, Any]:
    """Stop the canary or the shadow; without either, serve the previous version again."""
    opened, name = _open(registry, change.model)
    return _describe(opened, name, opened.roll_back(name, author=change.author, reason=change.reason), events=1)


@app.command
def remove(registry: RegistryFolder, version: Version, /, *, change: Change = _NO_OPTIONS) -> dict[str, Any]:
    """Delete a version that is not served."""
    opened, name = _open(registry, change.model)
    return _describe(opened, name, opened.remove(name, version, author=change.author, reason=change.reason), events=1)


def sign(artifact: Path, /, *, key: Path, name: str = "") -> dict[str, Any]:
    """Sign an artifact, for services that require signatures.

    Parameters
    ----------
    artifact
        Folder of the artifact; the signature is written next to its contract.
    key
        Private key, as `useg create-signing-key` writes it.
    name
        Name of the key, for people.
    """
    sign_artifact(artifact, key, name)
    return {"artifact": str(artifact), "signed": True}


def create_signing_key(key: Path, /, *, name: str = "useg") -> dict[str, Any]:
    """Create a key pair to sign artifacts; needs the extra `signing`.

    Parameters
    ----------
    key
        File to write the private key to.
    name
        Name of the key, in the line of the public key.
    """
    return {"key": str(key), "trusted_keys_line": write_signing_key(key, name)}


def _open(folder: Path, model: str | None) -> tuple[Registry, str]:
    """Return the registry and the model that is meant."""
    registry = Registry(folder)
    models = registry.list_models()
    if model is None and len(models) != 1:
        raise ConfigError(f"{folder} holds {', '.join(models) or 'no model'}: give --model")
    return registry, models[0] if model is None else model


def _deploy_as(
    role: Literal["canary", "shadow"], registry: Path, version: str, traffic_fraction: float, change: ChangeOptions
) -> dict[str, Any]:
    opened, name = _open(registry, change.model)
    state = opened.deploy_as(name, role, version, traffic_fraction, author=change.author, reason=change.reason)
    return _describe(opened, name, state, events=1)


def _describe(registry: Registry, model: str, state: DeploymentState, events: int = _SHOWN_EVENTS) -> dict[str, Any]:
    content = asdict(state)
    history = content.pop("history")[-events:]
    return {"name": model, "versions": list(registry.list_versions(model)), **content, "history": history}
