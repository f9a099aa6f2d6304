"""One step of an ``SCLModel`` in two parts, for tests that hold the masks fixed."""

from __future__ import annotations

import pytest
import torch

from sclkern.step import draw_masks, run_step

RECIPES = ["scl", "glscl"]
FRAMES = [pytest.param(None, id="images"), pytest.param(3, id="clips")]


def masks_of(model, batch, seed):
    return draw_masks(model.config, model.objectives, batch, seed)


def losses_of(model, batch, masks):
    return run_step(model, model.objectives, model.step, batch, masks)


def build(make_model, make_batch, objectives, frames=None, dropout=0.1, **batch_options):
    model = make_model(objectives, max_frames=frames or 0, dropout=dropout)
    return model, make_batch(frames=frames, false_image=objectives.dataset_negatives, **batch_options)


def run(model, batch, masks):
    """Losses as floats, and the gradients of the total."""
    model.zero_grad()
    losses = losses_of(model, batch, masks)
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.named().items()}, gradients


def assert_same(ours, theirs):
    for kind, a, b in zip(("losses", "gradients"), ours, theirs, strict=True):
        assert a.keys() == b.keys(), (kind, a.keys() ^ b.keys())
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
