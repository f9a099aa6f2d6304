"""Large JPEGs decoded at a part of their size: which ones, how far, and what it changes."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness.photographs import jpeg, photograph, resample
from sclkern.data import open_pairs
from sclkern.data.images import decode_image, decode_levels
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.transforms import build_transform, draw_crop
from sclkern.data.undecodable import read_image, read_picture

PHOTOGRAPH = photograph(601, 447)


def root_mean_square(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(got.permute(1, 2, 0).numpy() - expected).mean()))


@pytest.mark.parametrize(
    ("name", "width", "height", "size", "factor"),
    [
        ("clip", 2400, 1800, 224, 2), ("clip", 2400, 1800, 384, 2), ("clip", 640, 480, 224, 1),
        ("clip", 4000, 3000, 224, 4), ("clip_randaug", 640, 480, 128, 1), ("clip", 4000, 500, 128, 1),
        ("clip", 4000, 512, 128, 2), ("clip_test", 895, 1000, 224, 1), ("clip_test", 896, 1000, 224, 2),
        ("clip_test", 9000, 9000, 32, 8),
    ],
)  # fmt: skip
def test_a_picture_is_reduced_as_far_as_its_smallest_crop_allows(
    name: str, width: int, height: int, size: int, factor: int
) -> None:
    assert build_transform(name, size).reduction(width, height) == factor
    assert build_transform(name, size, decoding="published").reduction(width, height) == 1


@pytest.mark.parametrize(("width", "height"), [(2400, 1800), (900, 700), (650, 4000), (1001, 997)])
def test_every_crop_of_a_reduced_picture_is_twice_as_large_as_the_result(width: int, height: int) -> None:
    torch.manual_seed(0)
    factor = build_transform("clip", 128).reduction(width, height)
    assert factor > 1
    for _ in range(500):
        crop = draw_crop(-(-width // factor), -(-height // factor), 0.8)
        assert min(crop.height, crop.width) >= 2 * 128 - 1  # by the rounding of the crop


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_plain_jpeg_is_decoded_at_a_part_of_its_size(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(np.asarray(Image.fromarray(PHOTOGRAPH).convert(mode)), exif=exif)
    asked = []

    def reduction(width: int, height: int) -> int:
        asked.append((width, height))
        return 2

    whole, reduced = decode_image(data), decode_image(data, reduction)
    assert asked == [whole.size] and reduced.mode == "RGB"
    assert reduced.size == tuple(-(-side // 2) for side in whole.size)
    assert np.array_equal(np.asarray(decode_image(data, lambda *_: 1)), np.asarray(whole))
    small = build_transform("clip_test", 64, normalize=False)(reduced)
    # Its last column covers one pixel of the file more than there is, which stretches the picture a little.
    assert root_mean_square(small, resample(np.asarray(whole), 64)) < 4


def test_all_other_files_are_decoded_in_whole() -> None:
    image = Image.fromarray(PHOTOGRAPH)
    others = (image.convert("CMYK"), "JPEG"), (image, "PNG"), (image.convert("P"), "PNG"), (image, "WEBP")
    for picture, kind in others:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        whole = np.asarray(decode_image(buffer.getvalue()))
        assert np.array_equal(np.asarray(decode_image(buffer.getvalue(), lambda *_: 4)), whole), kind


def test_a_jpeg_that_ends_early_is_refused_at_any_size() -> None:
    data = jpeg(PHOTOGRAPH)
    with pytest.raises(ValueError, match="truncated"):
        decode_image(data[: len(data) // 2], lambda *_: 2)


def noise(power: float, seed: int) -> np.ndarray:
    """A picture whose amplitudes fall as those of photographs do, with frequency to this power, which is about 1."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(448)[:, None], np.fft.rfftfreq(600))
    frequency[0, 0] = np.inf
    white = generator.normal(size=(4, *frequency.shape)) + 1j * generator.normal(size=(4, *frequency.shape))
    grey = np.fft.irfft2((0.9 * white[3] + 0.4 * white[:3]) / frequency**power, s=(448, 600)).transpose(1, 2, 0)
    return np.clip(128 + 50 * grey / grey.std(), 0, 255).astype(np.uint8)


def drawing() -> np.ndarray:
    """Hard edges of every direction, black on white and in colours, which photographs do not have."""
    y, x = np.mgrid[:448, :600]
    rays = np.arctan2(y - 224, x - 300) * 24 / np.pi % 2 < 1
    rings = np.hypot(y - 224, x - 300) // 40 % 2 < 1
    return np.where(np.stack([rays ^ rings, rays, rings], axis=-1), 255, 0).astype(np.uint8)


def samples() -> dict[str, Path]:
    """Photographs of packages that may be installed."""
    found = {}
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            for name in ("rocket.jpg", "coffee.png", "astronaut.png", "grass.png", "china.jpg", "flower.jpg"):
                if (path := Path(spec.origin).parent / folder / name).is_file():
                    found[name] = path
    return found


