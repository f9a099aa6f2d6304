"""The page of ``sclkern visualize`` in a headless Chromium: pointed at, clicked, and not obeying the caption."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from exported_model import TOKENIZER
from PIL import Image

from sclkern import SCLModel
from sclkern.visualize.pair import read_pair
from sclkern.visualize.result import Visualization, visualize

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")
CAPTION = "a </script>&amp; 🤖"


@pytest.fixture
def clip(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (80, 60), (120, 120, 120)).save(folder / f"{number}.png")
    return folder


def shown(value: float) -> str:
    """A number as the page shows it: with the four digits of JavaScript's toPrecision."""
    return f"{value:#.4g}"


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_can_look_at_a_clip(exported: Path, clip: Path, tmp_path: Path, scheme: str) -> None:
    model = SCLModel.from_pretrained(exported / "clips")
    maps = visualize(model, read_pair(model.config, TOKENIZER, clip, CAPTION, 2))
    maps.save(tmp_path / "out", {"model": "<b>mine</b>"})
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme=scheme, viewport={"width": 900, "height": 800})
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((tmp_path / "out" / "index.html").as_uri())
        tab.wait_for_load_state("networkidle")
        look_through(tab, maps)
        wide = tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert wide, "the page is wider than the window"
        browser.close()
    # That warning is of what this test reads.
    assert [problem for problem in problems if not problem.startswith("Canvas2D: Multiple readback")] == []
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []


def look_through(tab: playwright.Page, maps: Visualization) -> None:
    words = [word for word, _ in maps.pair.words]
    assert tab.title() == tab.locator("h1").inner_text() == CAPTION
    assert tab.locator("[data-word]").all_inner_texts() == words == ["whole text", "a", "</script>&amp;", "🤖"]
    assert tab.locator("dd").all_inner_texts()[-1] == "<b>mine</b>" and tab.locator("img").count() == 2
    output, kinds = tab.locator("output"), list(maps.kinds.values())

    def painted(frame: int) -> list[int]:
        """Opacity of the map over the middle of each patch of a frame."""
        return tab.evaluate(
            """frame => {
            const canvas = document.querySelectorAll("canvas")[frame], found = [];
            const { width, height } = canvas, context = canvas.getContext("2d");
            for (let patch = 0; patch < 16; patch++) {
                const x = (patch % 4 + .5) * width / 4, y = (Math.floor(patch / 4) + .5) * height / 4;
                found.push(context.getImageData(Math.floor(x), Math.floor(y), 1, 1).data[3]);
            }
            return found; }""",
            frame,
        )

    def check_word(word: int, kind: int, heats: torch.Tensor) -> None:
        heat = heats[word]
        frame, patch = divmod(int(heat.flatten().argmax()), 16)
        at = f"row {patch // 4 + 1}, column {patch % 4 + 1} of frame {frame + 1}"
        back = "from" if heats is kinds[kind].from_image else "at"
        assert output.inner_text() == f"{words[word]}: largest {shown(heat.max().item())}, {back} {at}"
        assert max(painted(frame)) == painted(frame)[patch] > max(0, 0.6 * 255)
        expected = [255 * 0.7 * value / heat.max().item() for value in heat.flatten().tolist()]
        # Colours between the middles of patches are mixed.
        assert [*painted(0), *painted(1)] == pytest.approx(expected, abs=16)

    def check_words(frame: int, patch: int, values: torch.Tensor, name: str, direction: str) -> None:
        top = int(values.argmax())
        assert output.inner_text() == f"{name}: largest {shown(values[top].item())}, {direction} {words[top]}"
        titles = tab.eval_on_selector_all("[data-word]", "buttons => buttons.map(button => button.title)")
        assert [float(title) for title in titles] == pytest.approx(values.tolist(), rel=1e-3)
        colours = tab.eval_on_selector_all("[data-word]", "all => all.map(one => one.style.background)")
        assert len(set(colours)) > 1 and colours[top].endswith("0.7)")

    check_word(0, 0, kinds[0].to_image)
    for word in (2, 1):
        tab.locator("[data-word]").nth(word).hover()
        check_word(word, 0, kinds[0].to_image)
    # What was pointed at goes when the pointer leaves; what was clicked stays.
    tab.locator("h1").hover()
    check_word(0, 0, kinds[0].to_image)
    tab.locator("[data-word]").nth(3).click()
    tab.locator("h1").click()
    check_word(3, 0, kinds[0].to_image)
    assert tab.locator("button.pinned").all_inner_texts() == ["🤖"]
    for kind in range(len(kinds)):
        tab.locator("input[name=kind]").nth(kind).check()
        check_word(3, kind, kinds[kind].to_image)
    tab.locator("input[name=direction]").nth(1).check()
    check_word(3, len(kinds) - 1, kinds[-1].from_image)

    box = tab.locator("canvas").nth(1).bounding_box()
    assert box is not None
    # The third row and second column.
    tab.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.6 * box["height"])
    check_words(1, 9, kinds[-1].from_image[:, 1].flatten(1)[:, 9], "row 3, column 2 of frame 2", "to")
    assert not any(painted(0))
    tab.locator("input[name=direction]").nth(0).check()
    tab.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.6 * box["height"])
    check_words(1, 9, kinds[-1].to_image[:, 1].flatten(1)[:, 9], "row 3, column 2 of frame 2", "from")
    tab.locator("[data-cls]").nth(1).click()
    check_words(1, -1, kinds[-1].from_frames[:, 1], "CLS of frame 2", "to")
    tab.keyboard.press("Shift+Tab")
    assert tab.locator("button.shown").all_inner_texts() == ["CLS of frame 1"]
