"""Forward and backward passes of a batch: op by op, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sclkern.data.transforms import normalize_images
from sclkern.model import SCLModel
from sclkern.profiling import phase
from sclkern.step import CapturedStep, SCLLosses, contrast_batch, target_counts
from sclkern.training.config import PretrainConfig
from sclkern.training.observing import Meetings
from sclkern.training.parallel import Parallel
from sclkern.training.world import World

# What is large of a batch.
_IMAGES = ("image", "false_image")


class Passes:
    """Losses and gradients of batches, at the precision of a configuration.

    Args:
        model: on its device.
        config: of the run: ``run.precision``, ``run.accumulation`` and ``run.cuda_graphs`` are read.
        device: the model's.
        parallel: how processes share the model; None is this process by itself.

    Attributes:
        model: the model that ``forward`` runs.
        device: of the model.
        meetings: times the waits for other processes.
    """

    model: SCLModel
    device: torch.device
    meetings: Meetings

    def __init__(
        self, model: SCLModel, config: PretrainConfig, device: torch.device, parallel: Parallel | None = None
    ) -> None:
        self.model = model
        self.parallel = parallel or Parallel(model, World())
        self.device = device
        self.meetings = Meetings(device, alone=self.parallel.world.size == 1)
        self.accumulation = config.run.accumulation
        # Copies of a batch run beside the step before, whose kernels the host has launched already.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._precision = torch.bfloat16 if config.run.precision == "bfloat16" else None
        self._captured = None
        if config.run.cuda_graphs:
            self._captured = CapturedStep(self.model, precision=self._precision, scale=1 / self.accumulation)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside, ``model`` has all of its weights in this process, which computes by itself; entered by all."""
        trained = self.model
        with self.parallel.whole_model() as self.model:
            yield
        self.model = trained

    def forward(self, batch: dict[str, Any], seed: int) -> SCLLosses:
        """Compute the losses of a batch.

        Args:
            batch: as ``SCLModel.forward`` takes it, on any device.
            seed: seed of the masks and of dropout.

        Returns:
            The losses with their graph.
        """
        return self._run(self.model, copied(batch, self.device, self._copies), seed)

    def forward_backward(self, batch: dict[str, Any], seed: int, *, last: bool = True) -> SCLLosses:
        """Compute the losses of a micro-batch and add its share of the gradient to each parameter's ``.grad``.

        Args:
            batch: as in ``forward``.
            seed: as in ``forward``.
            last: whether it is the last micro-batch of a step, after which the processes average their gradients.

        Returns:
            The losses.
        """
        batch = copied(batch, self.device, self._copies)
        counts = None
        if self.parallel.world.size > 1:
            counts = target_counts(self.model.config, self.model.objectives, [batch], seed)
        if self._captured is not None:
            return self._captured(batch, seed, counts=counts)
        with self.parallel.accumulating(last):
            losses = self._run(self.parallel.call, batch, seed, counts=counts)
            with phase("backward"), self.meetings.backward(losses.total):
                (losses.total / self.accumulation).backward()
        return losses

    def contrast_all(self, batches: list[dict[str, Any]], seed: int) -> Iterator[SCLLosses]:
        """As ``forward_backward`` of each micro-batch of a step, whose contrasts see all of them over all processes.

        Args:
            batches: all micro-batches of the step; those on the host are copied when it is their turn, in either pass.
            seed: as in ``forward``.

        Yields:
            The losses of each micro-batch.
        """
        model = self.model
        # The images of one micro-batch at a time are on the device.
        captions = [{name: value for name, value in batch.items() if name not in _IMAGES} for batch in batches]
        captions = [copied(of_batch, self.device, self._copies) for of_batch in captions]
        counts = target_counts(model.config, model.objectives, captions, seed)

        def copy(batch: Mapping[str, Any]) -> dict[str, Any]:
            return copied(batch, self.device, self._copies)

        with phase("contrastive batch"), self._autocast():
            contrasts = contrast_batch(model, batches, seed, copied=copy)
        for number, (batch, contrast) in enumerate(zip(batches, contrasts, strict=True)):
            with self.parallel.accumulating(last=number == len(batches) - 1):
                losses = self._run(self.parallel.call, copy(batch), seed, counts=counts, contrast=contrast)
                with phase("backward"), self.meetings.backward(losses.total):
                    (losses.total / len(batches)).backward()
            yield losses

    def _run(self, model: Callable[..., SCLLosses], batch: dict[str, Any], seed: int, **options: Any) -> SCLLosses:
        # What draws from torch's generator, seeded for each step, needs no state in the checkpoint.
        torch.manual_seed(seed)
        with self._autocast():
            return model(batch, seed=seed, **options)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._precision, enabled=self._precision is not None)


def copied(batch: Mapping[str, Any], device: torch.device, stream: torch.cuda.Stream | None) -> dict[str, Any]:
    """A batch on the device, copied from pinned memory on a stream of its own, its images normalised there.

    Args:
        batch: tensors and other values by name; an ``image`` or ``false_image`` of uint8 becomes float32.
        device: where the tensors are wanted.
        stream: of the copies; None copies on the current one.

    Returns:
        The batch. What the current stream runs from now on waits for the copies.
    """

    def copy(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.to(device, non_blocking=True)
        return normalize_images(moved) if name in ("image", "false_image") else moved

    if stream is None:
        return {name: copy(name, value) for name, value in batch.items()}
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        moved = {name: copy(name, value) for name, value in batch.items()}
    current.wait_stream(stream)
    for name, value in moved.items():
        # Its memory belongs to the other stream, which must not reuse it while this one reads it.
        if isinstance(value, Tensor) and value is not batch[name]:
            value.record_stream(current)
    return moved
