"""Who may change what is served."""

import hashlib

import httpx
import pytest
from fake_service import open_client

from model.errors import ConfigError
from service.responses.schemas import Problem

pytestmark = pytest.mark.anyio
ROLLBACK = "/v1/models/fake/rollback"
LOCAL = {"Host": "127.0.0.1:8000"}


def make_line(name: str) -> str:
    return f"{name}:{hashlib.sha256(name.encode()).hexdigest()}"


def bear(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def change(client: httpx.AsyncClient, **headers: str) -> tuple[int, str]:
    """What a change is answered: 409 is one that was allowed, where there is no registry."""
    answer = await client.post(ROLLBACK, headers={name.replace("_", "-"): text for name, text in headers.items()})
    return answer.status_code, Problem.model_validate_json(answer.content).type.rpartition(":")[2]


async def test_where_nobody_else_reaches_the_service_no_key_is_needed() -> None:
    async with open_client() as client:
        assert await change(client) == (409, "registry-conflict")
        assert await change(client, Host="localhost:9", Origin="http://localhost:9") == (409, "registry-conflict")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"X_Forwarded_For": "1.2.3.4"},
        {"Forwarded": "for=1.2.3.4"},
    ],
)
async def test_a_page_of_another_site_and_what_comes_through_a_proxy_are_strangers(headers: dict[str, str]) -> None:
    async with open_client() as client:
        assert await change(client, **headers) == (403, "permission-denied")


@pytest.mark.parametrize(
    "settings", [{"host": "0.0.0.0", "allow_unauthenticated": True}, {"api_keys": make_line("alice")}]
)
async def test_without_administrators_keys_nobody_else_is_one(settings: dict[str, object]) -> None:
    async with open_client(**settings) as client:
        assert await change(client, **bear("alice")) == (403, "permission-denied")


async def test_an_administrators_key_is_needed_where_there_are_some() -> None:
    async with open_client(admin_api_keys=make_line("root")) as client:
        assert await change(client) == (401, "unauthorized")
        assert await change(client, **bear("alice")) == (401, "unauthorized")
        assert await change(client, **bear("root")) == (409, "registry-conflict")
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_callers_key_is_not_enough_and_an_administrators_is_a_callers_too() -> None:
    async with open_client(api_keys=make_line("alice"), admin_api_keys=make_line("root")) as client:
        assert await change(client) == (401, "unauthorized")
        assert await change(client, **bear("alice")) == (403, "permission-denied")
        assert await change(client, **bear("root")) == (409, "registry-conflict")
        assert (await client.get("/v1/models")).status_code == 401
        for name in ("alice", "root"):
            assert (await client.get("/v1/models", headers=bear(name))).status_code == 200


async def test_a_caller_and_an_administrator_have_two_names() -> None:
    with pytest.raises(ConfigError, match="two API keys have one name"):
        async with open_client(api_keys=make_line("alice"), admin_api_keys=make_line("alice")):
            pass
