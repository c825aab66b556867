"""The Open Inference Protocol over gRPC, with Triton's own client."""

import asyncio
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import numpy as np
import pytest
from fake_service import BLUE, CONTRACT, WHITE, draw_halves, open_fake, save
from google.protobuf.descriptor import Descriptor
from live_service import GatedSession
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from model.errors import ConfigError
from service.app import create_app
from service.inference.loading import ArtifactLoader
from service.oip.grpc_server import load_definition, serve_grpc
from service.schemas import SegmentationResponse
from service.settings import Settings

T = TypeVar("T")
MODEL, VERSION = CONTRACT.name, CONTRACT.version
HALVES, BLUES = save(draw_halves()), save(draw_halves(BLUE, WHITE))
KEY = {"authorization": "Bearer the-key"}
KEYS = f"alice:{hashlib.sha256(b'the-key').hexdigest()}"

pytestmark = pytest.mark.anyio


async def run_client(
    work: Callable[[InferenceServerClient], T], opener: ArtifactLoader = open_fake, **settings: Any
) -> tuple[T, str]:
    """Run `work` with Triton's blocking client; return its result and the metrics."""
    app = create_app(Settings(grpc_port=0, **settings), load_artifact=opener)
    async with app.router.lifespan_context(app), serve_grpc(app, app.state.useg) as (port, _):
        await app.state.useg.model_repository.wait_ready()

        def run() -> T:
            with InferenceServerClient(f"127.0.0.1:{port}") as client:
                return work(client)

        result = await asyncio.to_thread(run)
        return result, app.state.useg.telemetry.render().decode()


def make_input(*images: bytes) -> InferInput:
    tensor = InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array([*images, None], np.object_)[:-1])
    return tensor


