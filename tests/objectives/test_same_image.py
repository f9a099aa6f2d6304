"""What it means that images have several captions: how often two meet in a batch, and what the contrast makes of it."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from sclkern.data.order import PairOrder
from sclkern.objectives import image_text_contrast

# Images and captions an image of VG, COCO, SBU and CC3M, a tenth of each; a batch of 4,096 / sqrt(10) pairs then has as
# many pairs of rows of one image as one of 4,096 of all of them.
SETS = [(10_808, 50), (11_329, 5), (86_000, 1), (300_000, 1)]
BATCH = round(4096 / math.sqrt(10))


def image_ids(step: int) -> torch.Tensor:
    pair_image = np.repeat(np.arange(sum(n for n, _ in SETS)), np.concatenate([np.full(n, c) for n, c in SETS]))
    order = PairOrder(len(pair_image), BATCH, seed=1)
    return torch.from_numpy(pair_image[[pair for _, pair in order.at(step, torch.arange(BATCH))]])


def meetings(ids: torch.Tensor) -> int:
    counts = ids.unique(return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def test_about_23_pairs_of_rows_of_a_batch_of_4096_are_of_one_image():
    found = [meetings(image_ids(step)) for step in range(5)]
    expected = BATCH * (BATCH - 1) / 2 * sum(n * c**2 for n, c in SETS) / sum(n * c for n, c in SETS) ** 2
    assert 20 < expected < 26
    assert abs(sum(found) / 5 - expected) < 4 * math.sqrt(expected / 5), (found, expected)


def test_a_trained_model_is_not_pushed_away_from_other_captions_of_an_image():
    ids = image_ids(0)
    _, image = ids.unique(return_inverse=True)
    # What a model is trained to: a caption is near its image, and so near the other captions of it.
    features = F.normalize(torch.randn(int(image.max()) + 1, 256), dim=-1)[image]
    captions = features + 0.2 * F.normalize(torch.randn(BATCH, 256), dim=-1)
    temperature = torch.tensor(0.03)
    gradients, losses = {}, {}
    for name, same in (("ignore", ids), ("negative", None)):
        text = captions.clone().requires_grad_()
        losses[name] = image_text_contrast(features, text, temperature, same=same)
        (gradients[name],) = torch.autograd.grad(losses[name], text)
    others = image.bincount()[image]
    # A pair cannot be told from the others of its image, in either direction; the rest loses nearly nothing.
    others = image.bincount()[image]
    difference = (losses["negative"] - losses["ignore"]).item() * BATCH
    assert difference > 0.8 * 2 * others.log().sum().item() > 0
    pushed = {name: gradient.norm(dim=-1)[others > 1].mean() for name, gradient in gradients.items()}
    assert pushed["negative"] > 10 * pushed["ignore"]
