"""The `useg` command line: lists every subcommand and imports its module when it is used."""

import importlib.metadata
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Group, Parameter
from pydantic import ValidationError

from model.errors import UsegError
from model.validation import describe_errors, did_you_mean

SKIPPED = "skipped"
"""Key under which a command's result lists the inputs it left out; the exit status is then 3."""
REJECTED = "rejected"
"""Key under which a command's result lists why a check failed; the exit status is then 4."""

_DESCRIPTION = "Unsupervised panoptic segmentation: label, train, evaluate, export and serve."
COMMANDS = {
    "Train": {
        "label": ("training.cli.pseudo_labels:label", "Make panoptic pseudo-labels for a folder of photos."),
        "visualize": ("training.cli.pseudo_labels:visualize", "Draw pseudo-labels over their photos, as one image."),
        "train": ("training.cli.train:train", "Train a network on pseudo-labels."),
        "self-train": ("training.cli.train:self_train", "Make new pseudo-labels with a trained network."),
        "finetune": ("training.cli.train:finetune", "Fine-tune a run or an artifact on an annotated dataset."),
    },
    "Evaluate": {
        "eval": ("training.cli.evaluate:evaluate", "Evaluate a run, an artifact or pseudo-labels on a dataset."),
        "compare": ("training.cli.evaluate:compare", "Compare two of these on the same images, with intervals."),
        "match": ("training.cli.evaluate:match", "Map clusters to the classes of a dataset."),
        "gate": ("training.cli.evaluate:gate", "Check whether an artifact may replace another."),
    },
    "Artifacts": {
        "import": ("model.commands.artifacts:import_checkpoint", "Convert a published checkpoint to a run."),
        "export": ("model.commands.artifacts:export", "Export a run as an artifact, and check that both agree."),
        "check": ("model.commands.artifacts:check", "Load an artifact and compare its reference outputs."),
        "quantize": ("model.commands.artifacts:quantize", "Quantize an artifact to int8 for OpenVINO."),
        "bench": ("model.export.bench:bench", "Measure the latency and throughput of an artifact."),
        "segment": ("model.commands.artifacts:segment", "Segment photos to masks, overlays or a COCO dataset."),
        "drift-reference": (
            "model.commands.artifacts:drift_reference",
            "Store output statistics that later outputs are compared with.",
        ),
        "names": ("model.commands.names:app", "Show and change the names of clusters."),
    },
    "Serve": {
        "serve": ("service.cli:app", "Serve an artifact or a registry over HTTP."),
        "create-api-key": ("service.cli:create_api_key", "Create an API key for the service."),
        "registry": ("model.commands.registry:app", "Manage the versions of models that a service serves."),
        "sign": ("model.registry.signatures:sign", "Sign an artifact."),
        "create-signing-key": ("model.registry.signatures:create_signing_key", "Create a key pair to sign artifacts."),
    },
}
"""Subcommands by group: where each is defined, and its line in `useg --help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand, print its result as JSON, and return the exit status.

    0: done. 1: an error, reported on one line. 2: wrong usage. 3: done, but some inputs were left out.
    4: rejected by a check. 130: interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")  # noqa: TID251
    for name in ("training", "model.export"):  # these run for minutes or hours
        logging.getLogger(name).setLevel(logging.INFO)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _print_result(_build_app(given)(given, exit_on_error=False, print_error=False))
    except CycloptsError as error:
        return _report(_describe_usage(error), 2)
    except (UsegError, OSError) as error:
        return _report(str(error), 1)
    except ImportError as error:
        missing = error.__cause__ or error
        return _report(f"{missing}: install the packages of this command, for example `pip install 'useg[train]'`", 1)
    except KeyboardInterrupt:
        return _report("interrupted", 130)


def _build_app(given: list[str]) -> App:
    """Return the application. Raises CycloptsError for an unknown subcommand: cyclopts would import them all first."""
    app = App(
        name="useg",
        version=importlib.metadata.version("useg"),
        help=_DESCRIPTION,
        # Importing rich's Markdown would double the time of `useg --help`.
        help_format="markdown" if given and not given[0].startswith("-") else "plaintext",
        result_action="return_value",
        # A scalar option that is given twice takes the last value, as scripts expect.
        default_parameter=Parameter(negative_iterable=(), consume_multiple=True, allow_repeating=True),
        suppress_keyboard_interrupt=False,
    )
    for group, commands in COMMANDS.items():
        ordered = Group.create_ordered(group)
        for name, (path, summary) in commands.items():
            app.command(path, name=name, help=summary, group=ordered)
    if given and given[0] not in app:
        raise CycloptsError(msg=f"unknown command {given[0]!r}{did_you_mean(given[0], app, ': see useg --help')}")
    return app


def _describe_usage(error: Exception) -> str:
    cause = error.__cause__
    return describe_errors(cause) if isinstance(cause, ValidationError) else " ".join(str(error).split())


def _print_result(result: dict[str, Any] | None) -> int:
    if result is None:
        return 0
    print(format_result(result))
    if reasons := result.get(REJECTED):
        return _report(f"rejected: {'; '.join(reasons)}", 4)
    return 3 if result.get(SKIPPED) else 0


def format_result(result: dict[str, Any]) -> str:
    """Return a result as JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(json.loads(json.dumps(result), parse_constant=lambda _: None), indent=2)


def _report(message: str, status: int) -> int:
    print(f"useg: {message}", file=sys.stderr)
    return status
