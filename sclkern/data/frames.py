"""Frames of clips: which of them are read, and decoding of video files and folders of frames."""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Literal

import av
import torch
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

from sclkern.data.files import DataFolder
from sclkern.data.images import decode_image
from sclkern.data.text import one_line

Choose = Callable[[int], Sequence[int]]
Sampling = Literal["segments", "uniform", "midpoint"]
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
# Formats that hold one picture: FFmpeg takes a picture with the name of a clip for a clip of one frame.
_STILL = ("image2", "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe")


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a clip are read.

    - "segments": one random frame of each of F equal segments (TSN), as the published code trains.
    - "uniform": equally spaced from the first frame to the last, as the published code tests; LSMDC always.
    - "midpoint": the middle of each of F equal segments, as Frozen and its successors test.

    A clip of fewer than F frames gives some of them more than once.

    Attributes:
        num_frames: F.
        method: one of the three.
    """

    num_frames: int
    method: Sampling = "uniform"

    def __call__(self, count: int) -> list[int]:
        """Choose frames; "segments" draws from torch's default generator.

        Args:
            count: frames of the clip, at least 1.

        Returns:
            F indices in ``[0, count)``, ascending.
        """
        frames = self.num_frames
        if self.method == "uniform":
            # In integers, because numpy's linspace may end a little below a whole number.
            return [index * (count - 1) // max(frames - 1, 1) for index in range(frames)]
        starts = [index * count // frames for index in range(frames + 1)]
        # The last frame of each segment; a segment without a frame takes the one that it begins in.
        lasts = [max(start, end - 1) for start, end in pairwise(starts)]
        if self.method == "midpoint":
            return [(start + last) // 2 for start, last in zip(starts, lasts, strict=False)]
        return [start + int(torch.randint(last - start + 1, ())) for start, last in zip(starts, lasts, strict=False)]


def middle(count: int) -> list[int]:
    """Choose the middle frame, which stands for a clip where people look at one picture."""
    return [count // 2]


def read_frames(folder: DataFolder, name: str, choose: Choose) -> list[Image.Image]:
    """Read frames of a clip.

    Args:
        folder: of the data.
        name: a video file, or a folder of frames, which may end in "/".
        choose: gives the indices of the frames that are wanted, ascending, for the number of frames.

    Returns:
        The frames, mode RGB; one that is wanted twice is there twice.

    Raises:
        ValueError: the clip is missing, or has no frame that can be decoded.
    """
    if name.endswith("/") or folder.is_dir(name):
        return _of_folder(folder, name.rstrip("/"), choose)
    with folder.open(name) as file:
        return decode_video(file, choose)


def _of_folder(folder: DataFolder, name: str, choose: Choose) -> list[Image.Image]:
    names = [file for file in folder.names_in(name) if file.lower().endswith(_PICTURES)]
    if not names:
        raise ValueError("the folder has no frame: no JPEG, PNG, WebP or BMP")
    names.sort(key=_natural)
    wanted = choose(len(names))
    decoded = {index: decode_image(folder.read(f"{name}/{names[index]}")) for index in dict.fromkeys(wanted)}
    return frames_of_one_size([decoded[index] for index in wanted])


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts frame 2 before frame 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def decode_video(file: BinaryIO, choose: Choose) -> list[Image.Image]:
    """Decode frames of a video, in the order in which they are shown.

    Packets are counted first, which decodes nothing. Then each frame is decoded from the key frame before it, without
    those that no other frame is predicted from. Where a file does not say when its frames are shown, or says it
    wrongly, it is decoded from its beginning, with one frame in memory beside the wanted ones. Frames are turned
    upright; the shape of pixels is not applied, as readers of videos do.

    Args:
        file: can seek.
        choose: as in ``read_frames``.

    Returns:
        The frames, mode RGB.

    Raises:
        ValueError: there is no video, or no frame that can be decoded.
    """
    try:
        with _opened(file) as (container, stream):
            times, keys = _times(container, stream)
            if times is not None:
                wanted = choose(len(times))
                found = _at(container, stream, [times[index] for index in wanted], keys)
        if times is not None:
            if found is not None:
                return frames_of_one_size([found[times[index]] for index in wanted])
            return _one_after_another(file, wanted, len(times))
        with _opened(file) as (container, stream):
            count = sum(1 for _ in _decoded(container, stream))
        return _one_after_another(file, choose(count) if count else [], count)
    except av.FFmpegError as error:
        reason = one_line(error.strerror or str(error), 200)
        raise ValueError(f"the video cannot be decoded: {reason}") from error


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    if not file.seek(0, io.SEEK_END):
        raise ValueError("the file is empty")
    file.seek(0)
    with av.open(file) as container:
        # A cover is a stream of one picture, which may come before the video.
        videos = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
        if not videos:
            raise ValueError("the file has no video stream")
        stream = videos[0]
        if container.format.name in _STILL:
            raise ValueError(f"the file is a picture ({container.format.name}), expected a video")
        # Workers have a core each; more threads would wait for one another.
        stream.codec_context.thread_count = 1
        yield container, stream


def _times(container: Any, stream: Any) -> tuple[list[int] | None, list[int]]:
    """When each frame is shown, and each key frame, ascending, from the packets; None where the file does not say it of
    all frames."""
    times: list[int] = []
    keys: list[int] = []
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                if packet.pts is None:
                    return None, []
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
    except av.FFmpegError:
        pass  # cut short: what came before can be used
    return (sorted(times) if times and len(set(times)) == len(times) else None), sorted(keys)


def _decoded(container: Any, stream: Any, times: Collection[int] | None = None) -> Iterator[VideoFrame]:
    """Frames up to the end, or to where the file is broken: all of them, or those of these times and whatever they and
    later ones are predicted from."""
    try:
        for packet in container.demux(stream):
            if not packet.size and packet.dts is not None:
                continue  # Theora's sign that the frame before goes on being shown; the end of the file has no time
            if times is not None:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
            yield from packet.decode()
    except (av.FFmpegError, EOFError):
        return


def _at(container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int]) -> dict[int, Image.Image] | None:
    """Frames by the times at which they are shown; None where one does not come when its packet says."""
    found: dict[int, Image.Image] = {}
    formatter = VideoReformatter()
    frames: Iterator[VideoFrame] = iter(())
    position: int | None = None
    for time in dict.fromkeys(wanted):
        # To seek back to a key frame that was decoded before would decode what follows it again.
        before = bisect_right(keys, time)
        if position is None or time <= position or (before and keys[before - 1] > position):
            container.seek(time, stream=stream, backward=True, any_frame=False)
            frames = _decoded(container, stream, wanted)
        for frame in frames:
            position = frame.pts
            if position is None or position > time:
                return None
            if position == time:
                found[time] = _picture(frame, formatter)
                break
        else:
            return None
    return found


def _one_after_another(file: BinaryIO, wanted: Sequence[int], count: int) -> list[Image.Image]:
    """Frames by their number, decoded from the first on; where half of them come, the last one stands for the rest."""
    found: dict[int, Image.Image] = {}
    last: VideoFrame | None = None
    formatter = VideoReformatter()
    if wanted:
        with _opened(file) as (container, stream):
            for number, last in enumerate(_decoded(container, stream)):
                if number in wanted:
                    found[number] = _picture(last, formatter)
                if number >= wanted[-1]:
                    break
    if last is None and not count:
        raise ValueError("it has no frame")
    if last is None or 2 * len(found) < len(set(wanted)):
        raise ValueError(f"the video cannot be decoded: of {len(set(wanted))} frames only {len(found)}")
    return frames_of_one_size([found[index] if index in found else _picture(last, formatter) for index in wanted])


def _picture(frame: VideoFrame, formatter: VideoReformatter) -> Image.Image:
    # ``frame.to_image`` would prepare the conversion of colours anew for each frame, which takes longer than it.
    picture = Image.fromarray(formatter.reformat(frame, format="rgb24").to_ndarray())
    turn = _TURNS.get(round(frame.rotation) % 360)
    return picture if turn is None else picture.transpose(turn)


def frames_of_one_size(frames: list[Image.Image]) -> list[Image.Image]:
    """Return the frames of a clip; raises ``ValueError`` if they are not of one size."""
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        shown = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)[:2])
        raise ValueError(f"its frames have several sizes, such as {shown}, expected one")
    return frames
