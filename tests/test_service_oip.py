"""The Open Inference Protocol, with Triton's own client and by plain HTTP."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import httpx
import numpy as np
import orjson
import pytest
from fake_service import BLUE, CONTRACT, WHITE, draw_halves, open_client, open_fake, save
from live_service import listen
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from service.app import create_app
from service.oip.tensors import LENGTH_HEADER
from service.schemas import SegmentationResponse
from service.settings import Settings

T = TypeVar("T")
MODEL, VERSION = CONTRACT.name, CONTRACT.version
HALVES, BLUES = save(draw_halves()), save(draw_halves(BLUE, WHITE))
TEXT_FILE = b"not an image"

pytestmark = pytest.mark.anyio


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client() as each:
        yield each


async def run_triton_client(work: Callable[[InferenceServerClient], T], **settings: Any) -> T:
    """Run `work` with Triton's blocking client."""
    async with listen(**settings) as (host, port):

        def run() -> T:
            with InferenceServerClient(f"{host}:{port}") as client:
                return work(client)

        return await asyncio.to_thread(run)


def make_input(*images: bytes, is_binary: bool = True) -> InferInput:
    tensor = InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array([*images, None], np.object_)[:-1], binary_data=is_binary)
    return tensor


async def test_metadata_of_server_and_model() -> None:
    def check(client: InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert client.is_model_ready(MODEL, VERSION.replace("+", "%2B"))
        assert not client.is_model_ready("another")
        server = client.get_server_metadata()
        assert server["name"] == "useg"
        assert {"binary_tensor_data", "model_repository", "statistics", "schedule_policy"} <= set(server["extensions"])
        model = client.get_model_metadata(MODEL)
        assert (model["name"], model["versions"]) == (MODEL, [VERSION])
        arrays = [{"name": f"image_{order}", "datatype": "UINT8", "shape": [-1, -1, -1, 3]} for order in ("rgb", "bgr")]
        assert model["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}, *arrays]
        assert [each["name"] for each in model["outputs"]] == ["panoptic", "instance", "semantic", "panoptic_ids"]
        assert client.get_model_config(MODEL)["input"][0]["data_type"] == "TYPE_STRING"

    await run_triton_client(check)


async def test_binary_images_have_binary_outputs() -> None:
    def infer(client: InferenceServerClient) -> None:
        result = client.infer(MODEL, [make_input(HALVES, BLUES)], request_id="66", parameters={"threshold": 0.1})
        assert result.get_response()["id"] == "66"
        assert (result.get_response()["model_name"], result.get_response()["model_version"]) == (MODEL, VERSION)
        answers = [SegmentationResponse.model_validate_json(each) for each in result.as_numpy("panoptic")]
        assert [[each.cluster_id for each in response.segments_info] for response in answers] == [[1, 3], [2, 3]]

    await run_triton_client(infer, max_batch_size=2)


async def test_requested_outputs_are_returned_as_binary_or_json() -> None:
    def infer(client: InferenceServerClient) -> None:
        outputs = [
            InferRequestedOutput("panoptic_ids", binary_data=True),
            InferRequestedOutput("instance", binary_data=False),
            InferRequestedOutput("semantic", binary_data=True),
        ]
        result = client.infer(MODEL, [make_input(HALVES)], outputs=outputs)
        ids = result.as_numpy("panoptic_ids")
        assert (ids.shape, ids.dtype) == ((1, 28, 56), np.int32)
        assert ids[0, 5, [5, 50]].tolist() == [1, 2]
        instance = SegmentationResponse.model_validate_json(result.as_numpy("instance")[0])
        assert (instance.task, len(instance.segments_info)) == ("instance", 1)
        assert SegmentationResponse.model_validate_json(result.as_numpy("semantic")[0]).task == "semantic"
        assert result.as_numpy("panoptic") is None

    await run_triton_client(infer)


async def test_the_repository_is_listed_and_not_changed() -> None:
    def check(client: InferenceServerClient) -> None:
        entry = {"name": MODEL, "version": VERSION, "state": "READY", "reason": ""}
        assert client.get_model_repository_index() == [entry]
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="serves a single artifact"):
                change(MODEL)

    await run_triton_client(check)


async def test_statistics_count_runs_and_requests() -> None:
    def count(client: InferenceServerClient) -> None:
        (before,) = client.get_inference_statistics(MODEL)["model_stats"]
        assert (before["inference_count"], before["last_inference"]) == (0, 0)
        client.infer(MODEL, [make_input(HALVES, BLUES)])
        with pytest.raises(InferenceServerException):
            client.infer(MODEL, [make_input(TEXT_FILE)])
        (after,) = client.get_inference_statistics()["model_stats"]
        stats = after["inference_stats"]
        assert (after["inference_count"], after["execution_count"]) == (2, 2)
        assert after["last_inference"] > 1_700_000_000_000  # milliseconds: some time after 2023
        assert (stats["success"]["count"], stats["fail"]["count"]) == (1, 1)
        for stage in ("queue", "compute_input", "compute_infer", "compute_output"):
            assert stats[stage]["count"] == 2
        assert stats["compute_infer"]["ns"] > 0

    await run_triton_client(count, max_batch_size=1)


async def test_a_service_that_is_not_ready_is_live() -> None:
    app = create_app(Settings(), load_artifact=open_fake)  # and nothing starts it
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        ready = await client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False})
        assert (await client.get(f"/v2/models/{MODEL}/ready")).json() == {"name": MODEL, "ready": False}
        assert (await client.post("/v2/repository/index")).json() == []


