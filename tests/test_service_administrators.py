"""Access to routes that change what is served."""

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
    """Return status and slug of a change; without a registry, an allowed one is a 409."""
    response = await client.post(ROLLBACK, headers={name.replace("_", "-"): text for name, text in headers.items()})
    return response.status_code, Problem.model_validate_json(response.content).type.rpartition(":")[2]


async def test_a_local_server_without_keys_allows_local_admin_requests() -> None:
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
async def test_requests_of_other_sites_or_through_a_proxy_need_an_admin_key(headers: dict[str, str]) -> None:
    async with open_client() as client:
        assert await change(client, **headers) == (403, "permission-denied")


@pytest.mark.parametrize(
    "settings", [{"host": "0.0.0.0", "allow_unauthenticated": True}, {"api_keys": make_line("alice")}]
)
async def test_without_admin_keys_other_servers_allow_no_changes(settings: dict[str, object]) -> None:
    async with open_client(**settings) as client:
        assert await change(client, **bear("alice")) == (403, "permission-denied")


async def test_a_change_needs_an_admin_key() -> None:
    async with open_client(admin_api_keys=make_line("root")) as client:
        assert await change(client) == (401, "unauthorized")
        assert await change(client, **bear("alice")) == (401, "unauthorized")
        assert await change(client, **bear("root")) == (409, "registry-conflict")
        assert (await client.get("/v1/models")).status_code == 200


async def test_an_api_key_has_no_admin_rights_but_an_admin_key_is_an_api_key() -> None:
    async with open_client(api_keys=make_line("alice"), admin_api_keys=make_line("root")) as client:
        assert await change(client) == (401, "unauthorized")
        assert await change(client, **bear("alice")) == (403, "permission-denied")
        assert await change(client, **bear("root")) == (409, "registry-conflict")
        assert (await client.get("/v1/models")).status_code == 401
        for name in ("alice", "root"):
            assert (await client.get("/v1/models", headers=bear(name))).status_code == 200


async def test_api_keys_and_admin_keys_have_different_names() -> None:
    with pytest.raises(ConfigError, match="two API keys have the same name"):
        async with open_client(api_keys=make_line("alice"), admin_api_keys=make_line("alice")):
            pass
