"""What a caller may choose: in the query string, in the parameters of a JSON body, or both."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from starlette.datastructures import QueryParams

from model.contract import TASKS, Contract, Task, Thresholds
from model.errors import InvalidParameter
from model.validation import did_you_mean

FormatName = Literal["json", "polygons", "png", "clusters", "overlay", "npz", "huggingface"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
"""What an archive may hold."""

MIN_EDGE_PX, MAX_EDGE_PX = 32, 65_500
MAX_CLASSES = 1000
_MAX_NAME_LENGTH = 64
CLASS_AGNOSTIC_NMS_IOU = 0.5
_DECIMAL = re.compile(r"\d{1,3}(\.\d{1,20})?", re.ASCII)
_WHOLE = re.compile(r"\d{1,6}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SegmentParameters:
    """One request's choices; None leaves a choice to the artifact's contract."""

    model: str | None = None
    """The model by its name; None is the service's only or default one."""
    tasks: tuple[Task, ...] = ("panoptic",)
    threshold: float | None = None
    """Least score of a detection, 0..1."""
    mask_threshold: float | None = None
    """A pixel belongs to a detection above this probability, 0..1."""
    overlap_mask_area_threshold: float | None = None
    """Least share of a detection's mask that must show in the panoptic map, 0..1."""
    min_stuff_area: float | None = None
    """Least share of the picture that stuff must cover in the panoptic map, 0..1."""
    classes: tuple[str, ...] = ()
    """Categories by name or clusters by number; nothing else is answered. Empty: everything."""
    max_side: int | None = None
    """Longest side of the answer in pixels, for pictures that are larger."""
    agnostic_nms: bool = False
    """Whether a detection over a better one, of whatever class, is dropped."""
    parts: tuple[FormatName, ...] = ("json", "png")
    """What an archive holds for each picture and task."""

    def adjust(self, thresholds: Thresholds) -> Thresholds:
        """The contract's thresholds, those chosen here in their places."""
        shown = self.overlap_mask_area_threshold
        chosen = {
            "score_threshold": self.threshold,
            "mask_threshold": self.mask_threshold,
            "overlap_threshold": None if shown is None else 1.0 - shown,
            "min_stuff_area_fraction": self.min_stuff_area,
            "duplicate_iou_threshold": CLASS_AGNOSTIC_NMS_IOU if self.agnostic_nms else None,
        }
        return replace(thresholds, **{name: value for name, value in chosen.items() if value is not None})

    def find_clusters(self, contract: Contract) -> frozenset[int] | None:
        """The clusters asked for; None for all. Raises InvalidParameter for one that the contract does not have."""
        if not self.classes:
            return None
        count = contract.thing_clusters + contract.stuff_clusters
        names: dict[str, set[int]] = {str(cluster): {cluster} for cluster in range(1, count + 1)}
        for cluster, category in contract.categories.items():
            names.setdefault(category.name, set()).add(cluster)
        for given in self.classes:
            if given not in names:
                hint = did_you_mean(given, names, ":")
                raise InvalidParameter(f"unknown class {given!r}{hint} clusters are 1..{count}, categories go by name")
        return frozenset().union(*(names[given] for given in self.classes))


def parse_parameters(parameters: QueryParams, body: Mapping[str, Any] | None = None) -> SegmentParameters:
    """The options of a query string and of the parameters in a JSON body.

    Raises InvalidParameter for a parameter that is unknown, given twice or out of its range, with what would be taken.
    """
    given: dict[str, list[Any]] = {}
    for name, value in parameters.multi_items():
        given.setdefault(name, []).append(value)
    if "model" in (body or {}):
        raise InvalidParameter("the model is chosen before a body is read: say model=NAME in the query")
    for name, value in (body or {}).items():
        given.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    chosen: dict[str, Any] = {}
    for name, values in given.items():
        if name not in _READERS:
            raise InvalidParameter(f"unknown query parameter {name!r}{_list_known(name, _READERS)}")
        field_name, read = _READERS[name]
        if field_name in chosen:
            raise InvalidParameter(f"{name!r} is given twice, once under its other name: give it once")
        chosen[field_name] = read(name, values)
    return SegmentParameters(**chosen)


