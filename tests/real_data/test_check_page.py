"""The page of ``sclkern data check`` in a headless Chromium: pictures are shown, texts of the data are not obeyed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from defective_data import HOSTILE, defective_records
from sclkern.cli import main
from sclkern.data.text import one_line

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_can_look_through_it(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "data").mkdir()
    defective_records(tmp_path / "data")
    file = tmp_path / "page.html"
    assert main(["data", "check", str(tmp_path / "data"), "--html", str(file), "--workers", "1"]) == 1
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_load_state("networkidle")
        assert tab.title() == f"Data of {tmp_path / 'data'}"
        widths = tab.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert widths == [32] * 5
        assert tab.locator("figure").count() == 5 and tab.locator("h1").count() == 1
        assert tab.locator("script").count() == tab.locator("figcaption b").count() == 0
        assert tab.locator("figure").first.locator("p").all_inner_texts() == [one_line(text) for text in HOSTILE]
        assert tab.locator("li").count() == 6 and tab.locator("details[open]").count() == 4
        tab.locator("summary").first.click()
        assert tab.locator("details[open]").count() == 3
        wide = tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert wide, "the page is wider than the window"
        tab.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        browser.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
