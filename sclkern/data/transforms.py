"""The published image transforms, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torchvision.transforms import v2

from sclkern.data.images import Picture, decode_image, decode_levels
from sclkern.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# A reduced JPEG is at least this many times as large as the result, on either side; docs/pretraining.md has what it
# changes.
_GAP = 2.0

# Least ratio of the sides of a crop, and greatest as its inverse.
_RATIO = 3 / 4

Decoding = Literal["fast", "published"]


class Crop(NamedTuple):
    """A part of a picture.

    Attributes:
        top: its first row.
        left: its first column.
        height: in pixels.
        width: in pixels.
    """

    top: int
    left: int
    height: int
    width: int


class _Geometry(NamedTuple):
    """What a transform does before its result is a tensor of levels.

    Attributes:
        colour: on a PIL image.
        least_area: share of the area that the smallest crop has; None where the whole picture is resized.
        flips: whether half of the pictures are mirrored.
    """

    colour: Sequence[v2.Transform] = ()
    least_area: float | None = None
    flips: bool = False


def _clip() -> _Geometry:
    return _Geometry(least_area=0.8, flips=True)


def _clip_randaug() -> _Geometry:
    return _Geometry([v2.RandAugment(num_ops=2, magnitude=9)], least_area=0.9)


_GEOMETRY = {"clip": _clip, "clip_randaug": _clip_randaug, "clip_test": _Geometry}


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

    def __call__(self, image: Picture) -> torch.Tensor:
        """Transform an image, or what ``decode`` made of one, with draws from torch's default generator."""
        if isinstance(image, Image.Image):
            for step in self._geometry.colour:
                image = step(image)
                assert isinstance(image, Image.Image)
            width, height = image.size
        else:
            height, width, _ = image.shape
        crop = Crop(0, 0, height, width)
        if self._geometry.least_area is not None:
            crop = draw_crop(width, height, self._geometry.least_area)
        mirrored = self._geometry.flips and float(torch.rand(())) < 0.5
        if self.decoding == "published":
            assert isinstance(image, Image.Image)
            picture = _resize_by_pillow(image, crop, self.size)
        else:
            picture = _resize_by_torch(image, crop, self.size)
        if mirrored:
            picture = picture.flip(-1)
        return normalize_images(picture) if self._normalize else picture

    def decode(self, data: bytes | memoryview) -> Picture:
        """Decode an image file to what this transform takes.

        Args:
            data: content of the file.

        Returns:
            The image, mode RGB, or its levels (H, W, 3) uint8.

        Raises:
            ValueError: as of ``decode_image``.
        """
        if self.decoding == "fast" and not self._geometry.colour:
            levels = decode_levels(data, self.reduction)
            if levels is not None:
                return levels
        return decode_image(data, self.reduction)

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
        if self._geometry.least_area is not None:
            shorter = min(shorter, math.sqrt(self._geometry.least_area * _RATIO * width * height))
        return next((factor for factor in (8, 4, 2) if shorter >= factor * _GAP * self.size), 1)


def _resize_by_pillow(image: Image.Image, crop: Crop, size: int) -> torch.Tensor:
    resized = v2.functional.resized_crop(image, *crop, [size, size], v2.InterpolationMode.BICUBIC)
    return v2.functional.pil_to_tensor(resized).contiguous()


def _resize_by_torch(image: Picture, crop: Crop, size: int) -> torch.Tensor:
    levels = _levels(image) if isinstance(image, Image.Image) else image[None]
    part = levels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # In this order of channels torch's filter takes the four bytes of a pixel at once, and returns them so.
    part = part.permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(part, (size, size), mode="bicubic", antialias=True)
    return _planes(resized[0].permute(1, 2, 0))


def _planes(levels: torch.Tensor) -> torch.Tensor:
    """(3, H, W) in one piece from levels (H, W, 3), or (H, W, 4) with an unused channel."""
    planes = np.empty((3, *levels.shape[:2]), np.uint8)
    if levels.shape[2] == 4 and levels.is_contiguous():
        # The four bytes of a pixel as one number: torch's strided copy takes three times as long, numpy's twice.
        pixels = levels.numpy().view("<u4")[..., 0]
        for channel, plane in enumerate(planes):
            np.right_shift(pixels, 8 * channel, out=plane, casting="unsafe")
    else:
        for channel, plane in enumerate(planes):
            plane[:] = levels[..., channel].numpy()
    return torch.from_numpy(planes)


def _levels(image: Image.Image) -> torch.Tensor:
    """Levels (1, H, W, 3) of an RGB image or, without a copy where its memory is in one piece, (1, H, W, 4) with an
    unused channel; not to be written to."""
    try:
        values = torch.from_dlpack(pa.array(image).values)
        return values.view(1, image.height, image.width, 4)
    except (TypeError, ValueError):  # a Pillow without this exchange of memory, or an image in several pieces
        return torch.from_numpy(np.array(image))[None]


def draw_crop(width: int, height: int, least_area: float) -> Crop:
    """Draw a crop as torchvision's ``RandomResizedCrop`` does, from torch's default generator.

    Its own draws call torch seven times, which takes a tenth of the time of a picture of COCO's size.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        least_area: share of the area that the smallest crop has, up to the rounding of its sides.

    Returns:
        The crop. The logarithm of the ratio of its sides is uniform between those of 3:4 and 4:3; where ten draws do
        not fit into the picture, it is the largest one in the middle.
    """
    for _ in range(10):
        area, ratio, down, right = torch.rand(4).tolist()
        pixels = width * height * (least_area + (1 - least_area) * area)
        wide = _RATIO ** (1 - 2 * ratio)
        crop_width, crop_height = round(math.sqrt(pixels * wide)), round(math.sqrt(pixels / wide))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(down * (height - crop_height + 1)), int(right * (width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width)
    crop_width = min(width, round(height / _RATIO))
    crop_height = min(height, round(width / _RATIO))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


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
    return ImageTransform(_GEOMETRY[name](), size, normalize=normalize, decoding=decoding)


def apply_transform(transform: Callable[[Any], torch.Tensor], decoded: Picture | Sequence[Image.Image]) -> torch.Tensor:
    """Transform an image, or all frames of a clip by the same draws.

    Args:
        transform: from an image, mode RGB, to a tensor (3, S, S), random through torch's default generator alone.
        decoded: an image, what its ``decode`` made of one, or the frames of a clip.

    Returns:
        (3, S, S), of a clip (F, 3, S, S).
    """
    if isinstance(decoded, Image.Image | torch.Tensor):
        return transform(decoded)
    state = torch.default_generator.get_state()
    frames = []
    for frame in decoded:
        torch.default_generator.set_state(state)
        frames.append(transform(frame))
    return torch.stack(frames)


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
