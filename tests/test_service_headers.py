"""Security headers, content security policy and trace context."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from fake_service import open_client

pytestmark = pytest.mark.anyio
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client() as each:
        yield each


@pytest.mark.parametrize("path", ["/", "/livez", "/metrics", "/none", "/static/style.css"])
async def test_every_response_has_security_headers(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path)).headers
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    assert (headers["referrer-policy"], headers["cross-origin-resource-policy"]) == ("no-referrer", "same-origin")


async def test_the_csp_allows_only_files_of_the_service(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert (policy["frame-ancestors"], policy["connect-src"]) == ("'none'", "'self'")
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page.text) == []
    assert re.findall(r'(?:src|href)="(?:https?:)?//', page.text) == []