INPUT = {"name": "image", "datatype": "BYTES", "shape": [1]}
ARRAY = {"name": "image_rgb", "datatype": "UINT8", "shape": [1, 1, 3]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        ({"inputs": [], "id": "1"}, "inputs: List should have at least 1 item"),
        ({"inputs": [INPUT, INPUT]}, "at most 1 item"),
        ({"inputs": [INPUT | {"data": ["!"]}]}, "invalid base64"),
        ({"inputs": [INPUT | {"data": []}]}, "the shape \\[1\\] but 0 elements"),
        ({"inputs": [INPUT | {"datatype": "FP32", "data": [1.0]}]}, "datatype: Input should be 'BYTES'"),
        ({"inputs": [INPUT | {"shape": [-1], "data": ["aGk="]}]}, "shape.0: Input should be greater than 0"),
        ({"inputs": [INPUT | {"datatype": "UINT8", "data": [1]}]}, "'image_bgr' take arrays as UINT8"),
        ({"inputs": [ARRAY | {"data": [1, 2]}]}, r"shape \[1, 1, 3\] but 2 elements"),
        ({"inputs": [ARRAY | {"data": [1, 2, 256]}]}, "integers in 0..255"),
        ({"inputs": [ARRAY | {"data": [1, 2, "3"]}]}, "integers in 0..255"),
        ({"inputs": [ARRAY | {"shape": [3], "data": [1, 2, 3]}]}, "expected N H W 3 or H W 3"),
        ({"inputs": [ARRAY | {"shape": [9000, 9000, 3]}]}, "but 0 elements"),
        ({"inputs": [INPUT | {"shape": [10**9], "data": ["aGk="]}]}, "at most 32 images"),
        ({"inputs": [INPUT | {"parameters": {"binary_data_size": 9}}]}, "binary_data_size is 9, but 0 bytes follow"),
        ({"inputs": [INPUT | {"data": ["https://example.org"]}]}, "image URLs are not supported"),
        ({"inputs": [INPUT | {"data": ["aGk="]}], "outputs": [{"name": "panoptic"}] * 2}, "requested twice"),
        ({"inputs": [INPUT | {"data": ["aGk="]}], "parameters": {"priority": -1}}, "priority must be an integer"),
        ({"inputs": [INPUT | {"data": ["aGk="]}], "parameters": {"tsak": 1}}, "unknown parameter 'tsak'"),
        ({"inputs": [INPUT | {"data": ["aGk="]}], "outputs": [{"name": "depth"}]}, "outputs.0.name"),
        ({"inputs": [INPUT | {"data": ["aGk="]}], "parameters": {"task": "instance"}}, "request outputs by name"),
        ({"inputs": [INPUT | {"data": ["aGk="]}]}, "image 0: 2 bytes"),
    ],
)
async def test_an_invalid_request_is_reported(http: httpx.AsyncClient, body: Any, words: str) -> None:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    response = await http.post(f"/v2/models/{MODEL}/infer", content=content)
    assert response.status_code == 422
    assert list(response.json()) == ["error"]
    with pytest.raises(ValueError, match=words):
        raise ValueError(response.json()["error"])


@pytest.mark.parametrize("length", ["-1", "x", "99999", "1" * 40])
async def test_an_invalid_header_length_is_rejected(http: httpx.AsyncClient, length: str) -> None:
    response = await http.post(f"/v2/models/{MODEL}/infer", content=b"{}", headers={LENGTH_HEADER: length})
    assert (response.status_code, LENGTH_HEADER in response.json()["error"]) == (422, True)


