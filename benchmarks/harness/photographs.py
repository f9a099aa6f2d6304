"""A photograph of any size: mirrored copies of matplotlib's, as detailed at its full size as the original."""

from __future__ import annotations

import io

import numpy as np
from matplotlib import cbook
from PIL import Image


def photograph(width: int, height: int, shift: int = 0) -> np.ndarray:
    """Levels (height, width, 3) uint8; a shift in pixels gives another cut of the same mosaic."""
    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        levels = np.asarray(image.convert("RGB"))
    pair = np.concatenate([levels, levels[:, ::-1]], axis=1)
    tile = np.concatenate([pair, pair[::-1]])
    down, across = -(-(height + shift) // tile.shape[0]), -(-(width + shift) // tile.shape[1])
    return np.tile(tile, (down, across, 1))[shift : shift + height, shift : shift + width].copy()


def jpeg(levels: np.ndarray, quality: int = 90, **options: object) -> bytes:
    """A JPEG of levels, of a quality that sets of photographs have."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def resample(levels: np.ndarray, size: int) -> np.ndarray:
    """The square (size, size, 3) of levels by Pillow's bicubic filter in float64, clipped once at the end."""
    down, across = (_weights(length, size) for length in levels.shape[:2])
    return np.clip(np.einsum("oh,hwc,pw->opc", down, levels.astype(np.float64), across, optimize=True), 0, 255)


def _weights(length: int, size: int) -> np.ndarray:
    scale = length / size
    stretch = max(scale, 1.0)
    weights = np.zeros((size, length))
    for place in range(size):
        centre = (place + 0.5) * scale
        first, last = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), length)
        x = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = np.where(x < 1, near, np.where(x < 2, far, 0))
        weights[place, first:last] = weight / weight.sum()
    return weights
