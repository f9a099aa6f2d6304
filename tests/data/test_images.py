from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sclkern.data.images import decode_image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.stack([np.broadcast_to(x, (height, width))] * 3, axis=-1).copy())


def test_transparency_is_laid_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((1, 1), (255, 0, 0, 255))
    rgba.putpixel((2, 2), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 255, 0, 0, 127, 127, 127])
    palette.putpixel((1, 1), 1)
    palette.putpixel((2, 2), 2)
    for data in (
        encode(rgba),
        encode(rgba, "WEBP", lossless=True, exact=True),
        encode(palette, transparency=0),
    ):
        image = decode_image(data)
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 1)) == (255, 0, 0)
        assert image.getpixel((2, 2)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "CMYK"])
def test_modes(mode: str) -> None:
    image = decode_image(encode(gradient(8, 8).convert(mode), "TIFF" if mode == "CMYK" else "PNG"))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (0, 0, 0) and image.getpixel((7, 0)) == (255, 255, 255)


def test_sixteen_bit_grey() -> None:
    values = np.array([[0, 128 << 8, 255 << 8]], dtype=np.uint16)
    assert np.asarray(decode_image(encode(Image.fromarray(values))))[0, :, 1].tolist() == [0, 128, 255]


def test_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(encode(gradient(32, 16), "JPEG", exif=exif))
    assert image.size == (16, 32)
    assert image.getpixel((8, 0))[0] < 20 and image.getpixel((8, 31))[0] > 235


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_broken_files(kind: str) -> None:
    data = encode(Image.effect_noise((64, 64), 99).convert("RGB"), kind)
    assert decode_image(memoryview(data)).size == (64, 64)
    for broken in (data[: len(data) // 2], data[:10], b"", b"<html>404</html>"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode_image(broken)


@pytest.mark.parametrize("limit", [150, 100])
def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    data = encode(Image.new("RGB", (16, 16)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"it unfolds to 256 pixels, expected {limit} at most; shrink it"):
        decode_image(data)
