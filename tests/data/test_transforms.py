from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from sclkern.data.transforms import CLIP_MEAN, CLIP_STD, Crop, build_transform, denormalize, draw_crop, normalize_images
from sclkern.errors import UserError

NAMES = ["clip", "clip_randaug", "clip_test"]


def gradient(width: int, height: int) -> Image.Image:
    x = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.stack([np.broadcast_to(x, (height, width))] * 3, axis=-1).copy())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 64), (90, 31), (17, 120)])
def test_output(name: str, shape: tuple[int, int]) -> None:
    image = build_transform(name, 48)(gradient(*shape))
    assert type(image) is torch.Tensor
    assert image.shape == (3, 48, 48) and image.dtype == torch.float32


@pytest.mark.parametrize("name", ["clip", "clip_test"])
def test_normalisation(name: str) -> None:
    colour = (255, 0, 102)
    image = build_transform(name, 8)(Image.new("RGB", (20, 20), colour))
    expected = [(c / 255 - m) / s for c, m, s in zip(colour, CLIP_MEAN, CLIP_STD, strict=True)]
    torch.testing.assert_close(image, torch.tensor(expected).view(3, 1, 1).expand(3, 8, 8))
    restored = denormalize(image[None])
    torch.testing.assert_close(restored[0, :, 0, 0], torch.tensor(colour) / 255)
    assert denormalize(torch.tensor([9.0, -9.0, 0.0]).view(3, 1, 1)).aminmax() == (0.0, 1.0)


def every_level() -> torch.Tensor:
    """(3, 16, 16) uint8: each value once in each channel."""
    return torch.arange(256, dtype=torch.uint8).view(16, 16).expand(3, -1, -1).contiguous()


def test_normalising_later_gives_the_bits_of_torchvision() -> None:
    published = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    expected = published(every_level())
    assert torch.equal(normalize_images(every_level()), expected)
    clips = every_level().expand(2, 4, -1, -1, -1)
    assert torch.equal(normalize_images(clips), expected.expand(2, 4, -1, -1, -1))
    assert normalize_images(expected) is expected


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_a_transform_are_the_same_picture(name: str) -> None:
    images = []
    for normalize in (True, False):
        torch.manual_seed(3)
        images.append(build_transform(name, 16, normalize=normalize)(gradient(64, 40)))
    assert images[1].dtype == torch.uint8 and torch.equal(images[0], normalize_images(images[1]))


def test_clip_test_keeps_everything_but_the_aspect_ratio() -> None:
    transform = build_transform("clip_test", 32)
    image = transform(gradient(96, 24))
    assert torch.equal(image, transform(gradient(96, 24)))
    values = denormalize(image)[0]
    assert values[:, 0].max() < 0.05 and values[:, -1].min() > 0.95


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 400), (333, 251)])
def test_crops_are_distributed_as_those_of_torchvision(width: int, height: int) -> None:
    torch.manual_seed(0)
    picture = torch.empty(1, height, width)
    ours = torch.tensor([draw_crop(width, height, 0.8) for _ in range(4000)])
    theirs = torch.tensor([RandomResizedCrop.get_params(picture, [0.8, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    for column in range(4):
        steps = torch.linspace(0.05, 0.95, 19)
        found, expected = (torch.quantile(crops[:, column].float(), steps) for crops in (ours, theirs))
        assert (found - expected).abs().max() < 0.03 * max(width, height)
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    # The first row, the first column and the whole of the last ones are among them.
    assert (ours[:, :2].amin(0) == 0).all() and (ours[:, 0] + ours[:, 2]).max() == height


@pytest.mark.parametrize(("width", "height"), [(900, 100), (90, 600), (1, 1), (1, 30)])
def test_of_a_long_picture_the_middle_is_taken_as_torchvision_does(width: int, height: int) -> None:
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    assert draw_crop(width, height, 0.9) == Crop(*expected)


def test_the_fast_form_resizes_as_torchvision_does() -> None:
    levels = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    expected = v2.functional.resize(levels, [48, 48], v2.InterpolationMode.BICUBIC)
    assert torch.equal(build_transform("clip_test", 48, normalize=False)(image), expected)


def ends(name: str) -> tuple[float, float]:
    """Least and largest grey of the left edge of a left-to-right gradient over many draws."""
    torch.manual_seed(0)
    transform = build_transform(name, 16)
    left = torch.stack([denormalize(transform(gradient(64, 64)))[0, 8, 0] for _ in range(200)])
    return float(left.min()), float(left.max())


def test_clip_crops_at_most_a_fifth_and_flips() -> None:
    least, largest = ends("clip")
    assert least < 0.05 and largest > 0.95
    torch.manual_seed(0)
    transform = build_transform("clip", 16)
    for _ in range(200):
        row = denormalize(transform(gradient(64, 64)))[0, 8]
        # A crop of 80 % of the area is at least 0.8 * (3 / 4) wide.
        assert (row[-1] - row[0]).abs() > 0.5


def test_clip_randaug_augments_and_does_not_flip() -> None:
    torch.manual_seed(0)
    transform = build_transform("clip_randaug", 16)
    rows = torch.stack([denormalize(transform(gradient(64, 64))) for _ in range(200)])
    # Solarize inverts the bright end only, so no draw but a flip makes the left end the brightest.
    assert (rows[:, 0, 8, 3] < 0.6).all()
    assert (rows[:, :, 0, 0].amax(1) < 1e-3).any() and rows.flatten(1).unique(dim=0).shape[0] > 100


@pytest.mark.parametrize("name", ["clip", "clip_randaug"])
def test_random_through_the_default_generator_alone(name: str) -> None:
    transform = build_transform(name, 16)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(torch.stack([transform(gradient(64, 64)) for _ in range(4)]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_unknown_name_and_size() -> None:
    with pytest.raises(UserError, match="'clip_train' is unknown, expected one of clip, clip_randaug, clip_test"):
        build_transform("clip_train", 224)
    with pytest.raises(UserError, match="size is 0"):
        build_transform("clip", 0)
