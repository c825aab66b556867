"""`useg registry`: adds and deploys versions of models."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

from model.errors import ConfigError
from model.registry.versions import DeploymentState, Registry

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
TrafficFraction = Annotated[
    float, Parameter(validator=Number(gt=0.0, lte=1.0), help="Fraction of the clients or images, above 0, at most 1.")
]


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
    return _change(registry, change, Registry.activate, version)


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
    return _change(registry, change, Registry.deploy_as, "canary", version, traffic_fraction)


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
    return _change(registry, change, Registry.deploy_as, "shadow", version, traffic_fraction)


@app.command
def promote(registry: RegistryFolder, /, *, change: Change = _NO_OPTIONS) -> dict[str, Any]:
    """Serve the canary to all requests."""
    return _change(registry, change, Registry.promote)


@app.command
def rollback(registry: RegistryFolder, /, *, change: Change = _NO_OPTIONS) -> dict[str, Any]:
    """Stop the canary or the shadow; without either, serve the previous version again."""
    return _change(registry, change, Registry.roll_back)


@app.command
def remove(registry: RegistryFolder, version: Version, /, *, change: Change = _NO_OPTIONS) -> dict[str, Any]:
    """Delete a version that is not served."""
    return _change(registry, change, Registry.remove, version)


def _change(
    folder: Path, options: ChangeOptions, method: Callable[..., DeploymentState], *arguments: object
) -> dict[str, Any]:
    """Call a method of the registry for the model that is meant."""
    registry = Registry(folder)
    models = registry.list_models()
    if options.model is None and len(models) != 1:
        raise ConfigError(f"{folder} holds {', '.join(models) or 'no model'}: give --model")
    model = options.model or models[0]
    state = method(registry, model, *arguments, author=options.author, reason=options.reason)
    return _describe(registry, model, state, events=1)


def _describe(registry: Registry, model: str, state: DeploymentState, events: int = _SHOWN_EVENTS) -> dict[str, Any]:
    content = asdict(state)
    history = content.pop("history")[-events:]
    return {"name": model, "versions": list(registry.list_versions(model)), **content, "history": history}
