"""Maps drawn over pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

# Longer side of a picture that is drawn, in pixels: at least, and at most one alone, and each of a strip.
_LEAST, _ALONE, _IN_STRIP = 256, 640, 320
# Share of the colour at the largest value; nothing covers the picture where a map is 0.
OPACITY = 0.7


@cache
def colours() -> np.ndarray:
    """(256, 3) uint8, from 0 to the largest value of a map."""
    found: np.ndarray = (255 * matplotlib.colormaps["turbo"](np.arange(256))[:, :3]).round().astype(np.uint8)
    return found


def to_shown_size(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of the size in which they are drawn, with their ratio of sides."""
    width, height = frames[0].size
    longest = min(max(width, height, _LEAST), _ALONE if len(frames) == 1 else _IN_STRIP)
    factor = longest / max(width, height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return [frame if frame.size == size else frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]


def overlay(frames: Sequence[Image.Image], maps: Tensor) -> Image.Image:
    """Draw maps over the frames of a clip, side by side, or over one picture.

    Args:
        frames: F pictures of one size, mode RGB.
        maps: (F, G, G), 0 or more. The transform of the model keeps the whole picture, so a map covers all of it. The
            largest value of all frames has the last colour.

    Returns:
        The strip.
    """
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    peak = max(float(maps.max()), 1e-30)
    for number, (frame, heat) in enumerate(zip(frames, maps.float().numpy() / peak, strict=True)):
        smooth = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR)).clip(0, 1)
        colour = colours()[(255 * smooth).round().astype(np.uint8)]
        opacity = OPACITY * smooth[..., None]
        drawn = (1 - opacity) * np.asarray(frame) + opacity * colour
        strip.paste(Image.fromarray(drawn.round().astype(np.uint8)), (number * width, 0))
    return strip
