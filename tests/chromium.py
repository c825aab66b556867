"""The browser that pages are tested in."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

WAIT_S = 30
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OFFLINE_FLAGS = ["--disable-background-networking", "--disable-component-update"]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium without a screen; skips where there is none."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not on the PATH")
    with sync_playwright() as playwright:
        expect.set_options(timeout=WAIT_S * 1000)
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS + OFFLINE_FLAGS)
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, errors: list[str]) -> Iterator[Page]:
    """Open a page; errors of its console are added to `errors`, which must be empty at the end."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert errors == []


def require_key(page: Page, url: str, status: int, detail: str) -> list[str | None]:
    """Answer requests with an error unless they have the key "secret"; return the keys that were sent."""
    seen: list[str | None] = []

    def guard(route: Route) -> None:
        seen.append(route.request.headers.get("authorization"))
        if seen[-1] == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=status, json={"detail": detail})

    page.route(url, guard)
    return seen