@pytest.mark.parametrize("tail", [b"\x01", b"\xff\xff\xff\xff", b"\x05\0\0\0ab"])
async def test_a_truncated_element_is_rejected(http: httpx.AsyncClient, tail: bytes) -> None:
    head = orjson.dumps({"inputs": [INPUT | {"parameters": {"binary_data_size": len(tail)}}]})
    headers = {LENGTH_HEADER: str(len(head))}
    response = await http.post(f"/v2/models/{MODEL}/infer", content=head + tail, headers=headers)
    assert (response.status_code, "truncated" in response.json()["error"]) == (422, True)


async def test_base64_in_json_has_json_outputs(http: httpx.AsyncClient) -> None:
    data = [[base64.b64encode(HALVES).decode()]]
    body = {"id": "7", "inputs": [INPUT | {"shape": [1, 1], "data": data}]}
    response = await http.post(f"/v2/models/{MODEL}/versions/{VERSION}/infer", json=body)
    content = response.json()
    assert (response.status_code, content["id"], content["model_version"]) == (200, "7", VERSION)
    outputs = {output["name"]: output for output in content["outputs"]}
    assert list(outputs) == ["panoptic", "instance", "semantic", "panoptic_ids"]
    for task, count in (("panoptic", 2), ("instance", 1), ("semantic", 2)):
        assert (outputs[task]["datatype"], outputs[task]["shape"]) == ("BYTES", [1])
        assert len(SegmentationResponse.model_validate_json(outputs[task]["data"][0]).segments_info) == count
    ids = outputs["panoptic_ids"]
    assert (ids["datatype"], ids["shape"], ids["data"]) == ("INT32", [1, 28, 56], ([1] * 28 + [2] * 28) * 28)
    assert LENGTH_HEADER not in response.headers


async def test_the_body_may_be_the_image(http: httpx.AsyncClient) -> None:
    response = await http.post(f"/v2/models/{MODEL}/infer", content=HALVES, headers={LENGTH_HEADER: "0"})
    length = int(response.headers[LENGTH_HEADER])
    outputs = orjson.loads(response.content[:length])["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in outputs]
    assert sum(sizes) == len(response.content) - length
    tail = io.BytesIO(response.content[length : length + sizes[0]])
    assert int.from_bytes(tail.read(4), "little") == sizes[0] - 4
    assert SegmentationResponse.model_validate_json(tail.read()).task == "panoptic"


@pytest.mark.parametrize("name", ["image_rgb", "image_bgr"])
@pytest.mark.parametrize("shape", [(28, 56, 3), (2, 28, 56, 3)])
async def test_arrays_are_images_in_the_order_of_channels_of_their_name(name: str, shape: tuple[int, ...]) -> None:
    pixels = np.broadcast_to(np.asarray(draw_halves()), shape)  # red is a thing, blue is none above the threshold
    array = np.ascontiguousarray(pixels[..., ::-1] if name == "image_bgr" else pixels)

    def infer(client: InferenceServerClient) -> None:
        for is_binary in (True, False):
            tensor = InferInput(name, list(shape), "UINT8")
            tensor.set_data_from_numpy(array, binary_data=is_binary)
            result = client.infer(MODEL, [tensor])
            found = [SegmentationResponse.model_validate_json(each) for each in result.as_numpy("panoptic")]
            assert [each.segments_info[0].bbox for each in found] == [(0, 0, 28, 28)] * (2 if len(shape) == 4 else 1)
            assert result.as_numpy("panoptic_ids").shape == (len(found), 28, 56)

    await run_triton_client(infer)


async def test_images_of_several_sizes_have_no_ids_unless_they_are_requested() -> None:
    def infer(client: InferenceServerClient) -> None:
        images = [make_input(HALVES, save(draw_halves().resize((28, 28))))]
        result = client.infer(MODEL, images)
        assert (len(result.as_numpy("semantic")), result.as_numpy("panoptic_ids")) == (2, None)
        with pytest.raises(InferenceServerException, match="images of one size"):
            client.infer(MODEL, images, outputs=[InferRequestedOutput("panoptic_ids")])

    await run_triton_client(infer)


async def test_an_unknown_path_is_a_404_of_the_protocol(http: httpx.AsyncClient) -> None:
    response = await http.get("/v2/nothing")
    assert (response.status_code, list(response.json())) == (404, ["error"])
