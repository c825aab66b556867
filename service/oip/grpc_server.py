"""The Open Inference Protocol v2 over gRPC (extra `grpc`).

Each call becomes a request to a `/v2` path of the application, so that keys, limits, errors, metrics, logs and traces
are those of HTTP.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.datastructures import Headers
from starlette.types import Message as AsgiMessage

from model.errors import ConfigError, InvalidParameter, Unauthorized
from service.auth import authenticate
from service.middleware import AppState
from service.oip.tensors import LENGTH_HEADER, encode_bytes_tensor
from service.problems import OIP_PREFIX

logger = logging.getLogger(__name__)

_SERVICE = "inference.GRPCInferenceService"
_MESSAGE_OVERHEAD_BYTES = 1 << 20
"""Allowed beside the tensors of a request."""
_MAX_OTHER_RPCS = 16
"""Calls at once beside those that wait for the network."""
_MAX_TIMEOUT_MS = 999_999_999
_FORWARDED = {"authorization", "traceparent", "tracestate", "x-api-key", "x-request-id", "x-request-priority"} | {
    "x-request-timeout-ms",
    "x-routing-key",
}
"""Metadata of a call that is taken over as request headers."""
_STATUS_CODES = {
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Others are INVALID_ARGUMENT below 500, else INTERNAL."""


class _Calls:
    """Handles the calls of all methods."""

    def __init__(self, app: Callable[..., Awaitable[None]], state: AppState) -> None:
        self._app = app
        self._state = state

    async def get(
        self, path: Callable[[Any], str], response_class: type[Message], request: Message, context: Any
    ) -> Message:
        """Return the JSON of a path as a message."""
        url = path(request)
        _, body = await self._request(context, "POST" if url == _INDEX_PATH else "GET", url, {}, b"")
        content = json.loads(body)
        first = response_class.DESCRIPTOR.fields[0].name  # that of a list or of a configuration, which HTTP sends bare
        is_bare = isinstance(content, list) or first == "config"
        return ParseDict({first: content} if is_bare else content, response_class(), ignore_unknown_fields=True)

    async def infer(
        self, request_class: type[Message], response_class: type[Message], _messages: object, context: Any
    ) -> Message:
        """Run an inference. The message is read here, after the API key was checked."""
        request: Any = request_class()
        if self._is_authorized(context):
            request = await self._read(context, request)
        try:
            head, body = encode_infer_request(request)
        except InvalidParameter as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        lengths = {LENGTH_HEADER: str(len(head)), "content-length": str(len(head) + len(body))}
        path = _model_path(request.model_name, request.model_version, "/infer")
        headers, content = await self._request(context, "POST", path, lengths, head + body)
        return _decode_infer_response(headers, content, response_class())

    def _is_authorized(self, context: Any) -> bool:
        try:
            return not self._state.api_keys or bool(authenticate(self._state.api_keys, _headers(context)))
        except Unauthorized:
            return False

    async def _read(self, context: Any, empty: Message) -> Message:
        try:
            message: Any = await asyncio.wait_for(context.read(), self._state.settings.request_timeout_s)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the message did not arrive in time")
        return empty if message is grpc.aio.EOF else message

    async def _request(
        self, context: Any, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[Headers, bytes]:
        """Return headers and body of the application's response; abort the call if that is an error."""
        given = {**_headers(context), **headers}
        if (left_s := context.time_remaining()) is not None:
            given["x-request-timeout-ms"] = str(min(max(1, int(left_s * 1000)), _MAX_TIMEOUT_MS))
        status, received, content = await _call_asgi(self._app, _peer(context), method, path, given, body)
        is_unready = path.endswith("/ready") and status == HTTPStatus.NOT_FOUND  # no error to Triton's clients
        # The body of a failed health check is not the protocol's error.
        if status >= HTTPStatus.BAD_REQUEST and content.startswith(b'{"error"') and not is_unready:
            if retry_after := received.get("retry-after"):
                context.set_trailing_metadata((("retry-after", retry_after),))
            default = grpc.StatusCode.INTERNAL if status >= 500 else grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(_STATUS_CODES.get(HTTPStatus(status), default), json.loads(content)["error"])
        return received, content


@asynccontextmanager
async def serve_grpc(
    app: Callable[..., Awaitable[None]], state: AppState
) -> AsyncIterator[tuple[int, Callable[[], Awaitable[None]]]]:
    """Serve while inside; yields the port, and a function that stops after the calls in flight.

    Raises ConfigError if the address is not available.
    """
    settings = state.settings
    options = [
        ("grpc.max_receive_message_length", settings.max_body_bytes + _MESSAGE_OVERHEAD_BYTES),
        ("grpc.so_reuseport", 0),
    ]
    max_rpcs = settings.max_queue_size + settings.max_batch_size + _MAX_OTHER_RPCS
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=max_rpcs)
    server.add_generic_rpc_handlers((_make_handlers(_Calls(app, state)),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {host} port {settings.grpc_port} for gRPC: {error}") from error
    await server.start()
    logger.info("gRPC on port %d", port)
    try:
        yield port, partial(server.stop, settings.graceful_shutdown_timeout_s)
    finally:
        await server.stop(None)


def encode_infer_request(message: Any) -> tuple[bytes, bytes]:
    """Return the JSON and the tensors of a `ModelInferRequest`, as the binary extension over HTTP has them.

    Raises InvalidParameter for tensors that do not fit to `raw_input_contents`, or contents of an unsupported type.
    """
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InvalidParameter(f"raw_input_contents has {len(raw)} elements for {len(message.inputs)} inputs")
    tensors = raw or [_encode_contents(tensor) for tensor in message.inputs]
    request = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {**_parameters(tensor), "binary_data_size": len(content)},
            }
            for tensor, content in zip(message.inputs, tensors, strict=True)
        ],
        "outputs": [
            {"name": output.name, "parameters": {**_parameters(output), "binary_data": True}}
            for output in message.outputs
        ],
        "parameters": {**_parameters(message), "binary_data_output": True},
        **({"id": message.id} if message.id else {}),
    }
    return json.dumps(request).encode(), b"".join(tensors)


