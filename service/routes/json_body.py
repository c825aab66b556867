"""Small bodies in JSON, of those who change what is served."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from model.errors import DeadlineExceeded, InvalidParameter
from service.requests.body import stream_body
from service.state import get_state

LIMIT_BYTES = 1024 * 1024

Body = TypeVar("Body", bound=BaseModel)


async def read_small_body(request: Request) -> bytes:
    """The body. Raises as `stream_body`, and DeadlineExceeded."""
    settings = get_state(request).settings
    try:
        async with asyncio.timeout(settings.request_timeout_s):
            return b"".join([chunk async for chunk in stream_body(request, LIMIT_BYTES, settings.client_timeout_s)])
    except TimeoutError as error:
        raise DeadlineExceeded("the body did not arrive within the time limit: try again") from error


def describe_body(schema: dict[str, Any], *, is_required: bool = True) -> dict[str, Any]:
    """What OpenAPI is told of a route that takes such a body."""
    return {"requestBody": {"required": is_required, "content": {"application/json": {"schema": schema}}}}


def parse_body(body: bytes, schema: type[Body]) -> Body:
    """What the JSON says. Raises InvalidParameter for anything else."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors())
        raise InvalidParameter(f"the body is not what is expected here: {told}") from error