def fail(work: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        work()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


async def test_health_metadata_inference_and_statistics() -> None:
    def check(client: InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert client.is_model_ready(MODEL, VERSION)
        assert not client.is_model_ready("another")
        assert client.get_server_metadata().name == "useg"
        assert [each.datatype for each in client.get_model_metadata(MODEL).inputs] == ["BYTES", "UINT8", "UINT8"]
        assert client.get_model_repository_index().models[0].state == "READY"
        config = client.get_model_config(MODEL).config
        assert (config.input[1].data_type, list(config.input[1].dims)) == (model_config_pb2.TYPE_UINT8, [-1, -1, -1, 3])
        assert (config.input[1].optional, config.parameters["backend"].string_value) == (True, "fake")

        result = client.infer(MODEL, [make_input(HALVES, BLUES)], request_id="66", parameters={"threshold": 0.1})
        assert (result.get_response().id, result.get_response().model_version) == ("66", VERSION)
        found = [SegmentationResponse.model_validate_json(each) for each in result.as_numpy("panoptic")]
        assert [[each.cluster_id for each in response.segments_info] for response in found] == [[1, 3], [2, 3]]
        assert result.as_numpy("panoptic_ids")[0, 5, [5, 50]].tolist() == [1, 2]

        frame = InferInput("image_bgr", [28, 56, 3], "UINT8")
        frame.set_data_from_numpy(np.ascontiguousarray(np.asarray(draw_halves())[..., ::-1]))
        result = client.infer(MODEL, [frame], VERSION, [InferRequestedOutput("instance")], priority=1, timeout=10**7)
        assert SegmentationResponse.model_validate_json(result.as_numpy("instance")[0]).segments_info[0].cluster_id == 1
        assert result.as_numpy("panoptic") is None

        (stats,) = client.get_inference_statistics(MODEL).model_stats
        assert (stats.inference_count, stats.inference_stats.success.count) == (3, 2)
        assert stats.inference_stats.compute_infer.ns > 0

    _, metrics = await run_client(check)
    assert 'http_route="/v2/models/{name}/infer"} 1.0' in metrics
    assert 'useg_requests_total{model="fake",outcome="ok"' in metrics


async def test_errors_and_limits_are_those_of_http() -> None:
    def check(client: InferenceServerClient) -> None:
        def infer(*images: bytes, model: str = MODEL, headers: dict[str, str] = KEY, **options: Any) -> tuple[str, str]:
            return fail(lambda: client.infer(model, [make_input(*images)], headers=headers, **options))

        assert infer(HALVES, headers={}) == (
            "UNAUTHENTICATED",
            "missing or unknown API key: send 'Authorization: Bearer KEY'",
        )
        assert fail(lambda: client.get_model_metadata(MODEL))[0] == "UNAUTHENTICATED"
        assert client.is_server_ready()  # needs no key
        status, message = infer(b"no image")
        assert (status, message[:26]) == ("INVALID_ARGUMENT", "image 0: 8 bytes in no sup")
        assert infer(HALVES, model="another")[0] == "NOT_FOUND"
        assert infer(HALVES, model="a/../b")[0] == "NOT_FOUND"
        assert "unknown parameter 'tsak'" in infer(HALVES, parameters={"tsak": 1})[1]
        assert infer(bytes(1_500_000))[0] == "RESOURCE_EXHAUSTED"
        assert infer(bytes(3_500_000))[0] == "RESOURCE_EXHAUSTED"  # rejected by gRPC itself, before it is read
        assert infer(HALVES)[0] == "RESOURCE_EXHAUSTED"  # the burst was eight

    _, metrics = await run_client(
        check, api_keys=KEYS, max_body_bytes=1_000_000, rate_limit_rps=0.001, rate_limit_burst=5
    )
    assert 'useg_requests_rejected_total{reason="rate_limit"}' in metrics


async def test_deadlines_cancel_and_a_full_queue_rejects() -> None:
    session = GatedSession()

    def check(client: InferenceServerClient) -> None:
        held = client.async_infer(MODEL, [make_input(HALVES)], callback=lambda result, error: None, client_timeout=9.0)
        assert session.is_inside.wait(10.0)
        assert fail(lambda: client.infer(MODEL, [make_input(HALVES)], client_timeout=0.3))[0] == "DEADLINE_EXCEEDED"
        assert fail(lambda: client.infer(MODEL, [make_input(HALVES)], timeout=100_000))[0] == "DEADLINE_EXCEEDED"
        waiting = [
            client.async_infer(MODEL, [make_input(HALVES)], callback=lambda result, error: None, client_timeout=9.0)
        ]
        while fail(lambda: client.infer(MODEL, [make_input(HALVES)], client_timeout=0.3))[0] != "UNAVAILABLE":
            pass
        for each in (held, *waiting):
            each.cancel()
        session.gate.set()

    await run_client(check, session.open, max_queue_size=1)


async def test_streams_are_unimplemented() -> None:
    found: Queue[InferenceServerException] = Queue()

    def check(client: InferenceServerClient) -> InferenceServerException:
        client.start_stream(lambda result, error: found.put(error))
        return found.get(timeout=10.0)

    error, _ = await run_client(check)
    assert error.status() == "StatusCode.UNIMPLEMENTED"


async def test_a_port_in_use_is_a_configuration_error() -> None:
    app = create_app(Settings(grpc_port=0), load_artifact=open_fake)
    async with serve_grpc(app, app.state.useg) as (port, _):
        taken = create_app(Settings(grpc_port=port), load_artifact=open_fake)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port} for gRPC"):
            async with serve_grpc(taken, taken.state.useg):
                pass


def test_the_definition_is_a_part_of_tritons_and_its_text_is_what_is_used(repository: Path) -> None:
    text = (repository / "service/oip/open_inference.proto").read_text()
    fields: list[tuple[str, str]] = []

    def compare(ours: Descriptor, other: Descriptor) -> None:
        for field in ours.fields:
            same = other.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (same.number, same.type, same.is_repeated), (
                field.name
            )
            if not ours.GetOptions().map_entry:
                fields.append((field.name, str(field.number)))
        for nested in ours.nested_types:
            compare(nested, other.nested_types_by_name[nested.name])

    ours = load_definition().FindFileByName("open_inference.proto")
    theirs = service_pb2.DESCRIPTOR.message_types_by_name
    types = {each.name: each.number for each in ours.enum_types_by_name["DataType"].values}
    assert types.items() <= dict(model_config_pb2.DataType.items()).items()
    fields += [(name, str(number)) for name, number in types.items()]
    for name, message in ours.message_types_by_name.items():
        compare(message, (service_pb2 if name in theirs else model_config_pb2).DESCRIPTOR.message_types_by_name[name])
    methods = ours.services_by_name["GRPCInferenceService"].methods
    assert {each.name for each in methods} == set(re.findall(r"rpc (\w+)", text))
    assert sorted(fields) == sorted(re.findall(r"(\w+) = (\d+);", text))
