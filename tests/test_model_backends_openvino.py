"""What is specific to OpenVINO; test_model_backends_loader compares its outputs."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.backends.loader import load_session
from model.backends.openvino import OpenvinoSession
from model.contract import InputSize
from model.export.export import draw_scene
from model.export.parity_checks import stack_images
from model.files import hash_file

LIMIT_S = 120
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


@needs_openvino
@pytest.mark.parametrize("streams", [1, 2])
def test_concurrent_runs_return_their_own_outputs(tiny_artifact: Path, streams: int) -> None:
    session = OpenvinoSession(tiny_artifact / "network.onnx", threads=1, streams=streams)
    scenes = [stack_images([draw_scene(seed, InputSize.square(tiny.SIDE_PX))]) for seed in range(4)]
    alone = [session.run(*scene)[0].semantic for scene in scenes]
    assert not np.array_equal(alone[0], alone[1])
    with ThreadPoolExecutor(4) as pool:
        for index, outputs in enumerate(pool.map(lambda turn: session.run(*scenes[turn % 4]), range(40))):
            np.testing.assert_array_equal(outputs[0].semantic, alone[index % 4])


def test_without_openvino_the_error_says_what_to_install(tiny_artifact: Path) -> None:
    code = "import sys; sys.modules['openvino'] = None; from model.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check", str(tiny_artifact), "--backend", "openvino"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "useg: openvino is not installed: install useg[service]\n"


WATCH = """
import sys
sys.addaudithook(lambda event, _: event in ("socket.connect", "socket.getaddrinfo") and print("network:", event))
from model.backends.openvino import import_without_telemetry
for name in ("openvino", "nncf"):
    print(import_without_telemetry(name, "").__name__, "openvino_telemetry" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nncf") is None, reason="useg[quantize] is not installed")
def test_imports_send_no_telemetry_and_store_no_id(tmp_path: Path) -> None:
    # In a process of its own: NNCF is silent wherever pytest runs.
    ended = subprocess.run(
        [sys.executable, "-c", WATCH],
        capture_output=True, text=True, timeout=LIMIT_S, check=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert ended.stdout == "openvino False\nnncf False\n"
    assert list(tmp_path.iterdir()) == []


def load_cached(artifact: Path, cache: Path) -> np.ndarray:
    """Load with a compile cache and run a scene; returns the semantic logits."""
    _, session = load_session(artifact, backend="openvino", threads=1, compile_cache=cache)
    return session.run(*stack_images([draw_scene(7, InputSize.square(tiny.SIDE_PX))]))[0].semantic


@needs_openvino
@pytest.mark.parametrize("damage", ["none", "truncated", "changed", "not finished", "of another network"])
def test_a_damaged_compiled_network_is_made_again(
    tmp_path: Path, tiny_artifact: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = load_cached(tiny_artifact, tmp_path)
    (blob,) = tmp_path.glob("*/*.blob")
    hashes, content = blob.with_name("sha256.json"), blob.read_bytes()
    match damage:
        case "truncated":
            blob.write_bytes(content[: len(content) // 2])
        case "changed":
            blob.write_bytes(content[:1000] + bytes(1000) + content[2000:])
        case "not finished":
            hashes.unlink()
        case "of another network":  # as if its outputs were wrong: with valid hashes
            blob.write_bytes(b"not compiled by OpenVINO")
            hashes.write_text(json.dumps({blob.name: hash_file(blob)}))
    np.testing.assert_array_equal(load_cached(tiny_artifact, tmp_path), expected)
    assert ("again" in caplog.text) == (damage not in ("none", "of another network"))
    assert json.loads(hashes.read_text()) == {blob.name: hash_file(blob)}
    assert blob.read_bytes().startswith(b"<?xml")


@needs_openvino
def test_a_cache_that_cannot_be_written_is_not_used(tmp_path: Path, tiny_artifact: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    load_cached(tiny_artifact, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"
