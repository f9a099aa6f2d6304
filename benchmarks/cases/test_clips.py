"""Four frames of a clip, from a file to arrays, on one core: ours, PyAV from the first frame on, and torchcodec.

All take turns in random order, in the processor's time of one thread. Before it is timed, each is compared with the
frames that PyAV gives when it decodes all.
"""

from __future__ import annotations

import io
import random
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from benchmarks.harness.photographs import photograph
from sclkern.data.frames import FrameSampling, decode_video

CHOOSE = FrameSampling(4, "midpoint")
FRAMES, ROUNDS = 250, 5
# Width, height and the most frames from one key frame to the next: 250 is x264's default, 12 that of many cameras.
FORMS = {"320x240/250": (320, 240, 250), "320x240/12": (320, 240, 12), "640x360/250": (640, 360, 250)}
OURS = "sclkern"
Load = Callable[[], list[np.ndarray]]


@pytest.mark.priority(3)
@pytest.mark.parametrize("form", FORMS)
def test_clips(record, tmp_path, form):
    width, height, group = FORMS[form]
    path = write(tmp_path / "clip.mp4", width, height, group)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ways = build_ways(path)
        expected = ways["PyAV, all frames"]()
        for name, load in ways.items():
            for frame, right in zip(load(), expected, strict=True):
                assert np.array_equal(frame, right), f"{name}: another frame, or other levels"
        seconds = take_turns(ways)
    finally:
        torch.set_num_threads(threads)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    others = {name: median for name, median in medians.items() if name != OURS}
    fastest = min(others, key=others.__getitem__)
    record(
        f"clips/{form}",
        rows=CHOOSE.num_frames,
        width=width,
        height=height,
        frames=FRAMES,
        clips_per_second={name: 1 / median for name, median in medians.items()},
        without=[] if "torchcodec" in ways else ["torchcodec"],
        fastest_other=fastest,
        faster_than_other=medians[fastest] / medians[OURS],
    )


def write(path: Path, width: int, height: int, group: int) -> Path:
    """A clip of a camera that moves over a photograph."""
    levels = photograph(width + 2 * FRAMES, height + FRAMES)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(group)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(FRAMES):
            cut = levels[number : number + height, 2 * number : 2 * number + width]
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(cut), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def build_ways(path: Path) -> dict[str, Load]:
    """Functions to the wanted frames of a clip, each (H, W, 3) uint8."""
    content = path.read_bytes()

    def all_frames() -> list[np.ndarray]:
        with av.open(io.BytesIO(content)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            wanted = set(CHOOSE(FRAMES))
            frames = enumerate(container.decode(video=0))
            return [frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted]

    ways: dict[str, Load] = {
        OURS: lambda: [np.asarray(frame) for frame in decode_video(io.BytesIO(content), CHOOSE)],
        "PyAV, all frames": all_frames,
    }
    if (decoder := torchcodec()) is not None:

        def by_torchcodec() -> list[np.ndarray]:
            video = decoder(content, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            return list(video.get_frames_at(CHOOSE(len(video))).data.numpy())

        ways["torchcodec"] = by_torchcodec
    return ways


@cache
def torchcodec() -> Any:
    """Its decoder; None where the package or the libraries of FFmpeg that it looks for are not installed."""
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"")
    except (ImportError, OSError):
        return None
    except Exception as error:  # that there is no video in it, or no library
        return None if "libtorchcodec" in str(error) else VideoDecoder
    return VideoDecoder


def take_turns(ways: dict[str, Load]) -> dict[str, list[float]]:
    """Processor's seconds of a clip, a round a number; those that warmed up have been left out."""
    order, seconds = random.Random(0), {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name in order.sample(list(ways), len(ways)):
            begin = time.thread_time()
            ways[name]()
            if turn:
                seconds[name].append(time.thread_time() - begin)
    return seconds
