"""Arithmetic rate of a run, and its share of the device's peak (MFU)."""

from __future__ import annotations

import torch

from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.config import StepConfig
from sclkern.step.flops import Counter
from sclkern.step.plan import make_plan
from sclkern.training.config import PretrainConfig

# Dense FLOP/s in bfloat16 (tensor cores) and in float32 (CUDA cores), from NVIDIA's data sheets.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
}


def flops_a_pair(
    config: SCLConfig, objectives: ObjectiveConfig, step: StepConfig, caption_tokens: float, padded_tokens: int
) -> float:
    """Count the FLOPs of the step for one pair, forward and backward, from its plan.

    What activation checkpointing computes again does not count.

    Args:
        config: architecture.
        objectives: losses of the step.
        step: how the step is executed.
        caption_tokens: mean number of tokens of the captions.
        padded_tokens: tokens that a caption is padded to where the step does not pack.

    Returns:
        FLOPs, a multiplication and an addition counted as two.
    """
    counter = Counter(
        config,
        objectives,
        make_plan(objectives, step),
        caption_tokens=round(caption_tokens),
        padded_tokens=padded_tokens,
    )
    return sum(part.total for part in counter.parts())


class Throughput:
    """Converts pairs per second to FLOP/s and MFU.

    Args:
        config: configuration of the run.
        lengths: tokens of a sample of the captions.
        pad_to_max: whether captions are padded to ``max_text_len``.
        device: device that trains.
    """

    def __init__(self, config: PretrainConfig, lengths: list[int], pad_to_max: bool, device: torch.device) -> None:
        padded = config.model.max_text_len if pad_to_max else max(lengths)
        mean = sum(lengths) / len(lengths)
        self.flops = flops_a_pair(config.model, config.objectives, config.step, mean, padded)
        self.peak = peak_flops(device, config.run.precision)

    def at(self, pairs_per_second: float) -> dict[str, float]:
        """``teraflops_per_second``, and ``mfu`` (a fraction) if the device's peak is known."""
        rate = pairs_per_second * self.flops
        return {"teraflops_per_second": rate / 1e12} | ({} if self.peak is None else {"mfu": rate / self.peak})


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in "bfloat16" or "float32"; None if it is not in ``PEAKS``."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "float32"] for known, peaks in PEAKS.items() if known in name), None)
