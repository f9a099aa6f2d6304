"""Every kind of picture is decoded to what viewers show. The right values are computed here, not by Pillow."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from image_files import GREY_ALPHA, PALETTE, RGB, RGB_ALPHA, bitmap, netpbm, png, targa, tiff
from sclkern.data.images import decode_image

GREY = np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)
HIGH = GREY >> 8
COLOUR = np.stack([GREY, GREY[::-1], GREY // 2], -1)
ALPHA = np.ascontiguousarray(GREY.T).reshape(40, 60)
NOISE = np.random.default_rng(0)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_shows(data: bytes, expected: np.ndarray, tolerance: float = 0) -> None:
    image = decode_image(data)
    assert image.mode == "RGB"
    shown = np.asarray(image).astype(float)
    expected = np.repeat(expected[..., None], 3, -1) if expected.ndim == 2 else expected
    np.testing.assert_allclose(shown, expected, atol=tolerance, rtol=0)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] if colour.ndim == 3 else alpha
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png_with_and_without_a_transparent_level(bits: int) -> None:
    samples = GREY.astype(int) >> (16 - bits)
    levels = HIGH if bits == 16 else samples * 255 // (2**bits - 1)
    assert_shows(png(samples, bits), levels)
    for key in {0, 2**bits // 2 - 1, 2**bits - 1, int(samples[20, 5])}:
        expected = np.where(samples == key, 255, levels)
        assert_shows(png(samples, bits, tRNS=struct.pack(">H", key)), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_rgb_png_with_and_without_a_transparent_colour(bits: int) -> None:
    samples = COLOUR.astype(int) >> (16 - bits)
    # Darker than the transparent colour by what 8 bits do not show: this pixel stays.
    samples[5, 5] = samples[3, 7] - (bits == 16)
    levels = samples >> (bits - 8)
    assert_shows(png(samples, bits, RGB), levels)
    key = struct.pack(">HHH", *samples[3, 7].tolist())
    expected = np.where((samples == samples[3, 7]).all(-1, keepdims=True), 255, levels)
    assert (expected[5, 5] == 255).all() == (bits == 8)
    assert_shows(png(samples, bits, RGB, tRNS=key), expected)


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_interlaced_png(bits: int) -> None:
    samples = GREY.astype(int) >> (16 - bits)
    levels = HIGH if bits == 16 else samples * 255 // (2**bits - 1)
    key = int(samples[20, 5])
    assert_shows(png(samples, bits, interlaced=True), levels)
    keyed = png(samples, bits, interlaced=True, tRNS=struct.pack(">H", key))
    assert_shows(keyed, np.where(samples == key, 255, levels))
    if bits >= 8:
        colour = COLOUR.astype(int) >> (16 - bits)
        keyed = png(colour, bits, RGB, interlaced=True, tRNS=struct.pack(">HHH", *colour[3, 7].tolist()))
        same = (colour == colour[3, 7]).all(-1, keepdims=True)
        assert_shows(keyed, np.where(same, 255, colour >> (bits - 8)))


@pytest.mark.parametrize("bits", [8, 16])
def test_alpha_is_laid_on_white(bits: int) -> None:
    grey, colour, alpha = (x.astype(int) >> (16 - bits) for x in (GREY, COLOUR, ALPHA))
    share, full = alpha / (2**bits - 1), 255 / (2**bits - 1)
    assert_shows(png(np.dstack([grey, alpha]), bits, GREY_ALPHA), on_white(grey * full, share), 3)
    assert_shows(png(np.dstack([colour, alpha]), bits, RGB_ALPHA), on_white(colour * full, share), 3)
    kind = np.uint8 if bits == 8 else np.uint16
    for order in "<>":
        straight = np.dstack([colour, alpha]).astype(kind)
        multiplied = np.dstack([colour * share[..., None], alpha]).round().astype(kind)
        assert_shows(tiff(straight, 2, order=order, extra=2), on_white(colour * full, share), 3)
        assert_shows(tiff(multiplied, 2, order=order, extra=1), on_white(colour * full, share), 4)
        assert_shows(tiff(straight, 2, order=order, extra=0), colour >> (bits - 8))
    if bits == 8:
        assert_shows(tiff(np.dstack([grey, alpha]).astype(kind), extra=2), on_white(grey, share), 2)


def test_palettes() -> None:
    palette = NOISE.integers(0, 256, (256, 3)).astype(np.uint8)
    alpha = NOISE.integers(0, 256, 256).astype(np.uint8)
    assert_shows(png(HIGH, 8, PALETTE, PLTE=palette.tobytes()), palette[HIGH])
    keyed = png(HIGH, 8, PALETTE, PLTE=palette.tobytes(), tRNS=alpha[:200].tobytes())
    share = np.concatenate([alpha[:200] / 255, np.ones(56)])
    assert_shows(keyed, on_white(palette[HIGH].astype(float), share[HIGH]), 1)
    for bits in (1, 2, 4):
        index = HIGH >> (8 - bits)
        one = png(index, bits, PALETTE, PLTE=palette[: 2**bits].tobytes(), tRNS=b"\xff\0")
        assert_shows(one, np.where((index == 1)[..., None], 255, palette[index]))


@pytest.mark.parametrize("scale", [257, 1], ids=["16 bits", "8 bits, as some programs wrote"])
def test_tiff_palettes(scale: int) -> None:
    palette = NOISE.integers(0, 256, (256, 3))
    index = HIGH.astype(np.uint8)
    assert_shows(tiff(index, 3, tag_320=scale * palette.T), palette[index])
    with_alpha = np.stack([index, ALPHA >> 8], -1).astype(np.uint8)
    shown = on_white(palette[index].astype(float), with_alpha[..., 1] / 255)
    assert_shows(tiff(with_alpha, 3, extra=2, tag_320=scale * palette.T), shown, 1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiff(order: str) -> None:
    assert_shows(tiff(GREY, order=order), HIGH)
    assert_shows(tiff(HIGH.astype(np.uint8), order=order), HIGH)
    assert_shows(tiff(HIGH.astype(np.uint8), 0, order=order), 255 - HIGH)
    if order == "<":  # Pillow knows no big-endian one
        assert_shows(tiff(GREY, 0, order=order), 255 - HIGH)
    assert_shows(tiff(COLOUR, 2, order=order), COLOUR >> 8)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_grey_tiff_that_is_compressed(compression: str, kind: str) -> None:
    assert_shows(encode(Image.fromarray(GREY.astype(kind)), "TIFF", compression=compression), HIGH)


def test_grey_tiff_of_twelve_bits() -> None:
    pairs = (GREY >> 4).reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    assert_shows(tiff(GREY, bits=12, content=packed.astype(np.uint8).tobytes()), HIGH)


@pytest.mark.parametrize("maximum", [1, 100, 255, 4095, 65535])
def test_netpbm(maximum: int) -> None:
    grey, colour = (np.round(x / 65535 * maximum).astype(int) for x in (GREY, COLOUR))
    # Whether 8 bits are the rounded value or the high byte is Pillow's choice.
    assert_shows(netpbm("P5", grey, maximum), grey / maximum * 255, 1)
    assert_shows(netpbm("P6", colour, maximum), colour / maximum * 255, 1)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
@pytest.mark.parametrize("bare", [False, True])
def test_grey_jpeg_2000(bare: bool) -> None:
    assert_shows(encode(Image.fromarray(GREY), "JPEG2000", irreversible=False, no_jp2=bare), HIGH)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_grey_jpeg_2000_of_twelve_bits() -> None:
    twelve = GREY >> 4
    # The code stream holds samples less half their range, so a change of the bits in its header moves the range.
    around_half = Image.fromarray((2**15 - 2**11 + twelve).astype(np.uint16))
    data = bytearray(encode(around_half, "JPEG2000", irreversible=False, no_jp2=True))
    assert data[42] == 15
    data[42] = 11
    assert_shows(bytes(data), HIGH)


UNIT = (GREY / 65535).astype(np.float32)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("samples", "sample_format"),
    [
        (UNIT, 3),
        (255 * UNIT, 3),
        (UNIT.astype(np.float64), 3),
        (GREY.astype(np.uint32), None),
        (GREY.astype(np.int32), 2),
        (GREY.astype(np.int16), 2),
        (HIGH.astype(np.int8), 2),
    ],
)
def test_grey_without_an_agreed_scale_is_refused(order: str, samples: np.ndarray, sample_format: int | None) -> None:
    with pytest.raises(ValueError, match=r"has no agreed black and white|Pillow reads no such file"):
        decode_image(tiff(samples, order=order, sample_format=sample_format))


@pytest.mark.parametrize(("kind", "mode"), [("TIFF", "F"), ("TIFF", "I"), ("SPIDER", "F")])
def test_grey_that_pillow_writes_without_a_scale_is_refused(kind: str, mode: str) -> None:
    samples = UNIT if mode == "F" else GREY.astype(np.int32)
    with pytest.raises(ValueError, match=f"in a {kind} file has no agreed black and white, expected 8 or 16 bits"):
        decode_image(encode(Image.fromarray(samples), kind))


def inks() -> np.ndarray:
    """CMYK (48, 64, 4) in four fields."""
    fields = np.array([[[255, 0, 0, 0], [0, 200, 100, 0]], [[10, 20, 30, 100], [0, 0, 0, 255]]], np.uint8)
    return fields.repeat(24, 0).repeat(32, 1)


def test_cmyk() -> None:
    ink = inks()
    shown = 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    jpeg = encode(Image.frombytes("CMYK", (64, 48), ink.tobytes()), "JPEG", quality=100, subsampling=0)
    adobe = jpeg.find(b"\xff\xee")
    assert_shows(tiff(ink, 5), shown, 1)
    assert_shows(jpeg, shown, 3)
    # Without Adobe's marker browsers take the inks as inverted too.
    assert_shows(jpeg[:adobe] + jpeg[adobe + 16 :], shown, 3)


def test_ycck() -> None:
    ink = inks().astype(float)
    c, m, y, k = np.moveaxis(ink, -1, 0)
    luma = 0.299 * c + 0.587 * m + 0.114 * y
    stored = np.stack([luma, 128 + (y - luma) / 1.772, 128 + (c - luma) / 1.402, 255 - k], -1).round().clip(0, 255)
    # Pillow stores 255 minus what it is given; the last byte of Adobe's marker then says what that means.
    image = Image.frombytes("CMYK", (64, 48), (255 - stored).astype(np.uint8).tobytes())
    jpeg = bytearray(encode(image, "JPEG", quality=100, subsampling=0))
    jpeg[jpeg.find(b"\xff\xee") + 15] = 2
    assert_shows(bytes(jpeg), 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255), 4)


def test_ycbcr_tiff() -> None:
    y, b, r = HIGH.astype(float), 255.0 - HIGH, HIGH // 2 + 60.0
    rgb = [y + 1.402 * (r - 128), y - 0.344136 * (b - 128) - 0.714136 * (r - 128), y + 1.772 * (b - 128)]
    data = tiff(np.stack([y, b, r], -1).astype(np.uint8), 6, tag_530=1)
    if Image.open(io.BytesIO(data)).mode == "YCbCr":
        assert_shows(data, np.clip(np.stack(rgb, -1), 0, 255), 2)
    else:  # it would read on into what follows, here zeros
        with pytest.raises(ValueError, match="this Pillow takes YCbCr"):
            decode_image(data + bytes(len(data)))


def test_lab_tiff() -> None:
    lightness, a, b = 60 + HIGH // 3, HIGH.astype(int) // 16 - 8, ALPHA.astype(int) // 4096 - 8
    fy = (lightness / 2.55 + 16) / 116
    # D50, to linear sRGB adapted by Bradford, to sRGB.
    xyz = np.stack([0.9642 * (fy + a / 500) ** 3, fy**3, 0.8249 * (fy - b / 200) ** 3], -1)
    matrix = np.array([[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]])
    linear = xyz @ matrix.T
    assert linear.min() > 0.0031308 and linear.max() < 1
    assert_shows(
        tiff(np.stack([lightness, a & 255, b & 255], -1).astype(np.uint8), 8), 269.025 * linear ** (1 / 2.4) - 14.025, 3
    )


@pytest.mark.parametrize("kind", ["BMP", "BMP 4", "BMP 5", "TGA"])
def test_alpha_that_is_zero_everywhere_is_unused(kind: str) -> None:
    colour = COLOUR >> 8
    write = {"BMP": bitmap, "BMP 4": lambda x: bitmap(x, header=108), "BMP 5": lambda x: bitmap(x, header=124)}
    samples = np.dstack([colour[..., ::-1], np.zeros_like(HIGH)])
    assert_shows(write.get(kind, targa)(samples), colour)
    samples[..., 3] = ALPHA >> 8
    expected = colour if kind == "BMP" else on_white(colour, samples[..., 3] / 255)
    assert_shows(write.get(kind, targa)(samples), expected, 1)


def frames(kind: str, count: int) -> bytes:
    images = [
        Image.fromarray((COLOUR >> 8).astype(np.uint8) if i == 0 else np.full((40, 60, 3), i, np.uint8))
        for i in range(count)
    ]
    if kind == "GIF":
        images = [image.quantize(64) for image in images]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encode(images[0], kind, **({"save_all": True, "append_images": images[1:]} if count > 1 else {}), **lossless)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    one, several = decode_image(frames(kind, 1)), decode_image(frames(kind, 3))
    assert np.array_equal(np.asarray(one), np.asarray(several)) and np.asarray(one).std() > 20


def test_gif_with_a_transparent_index() -> None:
    image = Image.fromarray(HIGH.astype(np.uint8))
    assert_shows(encode(image, "GIF", transparency=7), np.where(HIGH == 7, 255, HIGH))


@pytest.mark.parametrize("transparent", [None, 0, 3])
def test_gif_whose_first_frame_is_smaller_than_the_picture(transparent: int | None) -> None:
    image = Image.new("P", (10, 6), 3)
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 10, 20, 30])
    data = bytearray(encode(image, "GIF", **({} if transparent is None else {"transparency": transparent})))
    data[6:10] = struct.pack("<HH", 30, 20)
    start = data.index(b"\x2c")
    data[start + 1 : start + 5] = struct.pack("<HH", 8, 5)
    expected = np.full((20, 30, 3), 255)
    if transparent != 3:
        expected[5:11, 8:18] = (10, 20, 30)
    assert_shows(bytes(data), expected)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif() -> None:
    image = Image.fromarray((COLOUR >> 8).astype(np.uint8))
    assert_shows(encode(image, "AVIF", quality=100, subsampling="4:4:4"), COLOUR >> 8, 6)
