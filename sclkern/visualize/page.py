"""One page with all maps of a pair, which needs nothing else: point at a word or at the picture."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from sclkern.data.text import one_line
from sclkern.visualize.maps import WordMaps
from sclkern.visualize.overlay import OPACITY, colours

_HERE = Path(__file__).parent


def page(
    caption: str,
    words: Sequence[str],
    frames: Sequence[Image.Image],
    kinds: Mapping[str, WordMaps],
    facts: Mapping[str, str],
) -> str:
    """The page as HTML. It loads nothing, and every text of the data is shown, never obeyed.

    Args:
        caption: text of the picture.
        words: W names; the first stands for the whole text.
        frames: F pictures as they are shown, mode RGB.
        kinds: maps by name; the first is shown.
        facts: texts by name, listed below.

    Returns:
        A whole document.
    """
    shown = [one_line(word, 60) for word in words]
    first = next(iter(kinds.values()))
    data = {
        "words": shown,
        "frames": len(frames),
        "grid": first.to_image.shape[-1],
        "opacity": OPACITY,
        "colours": _base64(colours().tobytes()),
        "kinds": [{part: _numbers(numbers) for part, numbers in maps._asdict().items()} for maps in kinds.values()],
    }
    # "<" would end the script where a word is "</script>".
    embedded = json.dumps(data).replace("<", "\\u003c")
    title = escape(one_line(caption, 200))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{(_HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<h1 dir="auto">{title}</h1>
<div class="controls">
<fieldset><legend>Maps</legend>{_radios("kind", {str(i): name for i, name in enumerate(kinds)})}</fieldset>
<fieldset><legend>Direction</legend>{_radios("direction", {"to": "words to picture", "back": "picture to words"})}
</fieldset>
</div>
<p class="words" dir="auto">
{_buttons("word", shown)}
</p>
<output></output>
<div class="strip">
{_figures(frames)}
</div>
<p>Point at a word to see it over the picture, or at the picture to see a patch over the words; a click keeps it.</p>
<dl>
{"".join(f"<dt>{escape(name)}</dt><dd>{escape(one_line(text, 300))}</dd>" for name, text in facts.items())}
</dl>
<noscript>This page needs scripts; the PNG files beside it do not.</noscript>
<script id="data" type="application/json">{embedded}</script>
<script>{(_HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _radios(name: str, choices: Mapping[str, str]) -> str:
    return "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{"" if number else " checked"}>{escape(text)}</label>'
        for number, (value, text) in enumerate(choices.items())
    )


def _buttons(name: str, texts: Sequence[str]) -> str:
    return "\n".join(
        f'<button type="button" data-{name}="{i}"><bdi>{escape(text)}</bdi></button>' for i, text in enumerate(texts)
    )


def _figures(frames: Sequence[Image.Image]) -> str:
    figures = []
    for number, frame in enumerate(frames):
        stream = io.BytesIO()
        frame.save(stream, "JPEG", quality=90)
        name = f"CLS of frame {number + 1}" if len(frames) > 1 else "CLS of the picture"
        figures.append(
            f'<figure><div class="frame"><img alt="" width="{frame.width}" height="{frame.height}" '
            f'src="data:image/jpeg;base64,{_base64(stream.getvalue())}"><canvas></canvas></div>'
            f'<figcaption><button type="button" data-cls="{number}">{name}</button></figcaption></figure>'
        )
    return "\n".join(figures)


def _numbers(maps: Tensor) -> str:
    return _base64(maps.numpy().astype(np.dtype("<f4")).tobytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