def error_of_reducing(levels: np.ndarray, size: int, quality: int) -> float:
    height, width = (8 * (side // 8) for side in levels.shape[:2])
    data = jpeg(levels[:height, :width], quality)
    transform = build_transform("clip_test", size, normalize=False)
    assert transform.reduction(width, height) > 1
    exact = resample(np.asarray(decode_image(data)), size)
    return root_mean_square(transform(decode_image(data, transform.reduction)), exact)


@pytest.mark.parametrize("size", [100, 50])
@pytest.mark.parametrize("quality", [75, 95])
def test_of_any_photograph_reducing_changes_little(size: int, quality: int) -> None:
    pictures = {f"noise {power} {seed}": noise(power, seed) for power, seed in ((0.8, 0), (1.0, 1), (1.5, 2))}
    pictures |= {name: np.asarray(Image.open(path).convert("RGB")) for name, path in samples().items()}
    errors = {name: error_of_reducing(levels, size, quality) for name, levels in pictures.items()}
    assert max(errors.values()) < 1.5, errors
    assert error_of_reducing(drawing(), size, quality) < 4


@pytest.mark.parametrize(("size", "bound"), [(300, 0.6), (100, 1.5), (50, 1.5)])
def test_the_result_is_near_the_exact_one(size: int, bound: float) -> None:
    data = jpeg(photograph(600, 448))
    exact = resample(np.asarray(decode_image(data)), size)
    transform = build_transform("clip_test", size, normalize=False)
    assert root_mean_square(transform(decode_image(data, transform.reduction)), exact) < bound
    published = build_transform("clip_test", size, normalize=False, decoding="published")
    in_whole = transform(decode_image(data))
    assert (in_whole.int() - published(decode_image(data)).int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["clip", "clip_randaug"])
def test_both_ways_draw_the_same_crop_of_a_picture_in_whole(name: str) -> None:
    images = []
    for decoding in ("fast", "published"):
        torch.manual_seed(5)
        images.append(build_transform(name, 200, normalize=False, decoding=decoding)(Image.fromarray(PHOTOGRAPH)).int())
    assert (images[0] - images[1]).abs().max() <= 1


def test_a_result_keeps_no_memory_of_the_picture() -> None:
    same = Image.fromarray(photograph(64, 64))
    result = build_transform("clip_test", 64, normalize=False)(same)
    assert result.is_contiguous() and torch.equal(result.permute(1, 2, 0), torch.from_numpy(np.array(same)))
    result.zero_()
    assert np.asarray(same).any()


def test_how_to_decode_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="decoding: got 'exact', expected fast or published"):
        build_transform("clip", 64, decoding="exact")  # type: ignore[arg-type]


def test_a_source_with_encoded_images_is_read_at_a_part_of_their_size(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.arrow", [{"image": jpeg(PHOTOGRAPH), "caption": ["a portrait"]}])
    source = open_pairs(tmp_path, ["t"])
    assert read_image(source, 0, 16).size == (601, 447)
    assert read_picture(source, 0, 16, build_transform("clip_test", 100).decode).size == (301, 224)
    with pytest.raises(ValueError, match="601 x 447 pixels, smaller than a patch \\(500\\)"):
        read_picture(source, 0, 500, build_transform("clip_test", 300).decode)


def colour_jpeg(width: int, height: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PHOTOGRAPH[:height, :width]).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}], ids=str)
@pytest.mark.parametrize("size", [(200, 150), (201, 151)])
def test_an_ordinary_jpeg_has_the_same_levels_by_either_decoder(options: dict[str, Any], size: tuple[int, int]) -> None:
    data = colour_jpeg(*size, **options)
    levels = decode_levels(memoryview(data), lambda *_: 1)
    assert levels is not None and tuple(levels.shape) == (size[1], size[0], 3)
    # Pillow and torchvision may be built with different versions of libjpeg.
    assert (levels.int() - torch.from_numpy(np.array(decode_image(data))).int()).abs().max() <= 1


def test_every_other_file_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data, turned = colour_jpeg(200, 150), Image.Exif()
    turned[0x0112] = 6
    others = {name: io.BytesIO() for name in ("png", "grey", "cmyk")}
    image = Image.fromarray(PHOTOGRAPH[:40, :40])
    image.save(others["png"], "PNG")
    image.convert("L").save(others["grey"], "JPEG")
    image.convert("CMYK").save(others["cmyk"], "JPEG")
    files = {name: buffer.getvalue() for name, buffer in others.items()}
    files |= {
        "turned": colour_jpeg(200, 150, exif=turned),
        "cut short": data[:-100],
        "longer": data + b"0",
        "none": b"",
    }
    for name, content in files.items():
        assert decode_levels(content, lambda *_: 1) is None, name
    assert decode_levels(data, lambda *_: 2) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 150 - 1)
    assert decode_levels(data, lambda *_: 1) is None


@pytest.mark.parametrize("name", ["clip", "clip_test"])
def test_levels_are_transformed_as_their_image(name: str) -> None:
    transform = build_transform(name, 64)
    levels = transform.decode(colour_jpeg(201, 151))
    assert isinstance(levels, torch.Tensor)
    results = []
    for picture in (levels, Image.fromarray(levels.numpy())):
        torch.manual_seed(3)
        results.append(transform(picture))
    assert torch.equal(*results)


def test_augmented_and_published_pictures_are_images() -> None:
    data = colour_jpeg(200, 150)
    assert isinstance(build_transform("clip_randaug", 64).decode(data), Image.Image)
    assert isinstance(build_transform("clip", 64, decoding="published").decode(data), Image.Image)
