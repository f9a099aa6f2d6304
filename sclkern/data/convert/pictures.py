"""Reading the files of a row: pictures as they are or shrunk, and frames of clips."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image

from sclkern.data.convert.plan import Member
from sclkern.data.files import DataFolder
from sclkern.data.images import UNDECODABLE, decode_image
from sclkern.data.text import one_line

_QUALITY = 90


def read_file(source: DataFolder, file: str | Member) -> bytes:
    """The content of a file or of a member of a tar."""
    if isinstance(file, Member):
        return source.read(file.tar, file.start, file.length)
    return source.read(file)


def read_picture(source: DataFolder, file: str | Member, resize: int | None) -> bytes:
    """A picture that can be decoded.

    Args:
        source: the set.
        file: its file.
        resize: short side in pixels to which a larger picture is shrunk.

    Returns:
        The file as it is, or a JPEG of the smaller picture.

    Raises:
        ValueError: it cannot be decoded.
    """
    content = read_file(source, file)
    picture = decode_image(content)
    if resize is None or min(picture.size) <= resize:
        return content
    return shrink(picture, resize)


def shrink(picture: Image.Image, resize: int) -> bytes:
    """A JPEG of a picture whose short side is ``resize`` pixels at most.

    Args:
        picture: mode RGB.
        resize: short side in pixels; a picture is never enlarged.

    Returns:
        The JPEG.
    """
    short = min(picture.size)
    if short > resize:
        width, height = (max(1, round(side * resize / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def read_clip(source: DataFolder, file: str, frames: int | None, resize: int | None) -> str | list[bytes]:
    """A clip that can be decoded.

    Args:
        source: the set.
        file: of the clip, or a folder of frames, ending in "/".
        frames: frames to give, equally spaced from the first to the last; None gives the name.
        resize: short side in pixels to which larger frames are shrunk.

    Returns:
        JPEGs, or the name of the clip.

    Raises:
        ValueError: it cannot be decoded.
    """
    if file.endswith("/"):
        names = sorted(name for name in source.names_in(file.rstrip("/")) if name.lower().endswith((".jpg", ".png")))
        if not names:
            raise ValueError("the folder has no frame")
        chosen = _spaced(len(names), frames or 1)
        pictures = [read_picture(source, f"{file}{names[index]}", resize) for index in chosen]
        return pictures if frames else file
    if source.path(file).stat().st_size == 0:
        raise ValueError("it is empty")
    try:
        if frames is None:
            with av.open(str(source.path(file))) as container:
                next(container.decode(video=0))
            return file
        with av.open(str(source.path(file))) as container:
            count = sum(1 for _ in container.decode(video=0))
        chosen = _spaced(count, frames)
        with av.open(str(source.path(file))) as container:
            wanted = set(chosen)
            decoded = {
                index: shrink(frame.to_image(), resize or 1 << 30)
                for index, frame in enumerate(container.decode(video=0))
                if index in wanted
            }
        return [decoded[index] for index in chosen]
    except (av.FFmpegError, StopIteration, IndexError, KeyError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else None
        raise ValueError(reason or "it has no frame") from error


def _spaced(count: int, frames: int) -> list[int]:
    if count == 0:
        raise ValueError("it has no frame")
    return [int(index) for index in np.linspace(0, count - 1, frames)]


def reason_of(error: Exception) -> str:
    """Why a file cannot be used, in one line."""
    return one_line(str(error).removeprefix(UNDECODABLE), 200) or type(error).__name__


def size_of(source: DataFolder, file: str | Member) -> int:
    """Bytes of a file; -1 where it is gone."""
    if isinstance(file, Member):
        return file.length
    if file.endswith("/"):
        return len(source.names_in(file.rstrip("/")))
    info = source.info(file)
    return -1 if info is None else info.size
