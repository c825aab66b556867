"""Strict reading of JSON into dataclasses, with errors on one line."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import product
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

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


def parse_versioned_json(
    target: type[T], content: bytes | str, version: int, hint: str = "", removed: Mapping[str, Any] | None = None
) -> T:
    """Parse what `to_versioned_json` wrote. `hint` ends the error message for another format version.

    Keys in `removed` are ignored if they have the value there. Raises ConfigError.
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
    old = removed or {}
    return parse(target, {key: value for key, value in decoded.items() if key not in old or old[key] != value})


def parse(target: type[T], content: Any) -> T:
    """Return the dataclass that decoded JSON describes, nested dataclasses included.

    Types are strict: a list is a tuple and an integer a float, but nothing else is converted. Raises ConfigError for an
    unknown key (with the nearest known one), a missing key or a value of another type, and what `__post_init__` raises.
    """
    reject_unknown_keys(target, content)
    key: Any = target  # mypy does not take type[T] for hashable
    try:
        parsed: T = _make_adapter(key).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(_describe_first(error, target)) from error
    return parsed


def reject_unknown_keys(target: Any, content: Any) -> None:
    """Raise ConfigError, with a near match, for a key that is not a field of the dataclass, at any depth."""
    if is_dataclass(target) and isinstance(content, dict):
        known = get_type_hints(target)
        for key, value in content.items():
            if key not in known:
                hint = did_you_mean(key, known, f"; known are {', '.join(known)}")
                raise ConfigError(f"unknown key {key!r} in {getattr(target, '__name__', target)}{hint}")
            reject_unknown_keys(known[key], value)
        return
    nested = [argument for argument in get_args(target) if argument is not NoneType]
    if get_origin(target) is dict and isinstance(content, dict):
        items = list(content.values())
    elif get_origin(target) in (Union, UnionType):
        items = [content] if len(nested) == 1 else []
    else:
        items = content if isinstance(content, list) else []
    for argument, item in product(nested, items):
        reject_unknown_keys(argument, item)


def describe_errors(error: ValidationError) -> str:
    """Return the messages of a pydantic error on one line, each with the name of its field."""
    messages = []
    for each in error.errors(include_url=False):
        name = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        messages.append(f"{name}: {message}, got {each['input']!r}" if name else message)
    return "; ".join(messages)


@cache
def _make_adapter(target: Any) -> TypeAdapter[Any]:
    return TypeAdapter(target)


def _describe_first(error: ValidationError, target: type[Any]) -> str:
    problem = error.errors(include_url=False)[0]
    path = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "missing":
        return f"missing key {path!r} in {target.__name__}"
    message = problem["msg"]
    return f"{path or target.__name__}: {message[:1].lower()}{message[1:]}, got {problem['input']!r}"
