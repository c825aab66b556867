"""API keys, admin keys, rate limits and the limit of headers."""

import hashlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fake_service import draw_halves, open_client, post, save

from model.errors import ConfigError, RateLimited
from service.auth import TokenBucketLimiter, load_api_keys
from service.schemas import Problem

HALVES = save(draw_halves())
KEY = "the-key-of-alice"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = f"alice:{digest(KEY)},slow:{digest('slow')}:0.001:2"
ALICE = {"Authorization": f"Bearer {KEY}"}

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(api_keys=KEYS) as each:
        yield each


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer nobody"}, {"X-API-Key": f"{KEY} x"}]
)
async def test_a_missing_or_unknown_key_is_unauthorized(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await post(client, HALVES, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert Problem.model_validate_json(response.content).type == "urn:useg:problem:unauthorized"
    assert (await client.get("/metrics", headers=headers)).status_code == 401
    assert (await client.get("/none", headers=headers)).status_code == 401


@pytest.mark.parametrize("headers", [ALICE, {"authorization": f"bearer {KEY}"}, {"X-API-Key": KEY}])
async def test_an_api_key_is_accepted_in_either_header(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await post(client, HALVES, headers=headers)).status_code == 200


async def test_health_and_pages_need_no_key(client: httpx.AsyncClient) -> None:
    for path in ("/livez", "/readyz", "/", "/dashboard", "/static/style.css", "/openapi.json"):
        assert (await client.get(path)).status_code == 200


async def test_rate_limits_are_per_key(client: httpx.AsyncClient) -> None:
    slow = {"X-API-Key": "slow"}
    assert [(await post(client, HALVES, headers=slow)).status_code for _ in range(3)] == [200, 200, 429]
    limited = await post(client, HALVES, headers=slow)
    assert int(limited.headers["retry-after"]) > 900
    assert Problem.model_validate_json(limited.content).type == "urn:useg:problem:rate-limited"
    assert (await post(client, HALVES, headers=ALICE)).status_code == 200
    assert (await client.get("/livez", headers=slow)).status_code == 200
    text = (await client.get("/metrics", headers=ALICE)).text
    assert 'useg_requests_rejected_total{reason="rate_limit"} 2.0' in text


async def test_without_keys_rate_limits_are_per_address() -> None:
    async with open_client(rate_limit_rps=0.001, rate_limit_burst=1) as client:
        assert [(await post(client, HALVES)).status_code for _ in range(2)] == [200, 429]


async def test_too_many_headers_are_rejected(client: httpx.AsyncClient) -> None:
    response = await post(client, HALVES, headers={**ALICE, **{f"X-{i}": "1" for i in range(64)}})
    assert (response.status_code, response.json()["type"]) == (431, "urn:useg:problem:headers-too-large")


async def test_errors_under_v2_have_the_form_of_the_protocol(client: httpx.AsyncClient) -> None:
    unknown = await client.get("/v2")
    crowded = await client.get("/v2", headers={**ALICE, **{f"X-{i}": "1" for i in range(64)}})
    assert (unknown.status_code, crowded.status_code) == (401, 431)
    assert [list(response.json()) for response in (unknown, crowded)] == [["error"], ["error"]]
    assert unknown.headers["www-authenticate"].startswith("Bearer")


async def test_logs_and_metrics_hold_no_key_and_no_image_bytes(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await post(client, HALVES, headers=ALICE)
        await post(client, b"Qx7-no-picture-Qx7", headers={**ALICE, "X-Request-ID": "one"})
        await client.post("/v1/segment", content=b"Qx7", headers={**ALICE, "Content-Type": "text/Qx7"})
        metrics = (await client.get("/metrics", headers=ALICE)).text
    actual = (
        caplog.text + metrics + "".join(str(vars(record)) for record in caplog.records if record.name[:7] == "service")
    )
    assert "one" in actual
    assert [secret for secret in (KEY, "Qx7", "IHDR") if secret in actual] == []


def test_keys_are_loaded_from_a_file_and_a_list(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nalice:{digest('one')}\n  bob:{digest('two')}:2.5:7\n")
    alice, bob, carol = load_api_keys(file, f"carol:{digest('three')}:0,")
    assert (alice.name, alice.rate_limit_rps, alice.burst) == ("alice", None, None)
    assert (bob.name, bob.rate_limit_rps, bob.burst) == ("bob", 2.5, 7)
    assert (carol.name, carol.rate_limit_rps, carol.burst) == ("carol", 0.0, None)


@pytest.mark.parametrize(
    "line", ["alice", "alice:secret", f"a b:{digest('x')}", f"a:{digest('x')}:fast", f"a:{digest('x')}:1:0", ":" * 5]
)
def test_an_invalid_line_is_reported_by_number_without_its_text(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"bob:{digest('two')}\n{line}\n")
    with pytest.raises(ConfigError, match="line 2 is not of the form NAME:SHA256") as caught:
        load_api_keys(file, "")
    assert line not in str(caught.value)


def test_a_key_file_that_is_empty_or_missing_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ConfigError, match="contains no API key"):
        load_api_keys(tmp_path / "keys", "")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_api_keys(tmp_path / "none", "")


def test_a_burst_is_followed_by_the_rate() -> None:
    limiter = TokenBucketLimiter()
    for _ in range(3):
        limiter.acquire("a", 0.5, 3, 100.0)
    with pytest.raises(RateLimited) as caught:
        limiter.acquire("a", 0.5, 3, 100.0)
    assert caught.value.retry_after_s == 2
    with pytest.raises(RateLimited) as caught:
        limiter.acquire("a", 0.5, 3, 101.5)
    assert caught.value.retry_after_s == 1
    limiter.acquire("a", 0.5, 3, 102.0)
    with pytest.raises(RateLimited):
        limiter.acquire("a", 0.5, 3, 102.0)
    for _ in range(3):
        limiter.acquire("a", 0.5, 3, 1_000.0)
    with pytest.raises(RateLimited):
        limiter.acquire("a", 0.5, 3, 1_000.0)


def test_the_number_of_buckets_is_bounded() -> None:
    limiter = TokenBucketLimiter()
    for stranger in range(10_500):
        limiter.acquire(str(stranger), 1.0, 1, 0.0)
    limiter.acquire("0", 1.0, 1, 0.0)  # forgotten
    with pytest.raises(RateLimited):
        limiter.acquire("10499", 1.0, 1, 0.0)


ROLLBACK = "/v1/models/fake/rollback"


def make_line(name: str) -> str:
    return f"{name}:{digest(name)}"


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


@pytest.mark.parametrize(
    "keys",
    [
        {"api_keys": make_line("alice"), "admin_api_keys": make_line("alice")},
        {"api_keys": f"a:{'0' * 64},a:{'1' * 64}"},
    ],
)
async def test_all_keys_have_different_names(keys: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="two API keys have the same name"):
        async with open_client(**keys):
            pass
