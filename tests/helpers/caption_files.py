"""Small tars and tables of pictures with captions, and the defects that such files have."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

Member = tuple[str, bytes]


def picture(number: int = 0, size: tuple[int, int] = (32, 24), format: str = "JPEG") -> bytes:
    """An encoded picture of one colour; other numbers are other pictures."""
    buffer = io.BytesIO()
    colour = (number * 37 % 256, number * 101 % 256, number % 256)
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def bomb() -> bytes:
    """A small PNG that unfolds to more pixels than Pillow allows."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, number: int, text: str | None = None, **record: object) -> list[Member]:
    """The members of a sample as img2dataset writes them."""
    text = f"caption {number}" if text is None else text
    content = {"key": key, "status": "success", "caption": text, **record}
    return [
        (f"{key}.jpg", picture(number)),
        (f"{key}.json", json.dumps(content).encode()),
        (f"{key}.txt", text.encode()),
    ]


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    """Write a tar of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_samples(path: Path, count: int, first: int = 0) -> Path:
    """Write a tar of ``count`` good samples."""
    keys = range(first, first + count)
    return write_tar(path, [member for number in keys for member in sample(f"{number:09}", number)])


def write_pictures(folder: Path, names: Iterable[str]) -> None:
    """Write a picture for each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
