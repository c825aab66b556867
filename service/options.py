"""What a caller may choose in the query string."""

import re
from dataclasses import dataclass, fields
from difflib import get_close_matches

from starlette.datastructures import QueryParams

from model.contract import TASKS, Task
from model.errors import OptionInvalid

_DECIMAL = re.compile(r"\d{1,3}(\.\d{1,20})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Options:
    """One request's choices; a field's name is its query parameter."""

    task: Task = "panoptic"
    threshold: float | None = None
    """Least score of a detection, 0..1, in place of the contract's."""


def read_options(parameters: QueryParams) -> Options:
    """The options of a query string.

    Raises OptionInvalid for a parameter that is unknown, given twice or out of its range, with what would be taken.
    """
    known = [entry.name for entry in fields(Options)]
    for name in parameters:
        if name not in known:
            raise OptionInvalid(f"unknown query parameter {name!r}{suggest(name, known)}")
        if len(values := parameters.getlist(name)) > 1:
            raise OptionInvalid(f"query parameter {name!r} is given {len(values)} times: give it once")
    return Options(task=_read_task(parameters.get("task", "panoptic")), threshold=_read_threshold(parameters))


def suggest(given: str, known: list[str]) -> str:
    """The end of a message about `given`: what was probably meant, and all that is known."""
    near = get_close_matches(given, known, n=1)
    return (f", did you mean {near[0]!r}?" if near else ":") + f" known are {', '.join(known)}"


def _read_task(given: str) -> Task:
    for task in TASKS:
        if task == given:
            return task
    raise OptionInvalid(f"unknown task {given!r}{suggest(given, list(TASKS))}")


def _read_threshold(parameters: QueryParams) -> float | None:
    given = parameters.get("threshold")
    if given is None:
        return None
    if not _DECIMAL.fullmatch(given) or float(given) > 1.0:
        raise OptionInvalid(f"threshold must be a decimal number in 0..1, got {given!r}")
    return float(given)
