"""The report in Debian's Chromium: it asks nothing of the network, filters, and no text in it does anything."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from minivlm.config import Config
from minivlm.evaluation.heatmap import overlay, png_uri
from minivlm.evaluation.report import write_report
from tests.browser import chromium
from tests.evaluations import save_evaluation, scored

HOSTILE = "</td><script>window.hit = 1</script><img src='http://evil.example/a.png' onerror='window.hit = 2'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    picture = folder / "red.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    rows = [
        scored(i, "colour", "red" if i % 3 else HOSTILE, "red", picture, question=f"Which colour {i}?")
        for i in range(12)
    ]
    rows += [scored(20 + i, "数数", str(i % 2), "1", picture, question="几个红色？", language="zh") for i in range(12)]
    rows += [scored(40, HOSTILE, "yes", HOSTILE, picture, question=HOSTILE, language="en")]
    heat = png_uri(overlay(np.zeros((8, 8, 3), np.uint8), np.eye(2)))
    folders = [
        save_evaluation(folder / name, name, rows, attention={0: {"overlays": [heat], "share": 0.5}})
        for name in ("sft", HOSTILE)
    ]
    return write_report(Config(storage_path=folder), folders, folder / "report.html")


@pytest.fixture(scope="module")
def page(report: Path) -> Iterator[Page]:
    with chromium() as browser:
        page = browser.new_page()
        page.asked, page.problems = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        page.goto(report.as_uri())
        yield page


def shown(page: Page) -> list[str]:
    return page.locator("#samples > tr:visible").evaluate_all("rows => rows.map(row => row.dataset.outcome)")


def test_nothing_is_asked_of_the_network_and_hostile_text_is_inert(page: Page, report: Path) -> None:
    page.wait_for_timeout(200)
    assert [url for url in page.asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.problems == []
    assert page.evaluate("window.hit") is None
    assert page.locator("#samples script, #samples img:not([src^='data:'])").count() == 0
    assert HOSTILE in page.locator("#board").inner_text()
    assert page.locator("#samples").get_by_text(HOSTILE, exact=True).count() >= 2
    sizes = page.locator("#samples img, #looked img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert min(sizes, default=0) > 0


def test_failures_stand_first(page: Page) -> None:
    outcomes = shown(page)
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {"wrong", "right"}


def test_filters_keep_what_they_say(page: Page) -> None:
    everything = len(shown(page))
    page.get_by_label("right or wrong").select_option("right")
    assert set(shown(page)) == {"right"}
    page.get_by_label("right or wrong").select_option("")
    page.get_by_label("language").select_option("zh")
    chinese = page.locator("#samples > tr:visible .tag").all_inner_texts()
    assert set(chinese) == {"数数 · zh"}
    page.get_by_label("task", exact=True).select_option("colour")
    assert shown(page) == []
    page.get_by_label("language").select_option("")
    page.get_by_label("find in questions and answers").fill("WHICH COLOUR 3?")
    assert shown(page) == ["wrong"]
    assert page.locator("#count").inner_text() == f"1 of {everything} shown"
