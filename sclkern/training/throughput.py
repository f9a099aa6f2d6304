"""How near a run comes to what its machine can multiply."""

from __future__ import annotations

import torch

from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.config import StepConfig
from sclkern.step.flops import Counter
from sclkern.step.plan import make_plan
from sclkern.training.config import PretrainConfig

# Dense matrix products a second as NVIDIA's data sheets give them, in bfloat16 and in float32 on the ordinary cores.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
}


def flops_a_pair(
    config: SCLConfig, objectives: ObjectiveConfig, step: StepConfig, caption_tokens: float, padded_tokens: int
) -> float:
    """FLOPs of the step for one pair, forward and backward, by its plan; nothing that is computed again counts.

    Args:
        caption_tokens: mean of the captions. padded_tokens: what a batch is padded to where it is not packed.
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
    """What a rate of pairs is in arithmetic.

    Args:
        lengths: tokens of a sample of the captions. pad_to_max: whether all are padded to the longest there may be.
    """

    def __init__(self, config: PretrainConfig, lengths: list[int], pad_to_max: bool, device: torch.device) -> None:
        padded = config.model.max_text_len if pad_to_max else max(lengths)
        mean = sum(lengths) / len(lengths)
        self.flops = flops_a_pair(config.model, config.objectives, config.step, mean, padded)
        self.peak = peak_flops(device, config.run.precision)

    def at(self, pairs_per_second: float) -> dict[str, float]:
        """``teraflops_per_second``, and ``mfu`` (a share of 1) where the device's peak is known."""
        rate = pairs_per_second * self.flops
        return {"teraflops_per_second": rate / 1e12} | ({} if self.peak is None else {"mfu": rate / self.peak})


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOPs a second of a device in "bfloat16" or "float32", None where no data sheet is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "float32"] for known, peaks in PEAKS.items() if known in name), None)
