"""Arithmetic rate of a run, and its share of the device's peak (MFU)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.config import StepConfig
from sclkern.step.contrastive import contrasted_objectives
from sclkern.step.flops import Counter
from sclkern.step.plan import make_plan
from sclkern.training.config import PretrainConfig

# Dense FLOP/s in bfloat16 (tensor cores, sums in float32) and in float32 (CUDA cores), by the name that torch gives a
# device, without "NVIDIA" and "GeForce". Data sheets of NVIDIA name bfloat16 with sparsity: half of that is dense.
PEAKS = {
    r"B200": (2250e12, 75e12),  # data sheet of the HGX platform: 36 PFLOP/s sparse and 600 TFLOP/s for eight
    r"H200": (989e12, 67e12),  # data sheet of the H200, SXM
    r"H200 NVL": (835e12, 60e12),  # the same data sheet
    r"H100 80GB HBM\w+": (989e12, 67e12),  # data sheet of the H100, SXM
    r"H100 NVL": (835e12, 60e12),  # the same data sheet
    r"H100 PCIe": (756e12, 51e12),  # product brief of the H100 PCIe
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": (312e12, 19.5e12),  # data sheet of the A100
    r"L40S": (362e12, 91.6e12),  # data sheet of the L40S
    r"RTX 5090": (209.5e12, 104.8e12),  # RTX Blackwell architecture white paper, appendix A
    r"RTX 4090": (165.2e12, 82.6e12),  # Ada architecture white paper, appendix A
    r"RTX 3090": (71e12, 35.6e12),  # GA102 architecture white paper, appendix A
}


def flops_a_pair(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    caption_tokens: float,
    padded_tokens: int,
    *,
    device: str | None = None,
    backend: str = "auto",
    num_frames: int = 1,
) -> float:
    """Count the FLOPs of the step for one pair, forward and backward, from its plan.

    What activation checkpointing computes again does not count.

    Args:
        config: architecture.
        objectives: losses of the step.
        step: how the step is executed.
        caption_tokens: mean number of tokens of the captions.
        padded_tokens: tokens that a caption is padded to where the step does not pack.
        device: type of the device that trains, as in ``sclkern.step.flops.Counter``.
        backend: of the model.
        num_frames: of every clip; 1 for images.

    Returns:
        FLOPs, a multiplication and an addition counted as two.
    """
    counter = Counter(
        config,
        objectives,
        make_plan(objectives, step),
        caption_tokens=round(caption_tokens),
        padded_tokens=padded_tokens,
        num_frames=num_frames,
        device=device,
        backend=backend,
    )
    return sum(part.total for part in counter.parts())


def first_pass_flops(
    config: PretrainConfig,
    caption_tokens: float,
    padded_tokens: int,
    *,
    num_frames: int = 1,
    device: str | None = None,
) -> float:
    """Count the FLOPs, for one pair, of the first pass of a contrastive batch: its features, without a backward.

    Args:
        config: of the run.
        caption_tokens: mean number of tokens of the captions.
        padded_tokens: tokens that a caption is padded to where the step does not pack.
        num_frames: of every clip; 1 for images.
        device: type of the device that trains, as in ``sclkern.step.flops.Counter``.

    Returns:
        FLOPs; 0 without a contrastive batch, and for a step of one micro-batch, which needs no first pass.
    """
    objectives, run = config.objectives, config.run
    if run.contrastive_batch is None or run.accumulation == 1:
        return 0.0
    names = contrasted_objectives(config.model, objectives, run.contrastive_batch, num_frames)
    if not names:
        return 0.0
    part = replace(objectives, recipe=names)
    counter = Counter(
        config.model,
        part,
        make_plan(part, config.step, whole=objectives),
        caption_tokens=round(caption_tokens),
        padded_tokens=padded_tokens,
        num_frames=num_frames,
        device=device,
        backend=run.backend,
    )
    return sum(one.flops for one in counter.parts())


class Throughput:
    """Converts pairs per second to FLOP/s and MFU.

    Args:
        config: configuration of the run.
        lengths: tokens of a sample of the captions.
        pad_to_max: whether captions are padded to ``max_text_len``.
        device: device that trains.
        shares: share of the steps whose samples have so many frames; 1 for images.

    Attributes:
        flops: of the step for one pair, on average; what is computed a second time does not count.
        first_pass: FLOPs of the first pass of a contrastive batch for one pair, on average.
        num_frames: of the samples that have the most.
        peak: FLOP/s that the device can reach; None if it is not known.
    """

    flops: float
    first_pass: float
    num_frames: int
    peak: float | None

    def __init__(
        self,
        config: PretrainConfig,
        lengths: list[int],
        pad_to_max: bool,
        device: torch.device,
        shares: Mapping[int, float] | None = None,
    ) -> None:
        shares = shares or {1: 1.0}
        padded = config.model.max_text_len if pad_to_max else max(lengths)
        mean = sum(lengths) / len(lengths)
        run: dict[str, Any] = {"device": device.type, "backend": config.run.backend}
        sections = config.model, config.objectives, config.step
        self.flops = sum(
            share * flops_a_pair(*sections, mean, padded, num_frames=frames, **run) for frames, share in shares.items()
        )
        self.first_pass = sum(
            share * first_pass_flops(config, mean, padded, num_frames=frames, device=device.type)
            for frames, share in shares.items()
        )
        self.num_frames = max(shares)
        self.peak = peak_flops(device, config.run.precision)

    def at(self, pairs_per_second: float, devices: int = 1) -> dict[str, float]:
        """Arithmetic of all devices together.

        Args:
            pairs_per_second: of all devices.
            devices: their number.

        Returns:
            ``teraflops_per_second``, and ``mfu`` (a fraction) if the device's peak is known.
        """
        rate = pairs_per_second * self.flops
        return {"teraflops_per_second": rate / 1e12} | (
            {} if self.peak is None else {"mfu": rate / devices / self.peak}
        )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in "bfloat16" or "float32"; None if it is not in ``PEAKS``, such as part of a GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next(
        (peaks[precision == "float32"] for known, peaks in PEAKS.items() if re.fullmatch(known, name, re.IGNORECASE)),
        None,
    )


def precision_remark(device: torch.device, precision: str) -> str | None:
    """What a run in float32 leaves unused of a GPU.

    Args:
        device: that trains.
        precision: of the run.

    Returns:
        A sentence with the remedy; None where matrix products use tensor cores, or the device has none for bfloat16.
    """
    if device.type != "cuda" or precision != "float32" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return None
    peaks = peak_flops(device, "float32"), peak_flops(device, "bfloat16")
    rates = (
        "" if None in peaks else " (at most {:.3g} of {:.3g} TFLOP/s)".format(*(peak / 1e12 for peak in peaks if peak))
    )
    return (
        f"run.precision=float32 computes matrix products without tensor cores{rates}; run.precision=bfloat16 trains "
        "several times as fast"
    )
