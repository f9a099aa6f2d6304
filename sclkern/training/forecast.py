"""What a run will need, estimated after its first steps: hours, and space on the disk."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from sclkern.training.config import RunConfig

# Steps that are looked at; the first of them compiles, and is left out.
STEPS = 20


class Forecast:
    """Counts the steps of this process.

    Args:
        run: of the configuration.
        directory: that the run writes.
    """

    def __init__(self, run: RunConfig, directory: Path) -> None:
        self.run = run
        self.directory = directory
        self._steps = 0
        self._start = 0.0

    def count_step(self, step: int, optimizer: torch.optim.Optimizer) -> str | None:
        """Count a step that has been taken.

        Args:
            step: its number.
            optimizer: whose parameters and moments a checkpoint holds.

        Returns:
            After ``STEPS`` steps what the run will need, in one line; else None.
        """
        self._steps += 1
        if self._steps == 1:
            self._start = time.perf_counter()
        if self._steps != STEPS or step >= self.run.max_steps:
            return None
        seconds = (time.perf_counter() - self._start) / (STEPS - 1)
        left = self.run.max_steps - step
        count, size = self.run.keep + 1, checkpoint_bytes(optimizer)
        free = shutil.disk_usage(self.directory).free
        space = f"{_gigabytes(free)} are free"
        if free < count * size:
            space += "; free more, or set a smaller run.keep"
        return (
            f"{left} steps left, {_duration(left * seconds)} at {seconds:.3g} s a step, without validations; "
            f"checkpoints take {_gigabytes(count * size)} ({count} of {_gigabytes(size)}), {space}"
        )


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters and of what an optimiser keeps of them, over all processes that share them."""
    kept = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # numel of a tensor in parts is that of the whole.
    return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *kept))


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
