"""Pickled arrays of any protocol are read; anything else in a pickle is refused and never run."""

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoints.safe_pickle import read_pickle
from model.errors import CheckpointError

PROTOCOLS = pytest.mark.parametrize("protocol", range(6))

WEIGHTS = OrderedDict(
    single=np.arange(6, dtype=np.float32).reshape(2, 3),
    columns_first=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    half=np.array([0.5, -2.0], np.float16),
    big_endian=np.array([1, 256], ">i4"),
    flags=np.array([True, False]),
    counter=np.array(7),
    nothing=np.zeros((0, 4)),
)


def save(content: object, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@PROTOCOLS
def test_arrays_and_plain_values_are_read(tmp_path: Path, protocol: int) -> None:
    plain = {"__author__": "somebody", "matching_heuristics": True, "none": None, "sizes": [1, (2, 3.5)], "ids": {1: 2}}
    scalars = {"rate": np.float64(0.25), "step": np.int32(-3)}
    found: Any = read_pickle(save({"model": WEIGHTS, **plain, **scalars}, tmp_path / "weights.pkl", protocol))
    assert {key: found[key] for key in plain} == plain
    assert (found["rate"], found["step"]) == (0.25, -3)
    assert list(found["model"]) == list(WEIGHTS)
    for name, expected in WEIGHTS.items():
        array = found["model"][name]
        assert array.dtype == expected.dtype.newbyteorder("=")
        assert array.shape == expected.shape
        assert array.tolist() == expected.tolist()
        assert array.flags.writeable


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_numpy_1_are_read(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(WEIGHTS, protocol)
    # Protocol 4 writes the length before the name.
    old = content.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray").replace(b"._core.", b".core.")
    assert b"_core" not in old
    (tmp_path / "old.pkl").write_bytes(old)
    found: Any = read_pickle(tmp_path / "old.pkl")
    assert found["single"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    # As Python 2 wrote np.array([1.0, -2.0], np.float32): opcodes U are byte strings.
    (tmp_path / "two.pkl").write_bytes(
        b"\x80\x02}U\x01w"
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
    )
    found: Any = read_pickle(tmp_path / "two.pkl")
    assert found["w"].tolist() == [1.0, -2.0]


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


HOSTILE = {
    "os.system": ("system", os.system, "echo > {trace}"),
    "builtins.eval": ("eval", eval, "open({trace!r}, 'w')"),
    "getattr chain": ("getattr", getattr, Call(getattr, Call(__import__, "os"), "system"), "system"),
    "a file": ("open", open, "{trace}", "w"),
    "numpy.load": ("numpy.load", np.load, "{trace}", None, True),
}


@PROTOCOLS
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_pickle_that_calls_something_is_refused_by_name_and_not_run(
    tmp_path: Path, attack: str, protocol: int
) -> None:
    name, function, *arguments = HOSTILE[attack]
    trace = tmp_path / "trace"
    filled = [each.format(trace=str(trace)) if isinstance(each, str) else each for each in arguments]
    path = save({"model": WEIGHTS, "x": Call(function, *filled)}, tmp_path / "evil.pkl", protocol)
    with pytest.raises(CheckpointError, match=rf"evil\.pkl is not a readable checkpoint: it refers to \S*{name},"):
        read_pickle(path)
    assert not trace.exists()


@PROTOCOLS
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CheckpointError("no"), "it refers to (copy_?reg._reconstructor|model.errors.CheckpointError)"),
        (np.array([{}, None]), "it has an array of 'O8', expected numbers"),
        (np.array(["text"]), "it has an array of 'U4'"),
        (np.zeros(2, [("a", "f4")]), "it has an array of 'V4'"),
        ({"a": 1j}, "it refers to .*complex"),
    ],
    ids=["our own class", "objects", "texts", "records", "another type"],
)
def test_other_types_are_refused(tmp_path: Path, content: object, message: str, protocol: int) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pickle(save(content, tmp_path / "odd.pkl", protocol))


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"", "empty"),
        (b"\x80\x04.", "pop from empty list"),
        (b"\x80\x02\x8e" + (2**62).to_bytes(8, "little") + b"abc.", "EOFError"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x02tR.", "not a readable checkpoint"),
        (b"\x80\x02ccollections\nOrderedDict\nX\x01\x00\x00\x00aNs.", "not a readable checkpoint"),
        (b"\x80\x02P1\n.", "persistent"),
        (b"\x80\x02(ios\nsystem\n.", "it refers to os.system"),
        (b"\x80\x02h\x07.", "not a readable checkpoint"),
        (b"\x80\x02S'\\q'\n.", "escape"),
    ],
)
def test_broken_and_crafted_opcodes_are_refused_on_one_line(tmp_path: Path, opcodes: bytes, message: str) -> None:
    (tmp_path / "broken.pkl").write_bytes(opcodes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickle(tmp_path / "broken.pkl")
    assert "\n" not in str(caught.value)


def test_a_huge_memo_index_allocates_nothing(tmp_path: Path) -> None:
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x02K\x05r\xff\xff\xff\xff.")
    assert read_pickle(tmp_path / "memo.pkl") == 5


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_truncated_file_is_refused(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps({"w": WEIGHTS["single"]}, protocol)
    for length in range(len(whole)):
        (tmp_path / "cut.pkl").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_pickle(tmp_path / "cut.pkl")


@pytest.mark.parametrize(
    "shape",
    [
        b"K\x01\x85",
        b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86",
        b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86",
        b"X\x01\x00\x00\x002\x85",
        b"(" + b"K\x01" * 70 + b"t",
    ],
)
def test_an_array_whose_shape_does_not_fit_its_bytes_is_refused(tmp_path: Path, shape: bytes) -> None:
    content = pickle.dumps(np.array([1.0, -2.0], np.float32), 2)
    assert content.count(b"K\x02\x85") == 1
    (tmp_path / "lie.pkl").write_bytes(content.replace(b"K\x02\x85", shape))
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        read_pickle(tmp_path / "lie.pkl")