def _list_known(given: str, known: Iterable[str]) -> str:
    """The end of a message about `given`: what was probably meant, and all that is known."""
    return f"{did_you_mean(given, known, ':')} known are {', '.join(known)}"


def _require_one(name: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise InvalidParameter(f"query parameter {name!r} is given {len(values)} times: give it once")
    return values[0]


def _read_fraction(name: str, values: Sequence[Any]) -> float:
    value = _require_one(name, values)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number or (isinstance(value, str) and _DECIMAL.fullmatch(value))) or not 0.0 <= float(value) <= 1.0:
        raise InvalidParameter(f"{name} must be a decimal number in 0..1, got {value!r}")
    return float(value)


def _read_side(name: str, values: Sequence[Any]) -> int:
    value = _require_one(name, values)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    is_whole = is_number or (isinstance(value, str) and _WHOLE.fullmatch(value) is not None)
    if not is_whole or not MIN_EDGE_PX <= int(value) <= MAX_EDGE_PX:
        raise InvalidParameter(f"{name} must be a whole number in {MIN_EDGE_PX}..{MAX_EDGE_PX}, got {value!r}")
    return int(value)


def _read_bool(name: str, values: Sequence[Any]) -> bool:
    value = _require_one(name, values)
    truths: dict[Any, bool] = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in truths:
        raise InvalidParameter(f"{name} must be true or false, got {value!r}")
    return truths[value.lower()]


def _read_name(name: str, values: Sequence[Any]) -> str:
    value = _require_one(name, values)
    if not 1 <= len(value) <= _MAX_NAME_LENGTH:
        raise InvalidParameter(f"{name} takes a name of 1 to {_MAX_NAME_LENGTH} characters, got {len(value)}")
    return str(value)


def _list_words(name: str, values: Sequence[Any]) -> list[str]:
    """The words of a list, which commas or repeating the parameter separate; each once."""
    words = [word.strip() for value in values for word in str(value).split(",")]
    if not all(words):
        raise InvalidParameter(f"{name} has an empty entry: separate its entries by single commas")
    return list(dict.fromkeys(words))


def _read_tasks(name: str, values: Sequence[Any]) -> tuple[Task, ...]:
    return _choose(name, _list_words(name, values) if any(values) else list(values), TASKS)


def _read_parts(name: str, values: Sequence[Any]) -> tuple[FormatName, ...]:
    return _choose(name, _list_words(name, values), FORMAT_NAMES)


def _read_classes(name: str, values: Sequence[Any]) -> tuple[str, ...]:
    words = tuple(_list_words(name, values))
    if not 1 <= len(words) <= MAX_CLASSES:
        raise InvalidParameter(f"{name} takes 1 to {MAX_CLASSES} entries, got {len(words)}")
    return words


def _choose(name: str, words: Sequence[Any], known: tuple[Any, ...]) -> tuple[Any, ...]:
    for word in words:
        if word not in known:
            raise InvalidParameter(f"unknown {name.removesuffix('s')} {word!r}{_list_known(str(word), known)}")
    if not words:
        raise InvalidParameter(f"{name} is empty{_list_known('', known)}")
    return tuple(words)


_READERS: dict[str, tuple[str, Callable[[str, Sequence[Any]], Any]]] = {
    "task": ("tasks", _read_tasks),
    "threshold": ("threshold", _read_fraction),
    "mask_threshold": ("mask_threshold", _read_fraction),
    "overlap_mask_area_threshold": ("overlap_mask_area_threshold", _read_fraction),
    "min_stuff_area": ("min_stuff_area", _read_fraction),
    "classes": ("classes", _read_classes),
    "max_side": ("max_side", _read_side),
    "agnostic_nms": ("agnostic_nms", _read_bool),
    "parts": ("parts", _read_parts),
    "subtask": ("tasks", _read_tasks),
    "model": ("model", _read_name),
}
"""Parameter to field and reader; `subtask` is what Hugging Face calls the task."""
