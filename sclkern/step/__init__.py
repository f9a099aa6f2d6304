"""The training step: its masks, its plan (what is encoded, and what each loss reads), its losses and its execution."""

from sclkern.step.config import StepConfig
from sclkern.step.cuda_graph import CapturedStep, check_capture
from sclkern.step.losses import SCLLosses, check_objectives, check_step, run_step, take_step
from sclkern.step.masks import StepMasks, draw_masks, false_places, match_labels
from sclkern.step.plan import Plan, make_plan

__all__ = [
    "CapturedStep",
    "Plan",
    "SCLLosses",
    "StepConfig",
    "StepMasks",
    "check_capture",
    "check_objectives",
    "check_step",
    "draw_masks",
    "false_places",
    "make_plan",
    "match_labels",
    "run_step",
    "take_step",
]
