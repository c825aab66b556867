"""detectron2's `.pkl` checkpoints: an unpickler that allows only NumPy arrays and plain containers."""

import mmap
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.errors import CheckpointError

_NUMBER = re.compile(r"b1|[iu][1248]|f[248]")


class _DType:
    """Stands in for `numpy.dtype`: only numbers of a fixed size."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, expected numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *_ = state
        self.value = self.value.newbyteorder(order)


class _Array:
    """Stands in for `numpy.ndarray`, which would allocate what the file claims."""

    values: np.ndarray | None = None

    def __init__(self, *_: object) -> None:
        """Ignore type and shape: the state has them."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        self.values = _make_array(content, dtype, shape, "F" if is_fortran else "C")


def _make_array(content: bytes | str, dtype: _DType, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """Return a writable array; NumPy refuses a shape that does not fit the bytes."""
    if isinstance(content, str):
        content = content.encode("latin-1")  # Python 2 wrote bytes as text
    return np.frombuffer(content, dtype.value).reshape(shape, order=order).astype(dtype.value.newbyteorder("="))


_ALLOWED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "_codecs.encode": lambda text, _: text.encode("latin-1"),  # of bytes, in protocols before 3
    "__builtin__.bytes": lambda: b"",
    "builtins.bytes": lambda: b"",
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    **{
        f"numpy.{core}.{name}": replacement
        for core in ("core", "_core")  # before and since NumPy 2
        for name, replacement in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", lambda dtype, content: _make_array(content, dtype, (), "C").item()),
            ("numeric._frombuffer", _make_array),  # of protocol 5
        )
    },
}
"""What a pickle of arrays may refer to, each replaced by one of ours that checks its arguments."""


class _ArrayUnpickler(pickle._Unpickler):  # the Python one: the C one allocates the memo index that a file claims
    def find_class(self, module: str, name: str) -> Any:
        if replacement := _ALLOWED.get(f"{module}.{name}"):
            return replacement
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no array needs; nothing of it was run")


def read_pickle(path: Path) -> object:
    """Unpickle numbers, text, arrays and containers of them, in any protocol.

    Nothing that the file names is imported or called. Raises CheckpointError, naming what was refused, if the file
    needs anything else, is truncated or not a pickle.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,  # reads no more than the file has
            warnings.catch_warnings(action="error"),  # an invalid escape sequence is only a warning
        ):
            return _resolve(_ArrayUnpickler(mapped, encoding="latin1").load())
    except Exception as error:  # a broken pickle can raise anything
        reason = " ".join(f"{str(error) or type(error).__name__}".split())[:300]
        raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error


def _resolve(content: object, depth: int = 3) -> object:
    """Replace `_Array` by its values in nested dicts; None for an array without content."""
    if isinstance(content, _Array):
        return content.values
    if isinstance(content, dict) and depth:
        return {key: _resolve(value, depth - 1) for key, value in content.items()}
    return content
