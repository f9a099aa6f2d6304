"""A global batch as the training loader gives it, and parts of it."""

from __future__ import annotations

import torch

from sclkern import ObjectiveConfig
from sclkern.step import false_places, match_labels

ROWS, SEED = 8, 11
# Of captions: each part of the batch is padded to another width.
LENGTHS = [10, 7, 12, 5, 3, 9, 16, 4]


def train(make_model, recipe, negatives, frames=None, **options):
    """A tiny model that drops."""
    objectives = ObjectiveConfig(recipe=recipe, itm_negatives=negatives, **options)
    return make_model(objectives, max_frames=frames or 0, dropout=0.1).train()


def global_batch(make_batch, negatives, frames=None):
    """The rows of all places, with the false image of each label 0."""
    batch = make_batch(ROWS, lengths=LENGTHS, width=16, frames=frames)
    place = torch.arange(ROWS)
    labels = match_labels(SEED, place)
    # Images with several captions, within a micro-batch and across.
    image_id = torch.tensor([7, 3, 7, 5, 6, 3, 9, 7])
    batch |= {"place": place, "match_labels": labels, "image_id": image_id}
    if negatives == "in_batch":
        batch["false_place"] = false_places(SEED, place[labels == 0], ROWS)
        batch["false_image"] = batch["image"][batch["false_place"]]
    else:
        generator = torch.Generator().manual_seed(5)
        shape = (int((labels == 0).sum()), *batch["image"].shape[1:])
        batch["false_image"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return batch


def part_of(batch, rows):
    """Some rows of a global batch, in any order, padded to a width of their own."""
    rows = torch.as_tensor(rows)
    false = torch.full((ROWS,), -1)
    false[batch["match_labels"] == 0] = torch.arange(len(batch["false_image"]))
    false = false[rows][false[rows] >= 0]
    width = int(batch["text_mask"][rows].sum(1).max())
    part = {name: batch[name][rows] for name in ("image", "text_ids", "text_mask", "place", "match_labels", "image_id")}
    part |= {name: part[name][:, :width] for name in ("text_ids", "text_mask")}
    return part | {name: batch[name][false] for name in ("false_image", "false_place") if name in batch}


def one_batch(model, batch):
    """Losses and gradients of the whole."""
    model.zero_grad()
    losses = model(batch, seed=SEED)
    losses.total.backward()
    return {name: loss.detach() for name, loss in losses.named().items()}, gradients_of(model)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tolerance=1e-10):
    """Losses and gradients agree, each on its own scale."""
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, value in expected.items():
            scale = float(value.abs().max()) + 1e-3
            torch.testing.assert_close(
                found[name] / scale, value / scale, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
