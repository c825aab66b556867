"""The page in Chromium, with a fake network."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from chromium import open_page, require_key
from jaxtyping import Bool, Int64, UInt8
from live_service import serve_folder, serve_in_thread
from PIL import Image
from playwright.sync_api import Browser, Error, FilePayload, Page, Route, expect
from pycocotools import mask as coco
from tiny import make_contract

from model.contract import Contract, RawOutputs
from model.embeddings import Category
from model.formats.image_files import decode_panoptic_png, segment_color
from model.images import decode_image

PAPER = (200, 180, 160)
SIZE = (320, 240)
"""Width and height of the drawn photo: 20 px to a cell of the fake's masks."""
LEFT, BOTH, NOTHING, GROUND = (120, 80), (180, 80), (30, 150), (30, 220)
"""Pixels in the first object alone, where it overlaps the second, in void, in stuff."""
BLEND_TOLERANCE = 2
"""The browser rounds each of its layers to 8 bits."""


class TwoBoxes:
    """For any image: two overlapping objects of one cluster, and stuff in the lowest rows."""

    backend = "fake"

    def run(self, pixels: UInt8[np.ndarray, "B 3 S S"], sizes: Int64[np.ndarray, "B 2"]) -> list[RawOutputs]:
        masks = np.zeros((2, 16, 16), np.float32)
        masks[0, 2:6, 4:10] = 1.0
        masks[1, 2:6, 8:14] = 1.0
        semantic = np.zeros((3, 16, 16), np.float32)
        semantic[0, :9] = semantic[1, 9:] = 5.0
        scores, clusters = np.array([0.9, 0.6], np.float32), np.array([6, 6], np.int64)
        raw = RawOutputs(
            scores=scores, clusters=clusters, boxes=np.zeros((2, 4), np.float32), masks=masks, semantic=semantic
        )
        return [raw] * len(pixels)


def open_fake(_directory: Path) -> tuple[Contract, TwoBoxes]:
    contract = make_contract(
        20,
        2,
        64,
        name="two-boxes",
        version="7",
        network="fake",
        max_detections=2,
        categories={21: Category(id=193, name="grass")},
    )
    return contract, TwoBoxes()


