"""`useg-model registry`, `sign` and `new-key`: what is served, changed from the command line."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.registry.deployment import DeploymentState
from model.registry.signatures import create_signing_key, sign_artifact
from model.registry.versions import Registry

_SHOWN_EVENTS = 10
_BY = "useg-model"

Change = Callable[[Registry, str, argparse.Namespace], DeploymentState]


def add_registry(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `registry`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listed = commands.add_parser("list", help="models, versions and what is served")
    listed.add_argument("registry", type=Path, metavar="REGISTRY")
    listed.set_defaults(work=_run_list)
    _add_add(commands.add_parser("add", help="copy an artifact in as a new version; nothing is served by that"))
    for name, (help_text, has_version, change) in _CHANGES.items():
        _add_change(commands.add_parser(name, help=help_text), name, has_version, change)


def add_signing(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sign` and `new-key`."""
    _add_sign(commands.add_parser("sign", help="sign an artifact, for services that ask for it"))
    _add_new_key(commands.add_parser("new-key", help="make a key to sign with"))


def describe_state(
    registry: Registry, model: str, state: DeploymentState, events: int = _SHOWN_EVENTS
) -> dict[str, Any]:
    """A model as JSON, its history as far as the last `events`."""
    content = asdict(state)
    history = content.pop("history")[-events:]
    return {"name": model, "versions": list(registry.list_versions(model)), **content, "history": history}


def _add_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("registry", type=Path, metavar="REGISTRY", help="made if it is not there")
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--model", help="the model's name (default: the artifact's own)")
    parser.add_argument("--version", help="its version (default: the artifact's own)")
    parser.add_argument("--by", default=_BY, help="who does it, for the history (%(default)s)")
    parser.set_defaults(work=_run_add)


def _add_change(parser: argparse.ArgumentParser, name: str, has_version: bool, change: Change) -> None:
    parser.add_argument("registry", type=Path, metavar="REGISTRY")
    if has_version:
        parser.add_argument("version", metavar="VERSION")
    if name in ("canary", "shadow"):
        whose = "callers" if name == "canary" else "pictures"
        parser.add_argument("--share", type=float, default=0.1, help=f"of the {whose}, above 0 to 1 (%(default)s)")
    parser.add_argument("--model", help="needed where there are several")
    parser.add_argument("--by", default=_BY, help="who does it, for the history (%(default)s)")
    parser.add_argument("--reason", default="", help="why, for the history")
    parser.set_defaults(work=partial(_run_change, change))


def _add_sign(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a signature is written beside its contract")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="as `useg-model new-key` made it")
    parser.add_argument("--name", default="", help="what the key is called, for people")
    parser.set_defaults(work=_run_sign)


def _add_new_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", type=Path, metavar="FILE", help="the private key; keep it to yourself")
    parser.add_argument("--name", default="useg", help="what the key is called (%(default)s)")
    parser.set_defaults(work=_run_new_key)


def _run_list(options: argparse.Namespace) -> dict[str, Any]:
    registry = Registry(options.registry)
    return {
        "models": [describe_state(registry, name, registry.read_state(name)) for name in registry.list_models()],
    }


def _run_add(options: argparse.Namespace) -> dict[str, Any]:
    registry = Registry(options.registry)
    contract = registry.add(options.artifact, model=options.model, version=options.version, by=options.by)
    folder = registry.find_version(contract.name, contract.version)
    return {"model": contract.name, "version": contract.version, "artifact": str(folder)}


def _run_change(change: Change, options: argparse.Namespace) -> dict[str, Any]:
    registry = Registry(options.registry)
    model = _find_model(registry, options.model)
    return describe_state(registry, model, change(registry, model, options), events=1)


def _run_sign(options: argparse.Namespace) -> dict[str, Any]:
    sign_artifact(options.artifact, options.key, options.name)
    return {"artifact": str(options.artifact), "signed": True}


def _run_new_key(options: argparse.Namespace) -> dict[str, Any]:
    return {"key": str(options.key), "line for trusted_keys": create_signing_key(options.key, options.name)}


def _find_model(registry: Registry, given: str | None) -> str:
    models = registry.list_models()
    if given is None and len(models) != 1:
        raise ConfigError(f"{registry.folder} holds {', '.join(models) or 'no model'}: say --model")
    return models[0] if given is None else given


def _activate(registry: Registry, model: str, options: argparse.Namespace) -> DeploymentState:
    return registry.activate(model, options.version, by=options.by, reason=options.reason)


def _shadow(registry: Registry, model: str, options: argparse.Namespace) -> DeploymentState:
    return registry.deploy_as(model, "shadow", options.version, options.share, by=options.by, reason=options.reason)


def _canary(registry: Registry, model: str, options: argparse.Namespace) -> DeploymentState:
    return registry.deploy_as(model, "canary", options.version, options.share, by=options.by, reason=options.reason)


def _promote(registry: Registry, model: str, options: argparse.Namespace) -> DeploymentState:
    return registry.promote(model, by=options.by, reason=options.reason)


def _roll_back(registry: Registry, model: str, options: argparse.Namespace) -> DeploymentState:
    return registry.roll_back(model, by=options.by, reason=options.reason)


def _remove(registry: Registry, model: str, options: argparse.Namespace) -> DeploymentState:
    return registry.remove(model, options.version, by=options.by, reason=options.reason)


_CHANGES: dict[str, tuple[str, bool, Change]] = {
    "activate": ("a version answers from now on", True, _activate),
    "shadow": ("a version is run beside the active one on a share of the pictures; nobody hears of it", True, _shadow),
    "canary": ("a version answers a share of the callers", True, _canary),
    "promote": ("the canary answers everybody", False, _promote),
    "rollback": ("end the trial, or go back to the version before", False, _roll_back),
    "remove": ("delete a version that is not served", True, _remove),
}
