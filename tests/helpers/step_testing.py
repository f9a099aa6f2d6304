"""One step of an ``SCLModel`` in two parts, for tests that hold the masks fixed."""

from __future__ import annotations

from sclkern.step import draw_masks, run_step


def masks_of(model, batch, seed):
    return draw_masks(model.config, model.objectives, batch, seed)


def losses_of(model, batch, masks):
    return run_step(model, model.objectives, model.step, batch, masks)
