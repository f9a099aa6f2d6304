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
        # Copies of a batch run beside the step before, whose kernels the host has launched already.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
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
        batch = copied(batch, self.device, self._copies)
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
            return self._captured(copied(batch, self.device, self._copies), seed)
        losses = self.forward(batch, seed)
        with phase("backward"):
            (losses.total / self.accumulation).backward()
        return losses


def copied(batch: dict[str, Any], device: torch.device, stream: torch.cuda.Stream | None) -> dict[str, Any]:
    """A batch on the device, copied from pinned memory on a stream of its own.

    Args:
        batch: tensors and other values by name.
        device: where the tensors are wanted.
        stream: of the copies; None copies on the current one.

    Returns:
        The batch. What the current stream runs from now on waits for the copies.
    """

    def copy(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    if stream is None:
        return {name: copy(value) for name, value in batch.items()}
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        moved = {name: copy(value) for name, value in batch.items()}
    current.wait_stream(stream)
    for name, value in moved.items():
        # Its memory belongs to the other stream, which must not reuse it while this one reads it.
        if isinstance(value, Tensor) and value is not batch[name]:
            value.record_stream(current)
    return moved
