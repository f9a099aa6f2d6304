"""The training step: its masks, its plan (what is encoded, and what each loss reads), its losses and its execution."""

from sclkern.step.config import StepConfig
from sclkern.step.contrastive import contrast_batch, contrasted_objectives
from sclkern.step.cuda_graph import CapturedStep, check_capture
from sclkern.step.losses import (
    Contrast,
    SCLLosses,
    check_objectives,
    check_step,
    run_step,
    take_features,
    take_step,
    target_counts,
)
from sclkern.step.masks import StepMasks, draw_masks, false_places, match_labels
from sclkern.step.plan import Plan, make_plan

__all__ = [
    "CapturedStep",
    "Contrast",
    "Plan",
    "SCLLosses",
    "StepConfig",
    "StepMasks",
    "check_capture",
    "check_objectives",
    "check_step",
    "contrast_batch",
    "contrasted_objectives",
    "draw_masks",
    "false_places",
    "make_plan",
    "match_labels",
    "run_step",
    "take_features",
    "take_step",
    "target_counts",
]
