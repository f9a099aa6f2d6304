"""What a tree holds, and the pictures and captions that go into it."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from sclkern.data import demo_root
from sclkern.data.sources.arrow import ArrowPairs


@dataclass
class Tree:
    """A tree on the disk.

    Attributes:
        root: its folder.
        rows: what a conversion should give: for each table the file, captions and id of each row, in order.
        defective: the file of each planted defect.
    """

    root: Path
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    defective: dict[str, str] = field(default_factory=dict)

    def row(self, table: str, **values: Any) -> None:
        """Expect a row."""
        self.rows.setdefault(table, []).append(values)


@functools.cache
def _demo() -> ArrowPairs:
    return ArrowPairs(demo_root(), ["pairs"])


@functools.cache
def _captions() -> dict[int, str]:
    source = _demo()
    return {int(image): source.caption(pair) for pair, image in enumerate(source.pair_image)}


def picture(number: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """One of the embedded pictures, scaled."""
    return _demo().image(number % _demo().num_images).resize(size)


def caption(number: int) -> str:
    """The caption of ``picture``."""
    return _captions()[number % _demo().num_images]


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write(path: Path, content: bytes | str | list[Any] | dict[str, Any]) -> Path:
    """Write a file; lists and dicts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_picture(path: Path, number: int, *, defect: str = "", size: tuple[int, int] = (80, 64)) -> None:
    """Write a picture, in the format that its name says unless ``defect`` says otherwise.

    ``defect``: "missing", "truncated", "empty", "cmyk", "grey" or "jpeg" (whatever the name says).
    """
    image = picture(number, size)
    if defect == "missing":
        return
    if defect in ("cmyk", "grey"):
        image = image.convert({"cmyk": "CMYK", "grey": "L"}[defect])
    content = encoded(image, "PNG" if path.suffix == ".png" and defect != "jpeg" else "JPEG")
    if defect == "truncated":
        content = content[: len(content) // 2]
    write(path, b"" if defect == "empty" else content)


def write_clip(path: Path, number: int, *, frames: int = 12, rate: int = 8, defect: str = "") -> None:
    """Write a clip in which a picture moves to the right. ``defect``: "missing", "empty" or "truncated"."""
    if defect == "missing":
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    still = np.asarray(picture(number, (64, 48)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for step in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(still, 4 * step, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if defect:
        content = path.read_bytes()
        path.write_bytes(b"" if defect == "empty" else content[: len(content) // 20])