def _decode_infer_response(headers: Headers, body: bytes, message: Any) -> Message:
    length = int(headers[LENGTH_HEADER])
    head = json.loads(body[:length])
    message.model_name, message.model_version = head["model_name"], head["model_version"]
    message.id = head.get("id", "")
    start = length
    for output in head["outputs"]:
        message.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        end = start + output["parameters"]["binary_data_size"]
        message.raw_output_contents.append(body[start:end])
        start = end
    result: Message = message
    return result


def _encode_contents(tensor: Any) -> bytes:
    try:
        return encode_bytes_tensor(tensor.contents.bytes_contents) + bytes(tensor.contents.uint_contents)
    except ValueError as error:
        raise InvalidParameter(f"input {tensor.name!r} has values outside 0..255") from error


def _parameters(message: Any) -> dict[str, Any]:
    chosen = {name: (each, each.WhichOneof("parameter_choice")) for name, each in message.parameters.items()}
    return {name: getattr(each, choice) for name, (each, choice) in chosen.items() if choice}


def _make_handlers(calls: _Calls) -> grpc.GenericRpcHandler:
    service = load_definition().FindServiceByName(_SERVICE)
    handlers = {}
    for method in service.methods:
        request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        if method.name == "ModelInfer":  # of a stream, messages are read on demand; on the wire it is the same
            handle = partial(calls.infer, request_class, response_class)
            make_handler = grpc.stream_unary_rpc_method_handler
        else:
            handle = partial(calls.get, _PATHS[method.name], response_class)
            make_handler = grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make_handler(handle, request_class.FromString, response_class.SerializeToString)
    return grpc.method_handlers_generic_handler(_SERVICE, handlers)


@cache
def load_definition() -> DescriptorPool:
    """Return the protocol's messages in a pool of their own: a client in this process may define the same ones."""
    content = Path(__file__).with_name("open_inference.binpb").read_bytes()
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(content).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def _model_path(name: str, version: str, suffix: str) -> str:
    version_path = f"/versions/{quote(version, safe='')}" if version else ""
    return f"{OIP_PREFIX}/models/{quote(name, safe='')}{version_path}{suffix}"


def _statistics_path(request: Any) -> str:
    return _model_path(request.name, request.version, "/stats") if request.name else f"{OIP_PREFIX}/models/stats"


_INDEX_PATH = f"{OIP_PREFIX}/repository/index"
_PATHS: Mapping[str, Callable[[Any], str]] = {
    "ServerLive": lambda _: f"{OIP_PREFIX}/health/live",
    "ServerReady": lambda _: f"{OIP_PREFIX}/health/ready",
    "ModelReady": lambda request: _model_path(request.name, request.version, "/ready"),
    "ServerMetadata": lambda _: OIP_PREFIX,
    "ModelMetadata": lambda request: _model_path(request.name, request.version, ""),
    "ModelConfig": lambda request: _model_path(request.name, request.version, "/config"),
    "ModelStatistics": _statistics_path,
    "RepositoryIndex": lambda _: _INDEX_PATH,
}
"""Path of the request that a call becomes."""


async def _call_asgi(
    app: Callable[..., Awaitable[None]],
    client: tuple[str, int],
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of a response of the application."""
    received: asyncio.Queue[AsgiMessage] = asyncio.Queue()  # after the request, it is empty until the call is cancelled
    received.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: asyncio.Queue[AsgiMessage] = asyncio.Queue()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), text.encode("latin-1", "replace")) for name, text in headers.items()],
        "client": client,
        "server": None,
        "state": {},
    }
    await app(scope, received.get, sent.put)
    start = sent.get_nowait()
    content = b"".join(sent.get_nowait().get("body", b"") for _ in range(sent.qsize()))
    return start["status"], Headers(raw=start["headers"]), content


def _headers(context: Any) -> Headers:
    metadata: Sequence[tuple[str, Any]] = context.invocation_metadata() or ()
    return Headers({name: value for name, value in metadata if name in _FORWARDED and isinstance(value, str)})


def _peer(context: Any) -> tuple[str, int]:
    """Return address and port of `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    address, _, port = unquote(context.peer()).partition(":")[2].rpartition(":")
    return address.strip("[]") or "unknown", int(port) if port.isdecimal() else 0
