"""The dashboard in Chromium, with a fake network."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from chromium import WAIT_S, open_page, require_key
from fake_service import draw_halves, open_described, save
from live_service import serve_in_thread
from playwright.sync_api import Browser, Page, expect

PHOTO = save(draw_halves())
METRICS = """# HELP seg_x "quoted"
seg_x_bucket{task="a",le="0.1"} 2.0
seg_x_bucket{task="a",le="0.5"} 6.0
seg_x_bucket{task="a",le="+Inf"} 8.0
seg_x_bucket{task="b",le="0.1"} 9.0"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve_in_thread(open_described, max_queue_size=2, canary_max_psi=0.42) as address:
        yield address


@pytest.fixture
def page(address: str, browser: Browser, console_errors: list[str]) -> Iterator[Page]:
    with open_page(browser, f"{address}dashboard", console_errors) as page:
        yield page


def post_photo(address: str, content: bytes = PHOTO, **parameters: Any) -> int:
    files = {"file": ("photo.png", content)}
    return httpx.post(f"{address}v1/segment", params=parameters, files=files, timeout=WAIT_S).status_code


def test_a_request_appears_on_the_dashboard(page: Page, address: str) -> None:
    expect(page.get_by_role("status")).to_have_text("fake 1+test on fake: ready")
    assert post_photo(address, task="semantic") == 200
    row = page.get_by_role("table", name="Latency by task").get_by_role("row", name="semantic")
    expect(row.get_by_role("cell").nth(0)).to_have_text("1")
    expect(row.get_by_role("cell").nth(1)).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    expect(page.get_by_role("table", name="Time per stage").get_by_role("row", name="infer")).to_be_visible()
    expect(page.get_by_role("table", name="Batches").get_by_role("row", name="max_batch_size")).to_contain_text("1.0")
    expect(page.get_by_role("table", name="Versions")).to_contain_text("fake 1+test")


def test_the_drift_limit_is_that_of_the_settings(page: Page) -> None:
    heads = page.get_by_role("table", name="Model outputs").get_by_role("columnheader")
    expect(heads.nth(2)).to_have_text("Drift (limit 0.42)")


def test_errors_are_counted_by_status(page: Page, address: str) -> None:
    assert post_photo(address, b"not an image") == 422
    table = page.get_by_role("table", name="Errors")
    expect(table.get_by_role("row", name="Status 422")).to_contain_text("1")


def test_pause_stops_polling(page: Page) -> None:
    page.clock.install()
    page.reload()
    expect(page.locator("#tiles div")).to_have_count(9)
    pause = page.get_by_role("button", name="Pause")
    pause.focus()
    page.keyboard.press("Enter")
    expect(pause).to_have_attribute("aria-pressed", "true")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.clock.run_for(10_000)
    assert requests == []
    with page.expect_response("**/metrics"):
        page.keyboard.press("Enter")
    expect(pause).to_have_attribute("aria-pressed", "false")


def test_the_api_key_field_appears_if_a_key_is_required(page: Page, console_errors: list[str]) -> None:
    require_key(page, "**/metrics", 401, "an API key is needed")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert {"401" in each for each in console_errors} == {True}
    console_errors.clear()


@pytest.mark.parametrize("width", [320, 1280])
def test_the_dashboard_fits_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    expect(page.get_by_role("table", name="Versions")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_quantiles_lie_within_their_buckets(page: Page) -> None:
    # 2 of 8 answers within 0.1 s, 4 more within 0.5 s: the fourth lies half way between.
    script = """async (text) => {
        const { Metrics, bucketQuantile, subtractBuckets } =
            await import(new URL("static/metrics.js", document.baseURI));
        const buckets = new Metrics(text).buckets("seg_x", { task: "a" });
        const none = subtractBuckets(buckets, buckets);
        return [...[0.25, 0.5, 0.99].map((share) => bucketQuantile(share, buckets)), bucketQuantile(0.5, none)];
    }"""
    *quantiles, none = page.evaluate(script, METRICS)
    assert quantiles == pytest.approx([0.1, 0.3, 0.5])
    assert none is None
