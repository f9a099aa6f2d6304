"""A source of clips for tests: frames of one colour, which ``data.format=coloured_clips:ColouredClips`` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


class ColouredClips:
    """``root`` is a folder of any content; the only table is the number of clips."""

    def __init__(self, root: Path | str, tables: Sequence[str], split: str | None) -> None:
        self.num_images = self.num_pairs = int(tables[0])
        self.pair_image = self.pair_group = np.arange(self.num_pairs)

    def caption(self, pair: int) -> str:
        return f"clip number {pair}"

    def image(self, image: int) -> Image.Image:
        return self.frames(image, lambda count: [count // 2])[0]

    def frames(self, image: int, choose: Callable[[int], Sequence[int]]) -> list[Image.Image]:
        return [Image.new("RGB", (40, 40), (9 * image % 256, 20 * frame, 99)) for frame in choose(3 + image % 9)]

    def image_name(self, image: int) -> str:
        return f"clip {image}"
