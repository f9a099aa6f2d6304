"""The training step: which masks are drawn, which views are fused, which loss reads what, and how it is executed."""

from sclkern.step.config import StepConfig
from sclkern.step.cuda_graph import CapturedStep, check_capture
from sclkern.step.losses import SCLLosses, check_objectives, check_step, run_step
from sclkern.step.masks import StepMasks, draw_masks
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
    "make_plan",
    "run_step",
]
