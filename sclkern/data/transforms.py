"""The published image transforms, by name."""

from __future__ import annotations

from functools import cache

import torch
from torchvision.transforms import v2

from sclkern.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BICUBIC = v2.InterpolationMode.BICUBIC


def _clip(size: int) -> list[v2.Transform]:
    crop = v2.RandomResizedCrop(size, scale=(0.8, 1.0), interpolation=_BICUBIC, antialias=True)
    return [crop, v2.RandomHorizontalFlip()]


def _clip_randaug(size: int) -> list[v2.Transform]:
    crop = v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=_BICUBIC, antialias=True)
    return [v2.RandAugment(num_ops=2, magnitude=9), crop]


def _clip_test(size: int) -> list[v2.Transform]:
    return [v2.Resize((size, size), interpolation=_BICUBIC, antialias=True)]


_GEOMETRY = {"clip": _clip, "clip_randaug": _clip_randaug, "clip_test": _clip_test}


def build_transform(name: str, size: int, *, normalize: bool = True) -> v2.Compose:
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

    Returns:
        The transform.

    Raises:
        UserError: ``name`` is none of the three, or ``size`` is not positive.
    """
    if name not in _GEOMETRY:
        raise UserError(f"transform '{name}' is unknown, expected one of {', '.join(_GEOMETRY)}")
    if size < 1:
        raise UserError(f"image size is {size}, expected 1 pixel or more")
    to_tensor = [*_GEOMETRY[name](size), v2.ToImage(), v2.ToPureTensor()]
    return v2.Compose([*to_tensor, normalize_images] if normalize else to_tensor)


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
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return mean, std


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Undo CLIP's normalisation: (..., 3, H, W) floats to values in [0, 1], same shape, dtype and device."""
    mean, std = (values.to(images.dtype) for values in _statistics(images.device))
    return (images * std + mean).clamp(0, 1)
