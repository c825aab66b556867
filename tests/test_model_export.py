import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny

from model.contract import Thresholds, read_contract
from model.errors import ArtifactError, CheckpointError, ConfigError, ContractMismatch, ParityError
from model.export import check_batches, check_parity, draw_scene, export_run
from model.raw import Raw
from model.run import load_run
from model.runtime import OnnxSession, open_session

PICTURE = draw_scene(7, tiny.SIDE_PX)


class MoodySession:
    """Answers like another session, but for the last picture of a batch."""

    backend = "moody"

    def __init__(self, session: OnnxSession, drift: float) -> None:
        self._session = session
        self._drift = drift

    def run(self, pixels: np.ndarray) -> list[Raw]:
        answers = self._session.run(pixels)
        if len(pixels) > 1:
            answers[-1].scores[0] += self._drift
        return answers


def copy(artifact: Path, folder: Path) -> Path:
    return Path(shutil.copytree(artifact, folder / "artifact"))


def test_an_artifact_opens_and_says_what_it_is(tiny_artifact: Path) -> None:
    contract, session = open_session(tiny_artifact)
    assert (contract.name, contract.version, contract.thing_clusters, contract.stuff_clusters) == ("tiny", "3", 3, 4)
    assert session.backend == "cpu"
    assert contract.provenance["steps"] == 4
    assert contract.provenance["parity"]["score_difference"] < 1e-3


def test_large_weights_are_stored_in_half_the_bytes(tiny_artifact: Path) -> None:
    graph = onnx.load(tiny_artifact / "network.onnx").graph
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) >= 4096]
    assert large
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.FLOAT16}


def test_a_network_that_answers_otherwise_is_found_out(tiny_artifact: Path, tiny_run: Path) -> None:
    _, network = load_run(tiny_run)
    session = OnnxSession(tiny_artifact / "network.onnx", threads=1)
    for parameter in network.decoder.quality_head.parameters():
        parameter.data += 1.0
    with pytest.raises(ParityError, match="torch and cpu on 1 pictures"):
        check_parity(network, session, PICTURE[None])


def test_an_answer_that_depends_on_its_batch_is_found_out(tiny_artifact: Path) -> None:
    session = OnnxSession(tiny_artifact / "network.onnx", threads=1)
    pictures = [draw_scene(seed, tiny.SIDE_PX) for seed in range(3)]
    check_batches(session, pictures)
    with pytest.raises(ParityError, match="alone and in a batch of 2"):
        check_batches(MoodySession(session, drift=0.01), pictures)


def test_no_picture_falls_off_the_end_of_a_batch(tiny_artifact: Path) -> None:
    session = OnnxSession(tiny_artifact / "network.onnx", threads=1)
    assert len(session.run(np.stack([PICTURE] * 7))) == 7


@pytest.mark.parametrize("name", ["network.onnx", "golden.npz"])
def test_a_flipped_byte_or_a_missing_file_is_refused_by_name(tmp_path: Path, tiny_artifact: Path, name: str) -> None:
    artifact = copy(tiny_artifact, tmp_path)
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} was changed"):
        open_session(artifact)
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        open_session(artifact)


def test_a_newer_format_is_refused(tmp_path: Path, tiny_artifact: Path) -> None:
    artifact = copy(tiny_artifact, tmp_path)
    content = json.loads((artifact / "contract.json").read_text())
    (artifact / "contract.json").write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(ContractMismatch, match="format version 2"):
        open_session(artifact)


def test_a_contract_that_its_network_does_not_keep_is_refused(tmp_path: Path, tiny_artifact: Path) -> None:
    artifact = copy(tiny_artifact, tmp_path)
    content = json.loads((artifact / "contract.json").read_text())
    (artifact / "contract.json").write_text(json.dumps({**content, "detections": 9}))
    with pytest.raises(ContractMismatch, match="its contract says"):
        open_session(artifact)


def test_an_export_onto_a_folder_of_other_things_leaves_it_alone(tmp_path: Path, tiny_run: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="is no artifact"):
        export_run(tiny_run, tmp_path, name="other", version="9", thresholds=Thresholds(), pictures=[])
    assert (tmp_path / "thesis.txt").is_file()


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, tiny_artifact: Path, tiny_run: Path) -> None:
    artifact = copy(tiny_artifact, tmp_path)
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "decoder.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors"):
        export_run(run, artifact, name="other", version="9", thresholds=Thresholds(), pictures=[])
    assert read_contract(artifact).name == "tiny"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
