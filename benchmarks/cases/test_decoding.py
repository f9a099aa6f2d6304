"""From the bytes of an arrow file to what a model is fed, of one core: ours, the published way, other decoders.

All take turns in random order, in the processor's time of one thread, so that the speed of the machine and its other
users fall out of the ratios. Before it is timed, each is compared with the exact resampling of the crop that it drew.
"""

from __future__ import annotations

import importlib
import io
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from benchmarks.harness.photographs import jpeg, photograph, resample
from sclkern.data import open_pairs
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.transforms import CLIP_MEAN, CLIP_STD, build_transform, draw_crop, normalize_images
from sclkern.data.undecodable import read_picture

PICTURES, ROUNDS = 4, 21
SIZES = {"coco": (640, 480), "web": (2400, 1800)}
# Greatest root mean square of an error, in levels: of a filter that rounds after each pass; of a JPEG in reduced size.
IN_WHOLE, REDUCED = 0.7, 1.5
PUBLISHED, OURS, OURS_FLOATS = "published", "sclkern", "sclkern, floats"
Load = Callable[[int], torch.Tensor]


@pytest.mark.priority(2)
@pytest.mark.parametrize("pixels", [224, 384])
@pytest.mark.parametrize("kind", SIZES)
def test_decoding(record, tmp_path, kind, pixels):
    width, height = SIZES[kind]
    pictures = [photograph(width, height, 150 * number) for number in range(PICTURES)]
    encoded = [jpeg(levels) for levels in pictures]
    write_pairs(tmp_path / "t.arrow", [{"image": data, "caption": ["a portrait"]} for data in encoded])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ways = build_ways(tmp_path, pixels)
        whole = [np.asarray(Image.open(io.BytesIO(data))) for data in encoded]
        errors = {name: check(name, load, whole, pixels) for name, load in ways.items()}
        seconds = take_turns(ways)
    finally:
        torch.set_num_threads(threads)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    others = {name: medians[name] for name in ways if name not in (PUBLISHED, OURS, OURS_FLOATS)}
    fastest = min(others, key=others.__getitem__)
    record(
        f"decoding/{kind}/{pixels}",
        rows=PICTURES,
        width=width,
        height=height,
        pixels=pixels,
        encoded_bytes=sum(map(len, encoded)) // PICTURES,
        pictures_per_second={name: 1 / median for name, median in medians.items()},
        error=errors,
        without=[] if "torchcodec" in others else ["torchcodec"],
        fastest_other=fastest,
        faster_than_published=medians[PUBLISHED] / medians[OURS],
        faster_than_other=medians[fastest] / medians[OURS],
    )


def build_ways(folder: Path, pixels: int) -> dict[str, Load]:
    """Functions from the number of a picture to (3, pixels, pixels), uint8 or normalised float32."""
    source = open_pairs(folder, ["t"])
    table = pa.ipc.open_file(pa.memory_map(str(folder / "t.arrow"))).read_all()
    bicubic = v2.InterpolationMode.BICUBIC
    published = v1.Compose([
        v1.RandomResizedCrop(pixels, scale=(0.8, 1.0), interpolation=bicubic), v1.RandomHorizontalFlip(),
        v1.ToTensor(), v1.Normalize(CLIP_MEAN, CLIP_STD),
    ])  # fmt: skip
    levels = v2.Compose([
        v2.RandomResizedCrop(pixels, scale=(0.8, 1.0), interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    floats = v2.Compose([levels, v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])

    def by_sclkern(normalize: bool) -> Load:
        transform = build_transform("clip", pixels, normalize=normalize)
        return lambda number: transform(read_picture(source, number, 16, transform.decode))

    def by_decoder(decode: Callable[[torch.Tensor], torch.Tensor], transform: v2.Transform) -> Load:
        # A copy, as these decoders take no memory that must not be written to.
        return lambda number: transform(
            decode(torch.frombuffer(bytearray(source.image_bytes(number)), dtype=torch.uint8))
        )

    ways: dict[str, Load] = {
        PUBLISHED: lambda number: published(Image.open(io.BytesIO(table["image"][number].as_py())).convert("RGB")),
        OURS: by_sclkern(False),
        OURS_FLOATS: by_sclkern(True),
    }
    for name, decode in decoders().items():
        ways[name] = by_decoder(decode, levels)
        ways[f"{name}, floats"] = by_decoder(decode, floats)
    return ways


def decoders() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Decoders of JPEG to (3, H, W) that are installed."""
    found: dict[str, Any] = {"torchvision": getattr(torchvision.io, "decode_jpeg", None)}
    try:
        found["torchcodec"] = getattr(importlib.import_module("torchcodec.decoders"), "decode_jpeg", None)
    except (ImportError, RuntimeError, OSError):  # not installed, or for another version of torch
        found["torchcodec"] = None
    return {name: decode for name, decode in found.items() if decode is not None}


def check(name: str, load: Load, whole: list[np.ndarray], pixels: int) -> float:
    """The root mean square, in levels, of what a way differs by from the exact resampling of the crop that it drew."""
    squares = []
    for number, levels in enumerate(whole):
        torch.manual_seed(number)
        got = _seeded(load, number)
        height, width, _ = levels.shape
        factor = build_transform("clip", pixels).reduction(width, height) if name.startswith(OURS) else 1
        torch.manual_seed(number)
        top, left, down, across = _draw_crop(name, width // factor, height // factor)
        crop = levels[factor * top : factor * (top + down), factor * left : factor * (left + across)]
        expected = resample(crop, pixels)
        if torch.rand(1) < 0.5:
            expected = expected[:, ::-1]
        difference = levels_of(got).permute(1, 2, 0).numpy() - expected
        squares.append(float(np.square(difference).mean()))
    error = math.sqrt(max(squares))
    bound = REDUCED if factor > 1 else IN_WHOLE
    assert error < bound, f"{name}: differs by {error} levels, expected less than {bound}"
    return error


def _draw_crop(name: str, width: int, height: int) -> tuple[int, int, int, int]:
    if name.startswith(OURS):
        return draw_crop(width, height, 0.8)
    seen = torch.empty(1, height, 1).expand(-1, -1, width)
    return v1.RandomResizedCrop.get_params(seen, [0.8, 1.0], [3 / 4, 4 / 3])


def _seeded(load: Load, number: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's decoder is deprecated
        return load(number)


def levels_of(images: torch.Tensor) -> torch.Tensor:
    """Images in float64 levels of 0 to 255."""
    if images.dtype == torch.uint8:
        return images.double()
    black, white = (normalize_images(torch.full((3, 1, 1), level, dtype=torch.uint8)).double() for level in (0, 255))
    return (images.double() - black) / (white - black) * 255


def take_turns(ways: dict[str, Load]) -> dict[str, list[float]]:
    """Processor's seconds of a picture, a round a number; those that warmed up have been left out."""
    order, seconds = random.Random(0), {name: [] for name in ways}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(ROUNDS + 1):
            for name in order.sample(list(ways), len(ways)):
                begin = time.thread_time()
                for number in range(PICTURES):
                    ways[name](number)
                if turn:
                    seconds[name].append((time.thread_time() - begin) / PICTURES)
    return seconds
