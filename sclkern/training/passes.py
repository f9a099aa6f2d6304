"""Forward and backward passes of a batch: op by op, or as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sclkern.model import SCLModel
from sclkern.profiling import phase
from sclkern.step import CapturedStep, SCLLosses
from sclkern.training.config import PretrainConfig


class Passes:
    """Losses and gradients of batches, at the precision of a configuration.

    Args:
        model: on its device.
        config: of the run: ``run.precision``, ``run.accumulation`` and ``run.cuda_graphs`` are read.
        device: the model's.
    """

    def __init__(self, model: SCLModel, config: PretrainConfig, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.accumulation = config.run.accumulation
        self._precision = torch.bfloat16 if config.run.precision == "bfloat16" else None
        self._captured = None
        if config.run.cuda_graphs:
            self._captured = CapturedStep(model, precision=self._precision, scale=1 / self.accumulation)

    def forward(self, batch: dict[str, Any], seed: int) -> SCLLosses:
        """Compute the losses of a batch.

        Args:
            batch: as ``SCLModel.forward`` takes it, on any device.
            seed: seed of the masks and of dropout.

        Returns:
            The losses with their graph.
        """
        # Dropout draws from torch's generator: seeded for each micro-batch, it needs no state in the checkpoint.
        torch.manual_seed(seed)
        batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, self._precision, enabled=self._precision is not None):
            return self.model(batch, seed=seed)

    def forward_backward(self, batch: dict[str, Any], seed: int) -> SCLLosses:
        """Compute the losses of a micro-batch and add its share of the gradient to each parameter's ``.grad``.

        Args:
            batch: as in ``forward``.
            seed: as in ``forward``.

        Returns:
            The losses.
        """
        if self._captured is not None:
            return self._captured(batch, seed)
        losses = self.forward(batch, seed)
        with phase("backward"):
            (losses.total / self.accumulation).backward()
        return losses
