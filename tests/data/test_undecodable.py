from __future__ import annotations

import logging
import struct

import pytest
from PIL import Image

from sclkern.data.transforms import build_transform
from sclkern.data.undecodable import UndecodableImages, read_image
from sclkern.errors import UserError


def bad(*rows: int) -> dict[str, str]:
    return {f"t.arrow row {row}": "it is empty" for row in rows}


def test_one_percent_may_be_undecodable(caplog: pytest.LogCaptureFixture) -> None:
    first = UndecodableImages(1000)
    with caplog.at_level(logging.WARNING, "sclkern.data"):
        for _ in range(3):
            first.add(bad(0))
        first.add(bad(*range(10)))
    assert len(first) == 10
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped an image that cannot be decoded: t.arrow row {row} (it is empty)" for row in range(10)
    ]

    again = UndecodableImages(1000)
    again.load_state_dict(first.state_dict())
    for counter, reason in ((first, " (it is empty)"), (again, "")):
        counter.add(bad(3))
        with pytest.raises(UserError) as caught:
            counter.add(bad(11))
        assert str(caught.value) == (
            "11 of 1000 images cannot be decoded, expected 1 % at most, or one; the first is t.arrow row 0"
            f"{reason}; repair them and --resume, or remove them and start in another folder"
        )
    assert first.state_dict() == again.state_dict()


@pytest.mark.parametrize(("images", "limit"), [(1, 1), (6, 1), (20, 1), (199, 1), (200, 2), (1258, 12)])
def test_one_may_be_undecodable_in_any_case(images: int, limit: int) -> None:
    counter = UndecodableImages(images)
    counter.add(bad(*range(limit)))
    with pytest.raises(UserError, match=f"{limit + 1} of {images} images"):
        counter.add(bad(limit))


def test_names_of_the_data_stay_on_their_line(caplog: pytest.LogCaptureFixture) -> None:
    counter = UndecodableImages(2)
    with caplog.at_level(logging.WARNING, "sclkern.data"):
        counter.add({"t.arrow row 3 (100 %s\n\x1b[31mFATAL\u202e)": "broken"})
    (record,) = caplog.records
    assert "row 3 (100 %s \\x1b[31mFATAL\\u202e) (broken)" in record.getMessage()


class One:
    """A source of one image, or of an error."""

    num_images = 1

    def __init__(self, content: Image.Image | Exception) -> None:
        self.content = content

    def image(self, image: int) -> Image.Image:
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (15, 16), (16, 15)])
def test_an_image_smaller_than_a_patch_cannot_be_used(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"^the image is {size[0]} x {size[1]} pixels, smaller than a patch \(16\)$"):
        read_image(One(Image.new("RGB", size)), 0, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(16, 16), (16, 5000), (5000, 16)])
@pytest.mark.parametrize("transform", ["clip", "clip_randaug", "clip_test"])
def test_whatever_holds_a_patch_can_be_transformed(size: tuple[int, int], transform: str) -> None:
    decoded = read_image(One(Image.new("RGB", size)), 0, 16)  # type: ignore[arg-type]
    for _ in range(8):
        assert build_transform(transform, 32)(decoded).isfinite().all()


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        SyntaxError("broken PNG file"),
        struct.error("unpack"),
        KeyError("x"),
        Image.DecompressionBombError("b"),
    ],
)
def test_whatever_a_reader_raises_is_a_reason(error: Exception) -> None:
    with pytest.raises(ValueError, match=str(error) or "OSError"):
        read_image(One(error), 0, 16)  # type: ignore[arg-type]


def test_a_reader_must_give_rgb() -> None:
    with pytest.raises(ValueError, match="its mode is L, expected RGB"):
        read_image(One(Image.new("L", (40, 40))), 0, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NoneType"):
        read_image(One(None), 0, 16)  # type: ignore[arg-type]
