"""What ONNX Runtime is asked for, and that nothing else is taken for it."""

import dataclasses
from pathlib import Path

import pytest

from model.backends.providers import (
    list_cuda_providers,
    list_tensorrt_providers,
    make_profile,
    name_backend,
    render_shapes,
    require_available,
    require_obtained,
)
from model.contract import Canvas, Contract
from model.errors import BackendUnavailable, ConfigError

CONTRACT = Contract(
    name="a",
    version="1",
    network="none",
    canvases=(Canvas.square(448),),
    stride_px=4,
    detections=2,
    thing_clusters=2,
    stuff_clusters=1,
)
PAPER = dataclasses.replace(
    CONTRACT, canvases=tuple(Canvas(height_px=h, width_px=w) for h, w in ((800, 1088), (1088, 800), (800, 800)))
)


def test_one_canvas_makes_a_profile_of_one_size_and_batches_of_1_8_and_32() -> None:
    profile = make_profile(CONTRACT)
    assert render_shapes(profile.least) == "pixels:1x3x448x448,sizes:1x2"
    assert render_shapes(profile.best) == "pixels:8x3x448x448,sizes:8x2"
    assert render_shapes(profile.most) == "pixels:32x3x448x448,sizes:32x2"


def test_several_canvases_are_spanned_and_the_first_is_best() -> None:
    profile = make_profile(PAPER)
    assert render_shapes(profile.least) == "pixels:1x3x800x800,sizes:1x2"
    assert render_shapes(profile.best) == "pixels:8x3x800x1088,sizes:8x2"
    assert render_shapes(profile.most) == "pixels:32x3x1088x1088,sizes:32x2"


def test_tensorrt_gets_the_profile_and_its_folder_and_has_cuda_and_the_cpu_behind_it() -> None:
    (name, options), *rest = list_tensorrt_providers(make_profile(CONTRACT), "fp16", Path("/engines/a"))
    assert name == "TensorrtExecutionProvider"
    assert options["trt_engine_cache_path"] == "/engines/a"
    assert options["trt_profile_opt_shapes"] == "pixels:8x3x448x448,sizes:8x2"
    assert options["trt_fp16_enable"] == "1"
    assert [each for each, _ in rest] == ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize("precision", ["fp32", "fp16-stored"])
def test_tensorrt_computes_in_fp32_unless_the_graph_does_not(precision: str) -> None:
    assert list_tensorrt_providers(make_profile(CONTRACT), precision, Path())[0][1]["trt_fp16_enable"] == "0"  # type: ignore[arg-type]


def test_fp32_is_not_rounded_to_tf32_on_a_gpu() -> None:
    assert list_cuda_providers()[0][1]["use_tf32"] == "0"


def test_a_build_without_the_backend_is_told_with_what_to_install() -> None:
    with pytest.raises(BackendUnavailable, match=r"backend cuda: .* with CPUExecutionProvider alone: .*service-gpu"):
        require_available("cuda", ["CPUExecutionProvider"])
    require_available("cuda", ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("asked", "providers", "obtained"),
    [
        ("cuda", ["CPUExecutionProvider"], "cpu"),
        ("tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
    ],
)
def test_a_silent_fall_back_is_an_error_that_names_both(asked: str, providers: list[str], obtained: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"backend {asked}: ONNX Runtime fell back to {obtained}: install"):
        require_obtained(asked, name_backend(providers))  # type: ignore[arg-type]


def test_what_was_asked_for_and_obtained_passes() -> None:
    require_obtained("tensorrt", name_backend(["TensorrtExecutionProvider", "CUDAExecutionProvider"]))


def test_a_backend_that_is_not_there_is_a_wrong_option() -> None:
    assert issubclass(BackendUnavailable, ConfigError)
