"""OpenVINO answers as every backend does (test_model_backends); here, what is its own."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.backends.openvino_session import OpenvinoSession
from model.backends.runtime import open_session
from model.contract import Canvas
from model.errors import ArtifactError, ContractMismatch
from model.release.export import draw_scene
from model.release.gate import stack

LIMIT_S = 120
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="useg[openvino] is not installed")


@needs_openvino
@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x07\x12\x04cut"])
def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "network.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"network\.onnx was refused by OpenVINO: .+") as caught:
        OpenvinoSession(path, threads=1)
    assert "\n" not in str(caught.value)


@needs_openvino
def test_a_contract_that_its_network_does_not_keep_is_refused(tmp_path: Path, tiny_artifact: Path) -> None:
    artifact = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    content = json.loads((artifact / "contract.json").read_text())
    (artifact / "contract.json").write_text(json.dumps({**content, "detections": 9}))
    with pytest.raises(ContractMismatch, match="its contract says"):
        open_session(artifact, backend="openvino")


@needs_openvino
def test_threads_that_ask_at_once_get_their_own_answers(tiny_artifact: Path) -> None:
    session = OpenvinoSession(tiny_artifact / "network.onnx", threads=1)
    scenes = [stack([draw_scene(seed, Canvas.square(tiny.SIDE_PX))]) for seed in range(4)]
    alone = [session.run(*scene)[0].semantic for scene in scenes]
    assert not np.array_equal(alone[0], alone[1])
    with ThreadPoolExecutor(4) as pool:
        for index, answers in enumerate(pool.map(lambda turn: session.run(*scenes[turn % 4]), range(40))):
            np.testing.assert_array_equal(answers[0].semantic, alone[index % 4])


def test_where_openvino_is_missing_one_line_says_what_to_install(tiny_artifact: Path) -> None:
    code = "import sys; sys.modules['openvino'] = None; from model.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check", str(tiny_artifact), "--backend", "openvino"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "useg-model: backend openvino: openvino is not installed: install useg[openvino]\n"
