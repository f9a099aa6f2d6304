"""Images are normalised on a GPU to the bits of a CPU."""

import pytest
import torch

pytest.importorskip("pyarrow", reason="sclkern.data reads arrow files")
pytest.importorskip("pydantic", reason="sclkern.training reads configurations")

from sclkern.data.transforms import normalize_images
from sclkern.training.passes import copied

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_every_level_of_every_channel():
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(2, 3, -1, -1).contiguous()
    expected = normalize_images(levels)
    assert torch.equal(normalize_images(levels.cuda()).cpu(), expected)
    batch = {"image": levels.pin_memory(), "false_image": levels[:1].pin_memory()}
    moved = copied(batch, torch.device("cuda", 0), torch.cuda.Stream())
    assert torch.equal(moved["image"].cpu(), expected) and torch.equal(moved["false_image"].cpu(), expected[:1])
