"""Pictures are turned as their EXIF block says, in every format; a broken block turns nothing and loses nothing."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, features

from image_files import png, tiff
from sclkern.data.images import decode_image

STORED = np.array([[50, 100], [150, 200]], np.uint8).repeat(20, 0).repeat(30, 1)
# By the definition: on which side of the shown picture the first row and the first column of the stored one lie.
SHOWN = {
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: STORED.T,
    6: STORED.T[:, ::-1],
    7: STORED.T[::-1, ::-1],
    8: STORED.T[::-1],
}
OPTIONS = {"JPEG": {"quality": 100}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}


def exif(*entries: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
    """A block of entries (tag, type, count, value of four bytes)."""
    body = b"".join(struct.pack(">HHI", tag, kind, number) + value for tag, kind, number, value in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries) if count is None else count) + body + bytes(4)


def write(kind: str, block: bytes) -> bytes:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    Image.fromarray(STORED).convert("RGB").save(buffer, kind, exif=block, **OPTIONS[kind])
    return buffer.getvalue()


def assert_shows(data: bytes, expected: np.ndarray) -> None:
    shown = np.asarray(decode_image(data)).astype(int)
    assert shown.shape == (*expected.shape, 3)
    assert abs(shown - expected[..., None]).max() <= 4


def orientation(value: int) -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, struct.pack(">HH", value, 0))


@pytest.mark.parametrize("value", range(10))
def test_all_orientations_in_all_formats(value: int) -> None:
    expected = SHOWN.get(value, STORED)
    for kind in OPTIONS:
        if kind != "AVIF" or (value in SHOWN and features.check("avif")):
            assert_shows(write(kind, exif(orientation(value))), expected)
    deep = STORED.astype(np.uint16) * 257
    for order in "<>":
        assert_shows(tiff(STORED, order=order, tag_274=value), expected)
        assert_shows(tiff(deep, order=order, tag_274=value), expected)
    keyed = png(deep, 16, tRNS=struct.pack(">H", 50 * 257), eXIf=exif(orientation(value))[6:])
    assert_shows(keyed, np.where(expected == 50, 255, expected))


BROKEN = {
    "no content": b"Exif\0\0",
    "cut short": b"Exif\0\0II*\0",
    "no TIFF": b"Exif\0\0garbage, not a TIFF header",
    "more entries than there are": exif(orientation(1), count=60000),
    "orientation of text": exif((0x0112, 2, 4, b"abcd")),
    "two orientations": exif((0x0112, 3, 2, struct.pack(">HH", 6, 6))),
    "an offset beyond the end": exif((0x010F, 2, 400, b"\xff\xff\xff\xff"), (0x8769, 4, 1, b"\xff\xff\xff\xff")),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", BROKEN.values(), ids=BROKEN)
def test_a_broken_block_is_overlooked(kind: str, block: bytes) -> None:
    data = write(kind, block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = np.asarray(decode_image(data)).astype(int)
    two = block == BROKEN["two orientations"] and shown.shape[0] != STORED.shape[0]
    assert abs(shown - (SHOWN[6] if two else STORED)[..., None]).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_beside_a_broken_entry_counts(kind: str) -> None:
    block = exif(orientation(6), (0x8769, 4, 1, b"\xff\xff\xff\xff"))
    assert_shows(write(kind, block), SHOWN[6])
