"""Strict reading of JSON into dataclasses, with errors on one line."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ConfigDict, ValidationError, create_model

from model.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def did_you_mean(given: str, known: Iterable[str], otherwise: str, form: Callable[[str], str] = repr) -> str:
    """Return the end of an error message about `given`: the nearest known word, or `otherwise` if none is near."""
    near = get_close_matches(given, known, n=1)
    return f", did you mean {form(near[0])}?" if near else otherwise


def to_versioned_json(value: "DataclassInstance", version: int) -> str:
    """Return a dataclass as indented JSON, its format version first."""
    return json.dumps({"format_version": version, **asdict(value)}, indent=2, ensure_ascii=False) + "\n"


def parse_versioned_json(target: type[T], content: bytes | str, version: int, hint: str = "") -> T:
    """Parse what `to_versioned_json` wrote. `hint` ends the error message for another format version.

    Raises ConfigError.
    """
    try:
        decoded = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise ConfigError("expected a JSON object")
    found = decoded.pop("format_version", None)
    if found != version:
        raise ConfigError(f"format version {found}, this release reads {version}{hint}")
    return parse(target, decoded)


def parse(target: type[T], content: Any) -> T:
    """Return the dataclass that decoded JSON describes, nested dataclasses included.

    Types are strict: a list is a tuple and an integer a float, but nothing else is converted. Raises ConfigError for an
    unknown key (with the nearest known one), a missing key or a value of another type, and what `__post_init__` raises.
    """
    key: Any = target  # mypy does not take type[T] for hashable
    try:
        parsed: T = _make_model(key).model_validate_json(json.dumps({"value": content})).value
    except ValidationError as error:
        raise ConfigError(_describe_first(error, target)) from error
    return parsed


def describe_errors(error: ValidationError) -> str:
    """Return the messages of a pydantic error on one line, each with the name of its field."""
    messages = []
    for each in error.errors(include_url=False):
        name = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        messages.append(f"{name}: {message}, got {each['input']!r}" if name else message)
    return "; ".join(messages)


@cache
def _make_model(target: Any) -> Any:
    """Return a model whose field `value` is the dataclass: its settings apply to all dataclasses inside."""
    return create_model(target.__name__, __config__=ConfigDict(extra="forbid", strict=True), value=(target, ...))


def _describe_first(error: ValidationError, target: Any) -> str:
    problems = error.errors(include_url=False)
    problem = next((each for each in problems if each["type"] == "unexpected_keyword_argument"), problems[0])
    path = [str(step) for step in problem["loc"][1:]]
    if problem["type"] == "unexpected_keyword_argument":
        schemas = _make_model(target).model_json_schema()["$defs"].values()
        known = [name for schema in schemas for name in schema.get("properties", ())]
        return f"unknown key {'.'.join(path)!r} in {target.__name__}{did_you_mean(path[-1], known, '')}"
    if problem["type"] == "missing":
        return f"missing key {'.'.join(path)!r} in {target.__name__}"
    message = problem["msg"]
    return f"{'.'.join(path) or target.__name__}: {message[:1].lower()}{message[1:]}, got {problem['input']!r}"