@pytest.fixture(scope="module")
def names_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of the category names."""
    return tmp_path_factory.mktemp("names") / "two-boxes.names.json"


@pytest.fixture(scope="module")
def other_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server of one page, which may call the service from 127.0.0.1, not from localhost."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "index.html").write_text('<link rel="icon" href="data:,">')  # else Chromium may ask for /favicon.ico
    with serve_folder(folder) as port:
        yield port


@pytest.fixture(scope="module")
def address(names_file: Path, other_port: int) -> Iterator[str]:
    origin = f"http://127.0.0.1:{other_port}"
    with serve_in_thread(open_fake, category_names_file=names_file, cors_origins=origin) as address:
        yield address


@pytest.fixture
def page(address: str, browser: Browser, console_errors: list[str]) -> Iterator[Page]:
    with open_page(browser, address, console_errors) as page:
        yield page


def draw_photo(suffix: str = "png", **options: Any) -> FilePayload:
    content = io.BytesIO()
    Image.new("RGB", SIZE, PAPER).save(content, suffix, **options)
    return {"name": f"drawn.{suffix}", "mimeType": f"image/{suffix}", "buffer": content.getvalue()}


def upload(page: Page, photo: FilePayload) -> None:
    page.set_input_files("#file", photo)
    page.locator("#segments li").first.wait_for()


def read_pixel(page: Page, input_size: str, at: tuple[int, int]) -> list[int]:
    script = "([id, x, y]) => [...document.getElementById(id).getContext('2d').getImageData(x, y, 1, 1).data]"
    pixel: list[int] = page.evaluate(script, [input_size, *at])
    return pixel[:3]


def hover_masks(page: Page, at: tuple[int, int]) -> None:
    box = page.locator("#masks").bounding_box()
    assert box is not None
    scale = box["width"] / SIZE[0]
    page.mouse.move(box["x"] + at[0] * scale, box["y"] + at[1] * scale)


def find_cells(page: Page, mask: Bool[np.ndarray, "H W"], height: int, width: int) -> list[int]:
    """Return the pixels that the page decodes, on a grid of a size, from a mask encoded by pycocotools."""
    outline = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    given = {"size": outline["size"], "counts": outline["counts"].decode("ascii")}
    script = """async ([outline, grid]) => {
        const { rleToPixels } = await import(new URL("static/rle.js", document.baseURI));
        return rleToPixels(outline, grid).sort((one, other) => one - other);
    }"""
    cells: list[int] = page.evaluate(script, [given, {"height": height, "width": width}])
    return cells


def test_masks_are_drawn_over_the_photo_and_blended_by_the_slider(page: Page) -> None:
    upload(page, draw_photo())
    for at in (LEFT, NOTHING, GROUND):
        assert read_pixel(page, "photo", at) == list(PAPER)
    assert read_pixel(page, "masks", NOTHING) == list(PAPER)
    for at, color, strength in ((LEFT, segment_color(1, True), 0.55), (GROUND, segment_color(3, False), 0.35)):
        expected = np.array(PAPER) * (1 - strength) + np.array(color) * strength
        assert read_pixel(page, "masks", at) == pytest.approx(expected, abs=BLEND_TOLERANCE)
    page.click("#show-photo")
    assert read_pixel(page, "masks", LEFT) == list(PAPER)
    page.click("#show-masks")
    assert read_pixel(page, "masks", GROUND) == list(segment_color(3, False))
    page.get_by_text("Instance").click()
    assert read_pixel(page, "masks", BOTH) == list(segment_color(1, True))  # the better of two


def test_hovering_a_segment_shows_a_tooltip_and_highlights_it_in_the_list(page: Page) -> None:
    tip = page.locator("#tooltip")
    upload(page, draw_photo())
    lit = read_pixel(page, "masks", LEFT)
    page.get_by_role("button", name="score 0.90").hover()  # dims all other segments
    assert read_pixel(page, "masks", LEFT) == lit
    assert sum(read_pixel(page, "masks", NOTHING)) < sum(PAPER) / 2
    hover_masks(page, LEFT)
    # 120 x 80 px would be 12.5%; enlarging the mask bilinearly rounds its corners by 39 px each
    expect(tip.locator("*")).to_have_text(["", "unnamed cluster 7", "thing, cluster 7", "score 0.90 · 12.3% of area"])
    expect(page.locator("#segments .active")).to_contain_text("score 0.90")
    hover_masks(page, GROUND)
    expect(tip.locator("*")).to_have_text(["", "grass", "stuff, cluster 21", "score 0.99 · 25% of area"])
    hover_masks(page, NOTHING)
    expect(tip).to_be_hidden()


def test_switching_the_task_makes_no_request(page: Page) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if request.method == "POST" else None)
    upload(page, draw_photo())
    expect(page.locator("#segments li")).to_have_count(3)
    page.get_by_text("Semantic").click()
    expect(page.locator("#segments h2")).to_contain_text(["Things 1", "Stuff 1"])
    page.get_by_text("Instance").click()
    expect(page.locator("#segments h2")).to_contain_text(["Things 2"])
    assert [url.partition("?")[2] for url in requests] == ["task=panoptic%2Cinstance%2Csemantic"]
    with page.expect_response("**/v1/segment*") as refined:
        page.get_by_text("Fine detail").click()
    assert refined.value.url.endswith("?task=panoptic%2Cinstance%2Csemantic&detail=high")
    assert refined.value.status == 200


def test_clicking_a_segment_shows_its_details_and_border(page: Page) -> None:
    details = page.get_by_role("complementary", name="Selected segment")
    upload(page, draw_photo())
    hover_masks(page, GROUND)
    page.mouse.down()
    page.mouse.up()
    expect(details).to_contain_text("grass (193)")
    expect(details).to_contain_text("19,200 px")  # a quarter of 320 x 240
    expect(details).to_contain_text("320 \N{MULTIPLICATION SIGN} 60 px at 0, 180")
    page.mouse.move(5, 5)
    line = read_pixel(page, "masks", (GROUND[0], 181))
    assert line == [245, 245, 245]
    page.keyboard.press("Escape")
    expect(details).to_be_hidden()


@pytest.fixture
def naming_page(page: Page, address: str, names_file: Path) -> Iterator[Page]:
    """A page with two photos, the first segment pinned; names are removed at the end."""
    page.set_input_files("#file", [draw_photo(), draw_photo() | {"name": "other.png"}])
    expect(page.locator("#album [data-state=done]")).to_have_count(2)
    page.locator("#segments button").first.click()
    yield page
    names_file.unlink(missing_ok=True)
    assert httpx.delete(f"{address}v1/models/two-boxes/clusters/7").json()["revision"] == 0  # reads the names again


def test_a_new_name_appears_everywhere_and_in_later_results(naming_page: Page) -> None:
    page, requests = naming_page, []
    page.on("request", lambda request: requests.append(request.method))
    name = page.get_by_role("combobox", name="Name of cluster 7")
    expect(name).to_have_value("")
    name.press_sequentially("dog")
    page.keyboard.press("Enter")
    expect(page.locator("#segments strong")).to_have_text(["dog", "dog", "grass"])
    expect(page.locator("#details dd").nth(1)).to_have_text("dog (200)")  # 193, and cluster 7
    expect(page.locator("#status")).to_have_text("Name saved.")
    expect(name).to_be_focused()
    page.get_by_text("Semantic").click()
    expect(page.locator("#segments strong")).to_have_text(["dog", "grass"])
    page.get_by_text("Panoptic").click()
    page.locator("#album button").nth(1).click()
    expect(page.locator("#segments strong")).to_have_text(["dog", "dog", "grass"])
    hover_masks(page, LEFT)
    expect(page.locator("#tooltip strong")).to_have_text("dog")
    assert requests == ["PUT", "GET"]
    page.reload()
    upload(page, draw_photo())
    expect(page.locator("#segments strong")).to_have_text(["dog", "dog", "grass"])


def test_escape_resets_the_name_and_then_unpins_the_segment(naming_page: Page) -> None:
    name = naming_page.get_by_role("combobox", name="Name of cluster 7")
    name.press_sequentially("dog")
    naming_page.keyboard.press("Escape")
    expect(name).to_have_value("")
    naming_page.keyboard.press("Escape")
    expect(naming_page.locator("#details")).to_be_hidden()
    expect(naming_page.locator("#segments button").first).to_be_focused()
    expect(naming_page.locator("#segments strong").first).to_have_text("unnamed cluster 7")


def test_a_rejected_name_shows_the_reason(naming_page: Page, names_file: Path, console_errors: list[str]) -> None:
    names_file.write_text("{")
    naming_page.get_by_role("combobox", name="Name of cluster 7").fill("dog")
    naming_page.get_by_role("button", name="Save").click()
    expect(naming_page.locator("#details").get_by_role("alert")).to_contain_text("fix or delete it")
    expect(naming_page.get_by_label("Admin key")).to_be_hidden()
    assert "409" in console_errors.pop()


def test_the_admin_key_field_appears_if_a_key_is_required(naming_page: Page, console_errors: list[str]) -> None:
    seen = require_key(naming_page, "**/v1/models/*/clusters/*", 403, "send an administrator's key")
    naming_page.get_by_role("combobox", name="Name of cluster 7").fill("dog")
    naming_page.keyboard.press("Enter")
    key = naming_page.get_by_label("Admin key")
    expect(naming_page.locator("#details").get_by_role("alert")).to_have_text("send an administrator's key")
    expect(key).to_be_focused()
    key.fill("secret")
    naming_page.keyboard.press("Enter")
    expect(naming_page.locator("#segments strong").first).to_have_text("dog")
    expect(key).to_be_hidden()
    assert seen == [None, "Bearer secret"]
    assert "403" in console_errors.pop()


def test_a_broken_photo_does_not_affect_the_others(page: Page, console_errors: list[str]) -> None:
    broken: FilePayload = {"name": "b.txt", "mimeType": "text/plain", "buffer": b"not an image"}
    page.set_input_files("#file", [draw_photo(), broken])
    album = page.get_by_role("list", name="Photos")
    expect(album.locator("[data-state=failed]")).to_have_text("b.txt, failed")
    expect(page.get_by_role("alert")).to_be_hidden()
    album.get_by_role("button", name="b.txt").click()
    expect(page.get_by_role("alert")).to_contain_text("b.txt: 12 bytes")
    album.get_by_role("button", name="drawn.png").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#segments li")).to_have_count(3)
    assert "422" in console_errors.pop()


def test_the_stages_are_shown_to_scale(page: Page) -> None:
    page.route(
        "**/v1/segment*",
        lambda route: route.fulfill(response=(each := route.fetch()), headers=each.headers | {
            "server-timing": "decode;dur=30.0, infer;dur=90.0"
        }),
    )  # fmt: skip
    upload(page, draw_photo())
    expect(page.locator("#timing-text")).to_contain_text("120 ms on the server: decode 30 ms, infer 90 ms;")
    widths = [each.bounding_box() for each in page.locator("#timing-bar li").all()]
    assert widths[1]["width"] / widths[0]["width"] == pytest.approx(3.0, rel=0.02)


def test_the_api_key_field_appears_if_a_key_is_required(page: Page, console_errors: list[str]) -> None:
    seen = require_key(page, "**/v1/segment*", 401, "an API key is needed")
    page.set_input_files("#file", draw_photo())
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#segments li")).to_have_count(3)
    assert seen == [None, "Bearer secret"]
    assert "401" in console_errors.pop()


@pytest.mark.parametrize("width", [320, 390])
def test_the_page_fits_a_phone(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.set_input_files("#file", [draw_photo()] * 6)
    page.locator("#segments li").first.click()
    page.locator("#health summary").click()
    expect(page.locator("#health-body")).to_contain_text("Waiting")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_all_controls_are_reachable_by_keyboard_and_have_a_name(page: Page) -> None:
    page.set_input_files("#file", [draw_photo(), draw_photo()])
    page.locator("#segments li").first.wait_for()
    names = []
    page.locator("body").press("Tab")
    for _ in range(40):
        script = "() => document.activeElement.ariaLabel ?? document.activeElement.innerText ?? ''"
        focused = page.evaluate(f"[document.activeElement.tagName, ({script})()]")
        if focused[0] == "BODY":
            break
        names.append(focused)
        page.keyboard.press("Tab")
    tags = [tag for tag, _ in names]
    assert tags.count("BUTTON") >= 2 + 2 + 2 + 3  # album, blend, downloads, segments
    assert {"INPUT", "SUMMARY", "A"} <= set(tags)
    assert all(name.strip() for tag, name in names if tag != "INPUT")


def test_swagger_ui_works_offline_and_makes_a_call(page: Page, address: str, tmp_path: Path) -> None:
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(f"{address}docs")
    operation = page.locator("#operations-Segmentation-segment_v1_segment_post")
    operation.locator(".opblock-summary-control").click()
    expect(operation).to_contain_text("overlap_mask_area_threshold")
    operation.locator("input[type=file]").first.set_input_files(draw_photo())
    operation.get_by_role("button", name="Execute").click()
    response = operation.locator(".live-responses-table")
    expect(response).to_contain_text('"name": "two-boxes"')
    assert all(url.startswith((address, "data:", "blob:")) for url in urls)


def test_pages_of_listed_origins_alone_may_call_the_service(
    page: Page, address: str, other_port: int, console_errors: list[str]
) -> None:
    script = """async ([url, photo]) => {
        const body = new Blob([Uint8Array.from(photo)], { type: "image/png" });
        const response = await fetch(`${url}v1/segment`, { method: "POST", headers: { "X-Request-ID": "7" }, body });
        const content = await response.json();
        return [response.status, response.headers.get("X-Request-ID"), content.task ?? content.title];
    }"""
    page.goto(f"http://127.0.0.1:{other_port}")
    given = [address, list(draw_photo()["buffer"])]
    assert page.evaluate(script, given) == [200, "7", "panoptic"]
    assert page.evaluate(script, [address, []]) == [422, "7", "The image cannot be decoded"]
    assert "422" in console_errors.pop()
    page.goto(f"http://localhost:{other_port}")
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate(script, given)
    assert any("CORS policy" in each for each in console_errors)
    console_errors.clear()


def test_a_failed_connection_can_be_retried(page: Page, console_errors: list[str]) -> None:
    page.route("**/v1/segment*", lambda route: route.abort(), times=1)
    page.set_input_files("#file", draw_photo())
    expect(page.get_by_role("alert")).to_contain_text("drawn.png: No response")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#segments li")).to_have_count(3)
    assert "ERR_FAILED" in console_errors.pop()


def test_a_new_photo_is_shown_while_another_is_in_flight(page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/segment*", lambda route: held.append(route), times=1)
    with page.expect_request("**/v1/segment*"):
        page.set_input_files("#file", draw_photo("jpeg"))
    expect(page.locator("#result")).to_have_attribute("aria-busy", "true")
    upload(page, draw_photo())
    expect(page.locator("#photo-name")).to_have_text("drawn.png")
    expect(page.locator("#result")).to_have_attribute("aria-busy", "false")
    held[0].continue_()
    expect(page.locator("#album [data-state=done]")).to_have_count(2)
    expect(page.locator("#photo-name")).to_have_text("drawn.png")


def test_downloads_are_the_label_map_and_the_json(page: Page) -> None:
    upload(page, draw_photo())
    with page.expect_download() as png:
        page.click("#download-png")
    content = Path(png.value.path()).read_bytes()
    labels = decode_panoptic_png(content)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.value.suggested_filename == "drawn-panoptic.png"
    assert [labels[y, x] for x, y in (LEFT, BOTH, NOTHING, GROUND)] == [1, 1, 0, 3]
    with page.expect_download() as response:
        page.click("#download-json")
    segments = json.loads(Path(response.value.path()).read_bytes())["segments_info"]
    assert response.value.suggested_filename == "drawn-panoptic.json"
    assert [segment["category_name"] for segment in segments] == [None, None, "grass"]


def test_a_photo_that_the_browser_cannot_decode_is_shown_as_the_service_decoded_it(
    page: Page, console_errors: list[str]
) -> None:
    photo = draw_photo("tiff", save_all=True, append_images=[Image.new("RGB", SIZE)])
    upload(page, photo)
    expect(page.locator("#warnings li")).to_contain_text(["only the first of 2 frames"])
    assert read_pixel(page, "photo", LEFT) == pytest.approx(PAPER, abs=BLEND_TOLERANCE)
    page.reload()
    page.route("**/v1/decode*", lambda route: route.abort())
    upload(page, photo)
    expect(page.locator("#warnings li")).to_contain_text(["cannot show", "only the first of 2 frames"])
    page.click("#show-masks")
    assert "ERR_FAILED" in console_errors.pop()
    assert read_pixel(page, "masks", LEFT) == list(segment_color(1, True))


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("suffix", "kind", "orientation"),
    [("jpeg", "exif", 6), ("jpeg", "xmp", 3), ("png", "exif", 8), ("webp", "xmp", 5), ("heif", "exif", 6)],
)
def test_a_turned_photo_is_shown_upright(page: Page, suffix: str, kind: str, orientation: int) -> None:
    if suffix == "heif":  # which Chromium cannot decode
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if kind == "exif" else {"xmp": XMP.format(orientation).encode()}
    image = Image.new("RGB", SIZE, PAPER)
    image.paste((20, 90, 160), (0, 0, SIZE[0] // 2, SIZE[1]))
    content = io.BytesIO()
    image.save(content, suffix, **options)
    upload(page, {"name": f"turned.{suffix}", "mimeType": f"image/{suffix}", "buffer": content.getvalue()})
    upright = decode_image(content.getvalue()).image
    height, width = upright.shape[:2]
    expect(page.locator("#photo-size")).to_have_text(f"{width} \N{MULTIPLICATION SIGN} {height}")
    expect(page.locator("#warnings li")).to_have_count(0)
    for x, y in ((width // 4, height // 4), (3 * width // 4, 3 * height // 4)):
        assert read_pixel(page, "photo", (x, y)) == pytest.approx(upright[y, x].tolist(), abs=6)  # JPEG


def test_a_sample_photo_is_segmented_by_a_click(page: Page) -> None:
    page.get_by_role("button", name="Coffee").click()
    page.locator("#segments li").first.wait_for()
    expect(page.locator("#photo-name")).to_have_text("coffee.jpg")
    expect(page.locator("#photo-size")).to_have_text("480 \N{MULTIPLICATION SIGN} 320")
    expect(page.locator("#samples")).to_be_hidden()


RANDOM = np.random.default_rng(2)
MASKS = {
    "empty": np.zeros((5, 7), bool),
    "full": np.ones((5, 7), bool),
    "last of a row": np.eye(1, 400, 399, dtype=bool),
    "chessboard": np.indices((9, 11)).sum(0) % 2 == 0,
    "disc": np.hypot(*(np.indices((600, 800)) - 300)) < 250,
    "sparse": RANDOM.random((37, 53)) < 0.1,
}


def test_the_rle_decoder_matches_pycocotools_and_samples_smaller_grids_at_pixel_centers(page: Page) -> None:
    for name, mask in MASKS.items():
        assert find_cells(page, mask, *mask.shape) == np.flatnonzero(mask).tolist(), name
    for height, width in ((20, 30), (37, 10), (1, 1), (50, 60)):
        rows = ((np.arange(height) + 0.5) * 37 / height).astype(int)
        columns = ((np.arange(width) + 0.5) * 53 / width).astype(int)
        expected = np.flatnonzero(MASKS["sparse"][np.ix_(rows, columns)])
        assert find_cells(page, MASKS["sparse"], height, width) == expected.tolist()


def test_segment_colors_match_the_services_overlay(page: Page) -> None:
    script = """async (ids) => {
        const { segmentColor } = await import(new URL("static/mask_canvas.js", document.baseURI));
        return ids.map((id) => [segmentColor(id, true), segmentColor(id, false)]);
    }"""
    ids = list(range(1, 500))
    expected = [[list(segment_color(each, True)), list(segment_color(each, False))] for each in ids]
    assert page.evaluate(script, ids) == expected
