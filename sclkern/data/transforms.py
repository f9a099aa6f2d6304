"""The published image transforms, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torchvision.transforms import v2

from sclkern.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BICUBIC = v2.InterpolationMode.BICUBIC
# A reduced JPEG is at least this many times as large as the result, on either side; docs/pretraining.md has what it
# changes.
_GAP = 2.0

# Least ratio of the sides of a crop, and greatest as its inverse.
_RATIO = 3 / 4

Decoding = Literal["fast", "published"]


class _Geometry(NamedTuple):
    """What a transform does before its result is a tensor of levels.

    Attributes:
        colour: on a PIL image.
        crop: on a PIL image or a tensor: from any size to that of the result.
        least_area: share of the area that the smallest crop has.
        least_ratio: of the sides of a crop, the shorter one over the longer one; None where there is no crop.
    """

    colour: Sequence[v2.Transform]
    crop: Sequence[v2.Transform]
    least_area: float = 1.0
    least_ratio: float | None = None


def _crop(size: int, least_area: float) -> v2.Transform:
    return v2.RandomResizedCrop(
        size, scale=(least_area, 1.0), ratio=(_RATIO, 1 / _RATIO), interpolation=_BICUBIC, antialias=True
    )


def _clip(size: int) -> _Geometry:
    return _Geometry([], [_crop(size, 0.8), v2.RandomHorizontalFlip()], 0.8, _RATIO)


def _clip_randaug(size: int) -> _Geometry:
    return _Geometry([v2.RandAugment(num_ops=2, magnitude=9)], [_crop(size, 0.9)], 0.9, _RATIO)


def _clip_test(size: int) -> _Geometry:
    return _Geometry([], [v2.Resize((size, size), interpolation=_BICUBIC, antialias=True)])


_GEOMETRY = {"clip": _clip, "clip_randaug": _clip_randaug, "clip_test": _clip_test}


class ImageTransform:
    """The transform from a PIL image (mode RGB) to a tensor (3, S, S); ``build_transform`` makes one.

    Args:
        geometry: The steps, and what they take away.
        size: S, side of the output in pixels.
        normalize: Whether the output is normalised float32; else uint8.
        decoding: "fast" or "published", see ``build_transform``.
    """

    def __init__(self, geometry: _Geometry, size: int, *, normalize: bool, decoding: Decoding) -> None:
        self.size = size
        self.decoding = decoding
        self._geometry = geometry
        self._normalize = normalize

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform an image, with draws from torch's default generator."""
        for step in self._geometry.colour:
            image = step(image)
        picture: Any = image if self.decoding == "published" else _levels(image)
        for step in self._geometry.crop:
            picture = step(picture)
        if self.decoding == "published":
            picture = v2.functional.pil_to_tensor(picture)
        picture = picture[:3].clone(memory_format=torch.contiguous_format)
        return normalize_images(picture) if self._normalize else picture

    def reduction(self, width: int, height: int) -> int:
        """How much smaller a picture may be decoded; the ``reduction`` of ``decode_image``.

        Args:
            width: Of the picture, in pixels.
            height: Of the picture, in pixels.

        Returns:
            1, 2, 4 or 8. Every crop of the reduced picture is at least twice as large as the output, on both sides;
            always 1 with "published".
        """
        if self.decoding == "published":
            return 1
        shorter = float(min(width, height))
        if self._geometry.least_ratio is not None:
            shorter = min(shorter, math.sqrt(self._geometry.least_area * self._geometry.least_ratio * width * height))
        return next((factor for factor in (8, 4, 2) if shorter >= factor * _GAP * self.size), 1)


def _levels(image: Image.Image) -> torch.Tensor:
    """Levels (3, H, W) of an RGB image or, without a copy where its memory is in one piece, (4, H, W) with an unused
    one; not to be written to."""
    try:
        values = torch.from_dlpack(pa.array(image).values)
        return values.view(image.height, image.width, 4).permute(2, 0, 1)
    except (TypeError, ValueError):  # a Pillow without this exchange of memory, or an image in several pieces
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def build_transform(name: str, size: int, *, normalize: bool = True, decoding: Decoding = "fast") -> ImageTransform:
    """Build the transform from a PIL image (mode RGB) to a tensor (3, ``size``, ``size``).

    Every transform draws from torch's default generator.

    - ``"clip"``: random crop of 80 to 100 % of the area, resized (bicubic), and a horizontal flip.
    - ``"clip_randaug"``: RandAugment, 2 operations of magnitude 9, then a crop of 90 to 100 %; no flip.
    - ``"clip_test"``: resized to the square without keeping the aspect ratio, as in the published code.

    RandAugment is torchvision's. Like the published one it draws from 14 operations, but it has Identity instead of
    SolarizeAdd, and its strengths differ: at magnitude 9, for example, Posterize keeps 7 bits (published: 1) and a
    translation is 14 % of the side (published: 30 pixels).

    Args:
        name: One of the three names.
        size: Side of the output in pixels.
        normalize: Whether the output is float32, normalised by CLIP's mean and standard deviation; else it is uint8,
            which ``normalize_images`` makes the same floats of.
        decoding: "fast" resizes by torch, which differs from Pillow by a level here and there, and lets a large JPEG be
            decoded at a part of its size (``reduction``); "published" resizes by Pillow the picture in full.

    Returns:
        The transform.

    Raises:
        UserError: ``name`` is none of the three, or ``size`` is not positive.
        ValueError: ``decoding`` is neither.
    """
    if name not in _GEOMETRY:
        raise UserError(f"transform '{name}' is unknown, expected one of {', '.join(_GEOMETRY)}")
    if size < 1:
        raise UserError(f"image size is {size}, expected 1 pixel or more")
    if decoding not in ("fast", "published"):
        raise ValueError(f"decoding: got {decoding!r}, expected fast or published")
    return ImageTransform(_GEOMETRY[name](size), size, normalize=normalize, decoding=decoding)


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """Scale images to [0, 1] and normalise them by CLIP's mean and standard deviation, on the device they are on.

    Every operation rounds to the nearest float32 on every device, so the result is the same to the bit on all of them,
    and that of torchvision's ``ToDtype(scale=True)`` and ``Normalize``.

    Args:
        images: (..., 3, H, W) uint8; floats are returned as they are, for they have been normalised already.

    Returns:
        float32 of the same shape and device.
    """
    if images.is_floating_point():
        return images
    mean, std = _statistics(images.device)
    return images.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's mean and standard deviation (3, 1, 1), copied to a device once, as each copy would wait for it."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)
    )
    return mean, std


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Undo CLIP's normalisation: (..., 3, H, W) floats to values in [0, 1], same shape, dtype and device."""
    mean, std = (values.to(images.dtype) for values in _statistics(images.device))
    return (images * std + mean).clamp(0, 1)
