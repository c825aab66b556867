"""Pickled arrays, read without running the pickle.

detectron2 publishes weights as pickles of NumPy arrays. A pickle is a program: its opcodes are followed here on a stack
of our own, and the few names that arrays need are symbols. Nothing that a file names is imported, called or changed.
"""

import math
import mmap
import pickletools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np

from model.errors import CheckpointError


class _Symbol(Enum):
    """What a pickle of arrays may name."""

    RECONSTRUCT = auto()
    """An array whose contents come later, as its state."""
    FROM_BUFFER = auto()
    """An array at once (protocol 5)."""
    SCALAR = auto()
    ARRAY = auto()
    TYPE = auto()
    ENCODE = auto()
    """Bytes written as text (before protocol 3)."""
    BYTES = auto()
    MAPPING = auto()


_GLOBALS = {
    "collections.OrderedDict": _Symbol.MAPPING,
    "_codecs.encode": _Symbol.ENCODE,
    "__builtin__.bytes": _Symbol.BYTES,
    "builtins.bytes": _Symbol.BYTES,
    "numpy.ndarray": _Symbol.ARRAY,
    "numpy.dtype": _Symbol.TYPE,
    **{
        f"numpy.{core}.{name}": symbol
        for core in ("core", "_core")  # before and since NumPy 2
        for name, symbol in (
            ("multiarray._reconstruct", _Symbol.RECONSTRUCT),
            ("multiarray.scalar", _Symbol.SCALAR),
            ("numeric._frombuffer", _Symbol.FROM_BUFFER),
        )
    },
}

_NUMBER = re.compile(r"b1|[iu][1248]|f[248]")
_MOST_AXES = 8


@dataclass(eq=False)
class _Type:
    """A dtype of plain numbers."""

    code: str
    order: str = "="


@dataclass(eq=False)
class _Array:
    """An array whose contents may not have come yet."""

    values: np.ndarray | None = None


def read_pickle(path: Path) -> object:
    """What a pickle of plain values, arrays and dicts of them holds, in any protocol.

    Raises CheckpointError, naming what was refused, if the file needs anything else, is cut short or is no pickle.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,  # allocates nothing that is only claimed
            warnings.catch_warnings(action="error"),  # pickletools only warns of a broken escape
        ):
            return _settle(_Machine().run(cast("IO[bytes]", mapped)))
    except (ValueError, TypeError, LookupError, OverflowError, Warning) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} holds no readable weights: {reason}") from error


class _Machine:
    """The stack, its marks and the memo of a pickle, as CPython's pickle.py keeps them."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> object:
        """What the pickle leaves on its stack."""
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif not self._move(opcode.name, argument) and not self._collect(opcode.name):
                self._make(opcode.name, argument)
        return self._stack.pop()

    def _move(self, opcode: str, argument: Any) -> bool:
        """Marks and memo; False if the opcode is about something else."""
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._marked.append(self._stack)
                self._stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case _:
                return False
        return True

    def _collect(self, opcode: str) -> bool:
        """Containers; False if the opcode is about something else."""
        match opcode:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = self._take(int(opcode[-1]))
                self._stack.append(tuple(items))
            case "TUPLE":
                items = self._take_marked()
                self._stack.append(tuple(items))
            case "LIST":
                items = self._take_marked()
                self._stack.append(items)
            case "DICT":
                items = self._take_marked()
                self._stack.append(_pair(items))
            case "APPEND" | "APPENDS":
                items = self._take_marked() if opcode == "APPENDS" else self._take(1)
                _require_kind(self._stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._take_marked() if opcode == "SETITEMS" else self._take(2)
                _require_kind(self._stack[-1], dict).update(_pair(items))
            case _:
                return False
        return True

    def _make(self, opcode: str, argument: Any) -> None:
        """Arrays and what they are made of."""
        match opcode:
            case "GLOBAL":
                self._stack.append(_find_symbol(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                self._stack.append(_find_symbol(".".join(map(str, self._take(2)))))
            case "REDUCE":
                self._stack.append(_call(*self._take(2)))
            case "BUILD":
                (state,) = self._take(1)
                _set_state(self._stack[-1], state)
            case _:
                raise ValueError(f"its opcode {opcode} is none that arrays need")

    def _take(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("its stack runs empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _take_marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}


def _find_symbol(name: str) -> _Symbol:
    if name not in _GLOBALS:
        raise ValueError(f"it names {name}, which no array needs; nothing of it was run")
    return _GLOBALS[name]


def _call(symbol: object, arguments: object) -> object:
    """What a symbol makes of its arguments."""
    match symbol, arguments:
        case _Symbol.RECONSTRUCT, (_Symbol.ARRAY, _, _):
            return _Array()
        case _Symbol.FROM_BUFFER, (raw, _Type() as number, shape, ("C" | "F") as order):
            return _Array(_fill(raw, number, shape, order))
        case _Symbol.SCALAR, (_Type() as number, raw):
            return _fill(raw, number, (), "C").item()
        case _Symbol.TYPE, (str(code), *_):
            if not _NUMBER.fullmatch(code):
                raise ValueError(f"its arrays hold {code!r}: expected plain numbers")
            return _Type(code)
        case _Symbol.ENCODE, (str(text), "latin1" | "latin-1"):
            return text.encode("latin-1")
        case _Symbol.BYTES, ():
            return b""
        case _Symbol.MAPPING, ():
            return {}
    raise ValueError(f"it calls {_describe(symbol)} as no array needs it")


def _set_state(target: object, state: object) -> None:
    match target, state:
        case _Array(), (_, shape, _Type() as number, int(is_fortran), raw):
            target.values = _fill(raw, number, shape, "F" if is_fortran else "C")
        case _Type(), (_, "<" | ">" | "=" | "|" as order, None, None, None, *_):
            target.order = order
        case _:
            raise ValueError(f"it gives {_describe(target)} a state that no array has")


def _fill(raw: object, number: _Type, shape: object, order: Literal["C", "F"]) -> np.ndarray:
    """A native array of its own; the sizes must agree before anything is allocated."""
    if isinstance(raw, str):
        raw = raw.encode("latin-1")  # Python 2 wrote bytes as text
    if not isinstance(raw, bytes | bytearray) or not isinstance(shape, tuple):
        raise ValueError("an array of it has no bytes or no shape")
    if not all(type(side) is int and side >= 0 for side in shape) or len(shape) > _MOST_AXES:
        raise ValueError("an array of it has an impossible shape")
    stored = np.dtype(number.order + number.code)
    if math.prod(shape) * stored.itemsize != len(raw):
        raise ValueError(f"an array claims the shape {shape} and has {len(raw)} bytes")
    return np.frombuffer(raw, stored).reshape(shape, order=order).astype(stored.newbyteorder("="))


def _pair(items: list[Any]) -> dict[str, Any]:
    if len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise ValueError("a dict of it has a key that is no text")
    return dict(zip(items[::2], items[1::2], strict=True))


def _require_kind(target: Any, kind: type) -> Any:
    if type(target) is not kind:
        raise ValueError(f"it puts items into {_describe(target)}")
    return target


def _describe(thing: object) -> str:
    return thing.name.lower() if isinstance(thing, _Symbol) else f"a {type(thing).__name__.strip('_').lower()}"


def _settle(found: object, depth: int = 3) -> object:
    """Arrays in place of what stood for them, in dicts of dicts as weights come; None for one without contents."""
    if isinstance(found, _Array):
        return found.values
    if isinstance(found, dict) and depth:
        return {key: _settle(value, depth - 1) for key, value in found.items()}
    return found
