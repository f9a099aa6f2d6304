"""Options of the objectives, and batches in which nothing is masked."""

from __future__ import annotations

import pytest
import torch

from sclkern import ObjectiveConfig
from step_testing import RECIPES, build, losses_of, masks_of, run


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_options_run_and_are_finite(make_model, make_batch, recipe):
    model, batch = build(make_model, make_batch, ObjectiveConfig.published(recipe), frames=2)
    losses, gradients = run(model, batch, masks_of(model, batch, 3))
    assert all(loss.isfinite() for loss in losses.values()), losses
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_frame_norm_is_of_clips_alone(make_model, make_batch):
    for frames, same in ((None, True), (3, False)):
        losses = []
        for norm in ("features", "published"):
            model, batch = build(make_model, make_batch, ObjectiveConfig(frame_norm=norm), frames)
            losses.append(losses_of(model, batch, masks_of(model, batch, 0)).mvsc)
        assert torch.equal(*losses) == same


def test_nothing_to_complete_costs_nothing_and_breaks_nothing(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl"), lengths=[2, 2, 2, 2])
    losses, gradients = run(model, batch, masks_of(model, batch, 3))
    assert losses["mlm"] == 0
    assert all(loss.isfinite() for loss in losses.values()), losses
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_published_drops_an_empty_token_completion(make_model, make_batch):
    objectives = ObjectiveConfig(recipe="glscl", empty_selections="published")
    model, batch = build(make_model, make_batch, objectives, lengths=[2, 2, 2, 2])
    losses = losses_of(model, batch, masks_of(model, batch, 3))
    assert losses.metrics["mltc_text"] == 0
    assert losses.mltc.isfinite()
    assert losses.mlm.isnan()
