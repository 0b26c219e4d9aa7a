"""The page in a real browser: it draws, streams, stops, redraws, looks inside, replays, and keeps the console empty."""

import json
import os
import shutil
from collections.abc import Iterator

import pytest
from serving import Gate, Running, wait_until
from tiny_bundle import tiny_pipeline

from smalti.image_files import RECEIPT, read_receipt

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")
CAPTION = "dark green eight on bright cyan"


def chromium() -> str:
    """The browser that SMALTI_CHROMIUM names, or one on PATH."""
    found = os.environ.get("SMALTI_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("needs a Chromium: on PATH, or where SMALTI_CHROMIUM says")
    return found


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def server() -> Iterator[Running]:
    with Running(tiny_pipeline()) as running:
        yield running


@pytest.fixture
def page(browser, server):
    """The open page; fails if the console said anything, or anything was asked of another server."""
    said: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(60_000)
    answered = "Failed to load resource: the server responded with a status of 400"  # by the browser itself
    page.on("console", lambda message: message.text.startswith(answered) or said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda one: one.url.startswith((server.address, "data:")) or said.append(one.url))
    page.goto(server.address)
    page.locator("#model option").first.wait_for(state="attached")
    page.fill("#prompt", CAPTION)
    yield page
    page.close()
    assert said == []


def receipt_of(page) -> dict:
    page.locator("#receipt-box").wait_for()
    return json.loads(page.locator("#receipt").text_content())


def test_a_prompt_paints_itself_and_is_the_librarys_picture(page, server, tmp_path):
    seen = []
    page.expose_function("seen", lambda source: seen.append(source))
    page.evaluate("new MutationObserver(() => seen(picture.src)).observe(picture, {attributeFilter: ['src']})")
    page.fill("#seed", "5")
    page.click("#draw")
    receipt = receipt_of(page)
    assert len(set(seen)) > 10, "it did not come bit by bit"
    [expected] = server.pipes["tiny"].generate(CAPTION, seed=5)
    assert receipt == {**json.loads(expected.info[RECEIPT]), "executor": "packed"}
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "eight.png")
    assert read_receipt(tmp_path / "eight.png") == receipt
    page.set_input_files("#file", tmp_path / "eight.png")
    page.get_by_text("Identical, code by code").wait_for()


def test_several_pictures_come_side_by_side(page, server):
    page.fill("#n", "3")
    page.click("#draw")
    page.get_by_role("button", name="Picture 3, seed 2").click()
    assert receipt_of(page)["seed"] == 2
    assert page.get_by_role("button", name="Picture 3, seed 2").get_attribute("aria-pressed") == "true"


def test_stop_frees_the_rows(page, server):
    gate = Gate(server.worker)
    page.click("#draw")
    wait_until(lambda: server.worker.pending == 1)
    gate.let(2)
    assert server.worker.rows_in_use > 0
    page.click("#stop")
    wait_until(lambda: server.worker.rows_in_use == 0)
    page.get_by_text("Stopped.").wait_for()
    gate.is_open = True


def test_cells_are_marked_by_keyboard_and_redrawn(page):
    page.click("#draw")
    before = receipt_of(page)["codes"]
    page.get_by_text("Mark to redraw").click()
    page.locator("#cells button").first.focus()
    for key in ("ArrowDown", "ArrowRight", "Enter", "ArrowRight", " "):
        page.keyboard.press(key)
    assert page.get_by_role("button", name="Row 2, column 3").get_attribute("aria-pressed") == "true"
    page.click("#redraw")
    page.get_by_text("Done in").wait_for()
    playwright.expect(page.locator("#receipt")).to_contain_text("redrawn", timeout=60_000)
    after = receipt_of(page)
    assert after["redrawn"] == [8, 9]
    assert [i for i in range(49) if after["codes"][i] != before[i]] in ([], [8], [9], [8, 9])


def test_a_click_tells_what_could_have_stood_there(page):
    page.click("#draw")
    receipt_of(page)
    page.get_by_role("button", name="Row 4, column 3", exact=True).click()
    page.locator("#alternatives li.drawn").wait_for()
    assert page.locator("#where").text_content() == "What could stand in row 4, column 3"
    assert page.locator("#words span").all_text_contents() == CAPTION.split()


def test_an_error_is_told(page):
    page.fill("#prompt", "mauve eight")
    with page.expect_response("**/generations") as response:
        page.click("#draw")
    assert response.value.status == 400
    page.get_by_role("alert").get_by_text("mauve").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_and_everything_has_a_name(browser, server, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(server.address)
    page.locator("#model option").first.wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    snapshot = page.locator("body").aria_snapshot()
    for name in ('textbox "Prompt"', 'combobox "Model"', 'button "Draw"', 'slider "Guidance'):
        assert name in snapshot
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, a, select, textarea')]"
        ".filter(one => !one.textContent.trim() && !one.ariaLabel && !one.labels?.length).map(one => one.outerHTML)"
    )
    assert nameless == []
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, light[4:-1].split(","))) > 380) == (scheme == "light")
    page.close()
