"""Forward and backward of a step as CUDA graphs: one launch in place of some thousands.

At small batches a GPU waits for Python to launch the next kernel. A graph is recorded once for each shape of batch
(``sclkern.data.buckets`` keeps them few) and replayed with the inputs, seed and weights of the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sclkern.errors import UserError
from sclkern.models.network import SCLNetwork
from sclkern.objectives.config import ObjectiveConfig
from sclkern.profiling import phase
from sclkern.step.config import StepConfig
from sclkern.step.losses import SCLLosses, check_step, take_step

# Before the kind, in the name of an input that holds a count.
_COUNT = "count of "
# Runs before a graph is recorded: kernels compile and libraries allocate in the first.
WARMUP = 2


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Record what is launched inside; after a failure, what follows runs as before.

    ``torch.cuda.graph`` leaves a capture that fails half open: its stream stays the current one, the allocator and the
    generator believe that they are still recorded.

    Args:
        graph: what is recorded into.
        pool: of ``torch.cuda.graph_pool_handle``; None is one of its own.
        stream: on which it is recorded; None is torch's for captures.
    """
    before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        # A loader's thread that pins memory meanwhile is no part of it.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        device = before.device_index
        for close in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            # It refuses where torch did so itself.
            with suppress(RuntimeError):
                close(device, pool)
        generator = torch.cuda.default_generators[device]
        fresh = torch.Generator(f"cuda:{device}").manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise


class TrainingModel(Protocol):
    """What ``sclkern.SCLModel`` adds to an ``SCLNetwork``.

    Attributes:
        objectives: the recipe and its options.
        step: how a step is executed.
    """

    objectives: ObjectiveConfig
    step: StepConfig


@dataclass(frozen=True)
class Recording:
    """A recorded step.

    Attributes:
        inputs: the tensors that it reads, to be filled before a replay, and the plain values of the batch.
        replay: runs it.
        losses: the tensors that it writes.
    """

    inputs: dict[str, Any]
    replay: Callable[[], None]
    losses: SCLLosses


def check_capture(device: torch.device, step: StepConfig) -> None:
    """Raise a ``UserError`` unless a step can be captured: not on a CPU, and not with recomputed blocks, which read the
    state of the generator back.

    Args:
        device: of the model.
        step: how a step is executed.
    """
    if device.type != "cuda":
        raise UserError(f"cuda_graphs: needs a GPU, the device is {device}; set it to false")
    if step.checkpoint_blocks:
        raise UserError("cuda_graphs: cannot be had with step.checkpoint_blocks=true; set one of them to false")


class CapturedStep:
    """Losses of a step, and its gradients added to each parameter's ``.grad``, by the replay of a CUDA graph.

    Gradients live in buffers of their own: ``zero_grad`` with or without ``set_to_none`` works, and so does
    accumulation over calls. The ``.grad`` of a parameter that no loss reaches is left alone.

    Args:
        model: an ``SCLModel`` on a GPU; its parameters must stay the same tensors.
        precision: dtype of autocast, None for none.
        scale: factor of the loss before the backward: 1 / (calls that are accumulated).

    Raises:
        UserError: see ``check_capture``.
    """

    def __init__(self, model: TrainingModel, *, precision: torch.dtype | None = None, scale: float = 1.0) -> None:
        self.model, self.precision, self.scale = model, precision, scale
        # The same object, as the network that it is.
        self.network = cast(SCLNetwork, model)
        self.device = next(self.network.parameters()).device
        self._check()
        self._seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._recorded: dict[tuple[Any, ...], Recording] = {}
        # The buffers of what has a gradient, by name; known once a step has run.
        self._gradients: dict[str, Tensor] = {}
        self._pool: Any = None

    def __call__(self, batch: Mapping[str, Any], seed: int, *, counts: Mapping[str, Tensor] | None = None) -> SCLLosses:
        """Take a step.

        Args:
            batch: as ``SCLModel.forward`` takes it, on any device; copied.
            seed: of masks and dropout.
            counts: as ``SCLModel.forward`` takes them; copied.

        Returns:
            The losses, detached, tensors of their own.

        Raises:
            ValueError: as ``run_step``.
        """
        model, network = self.model, self.network
        check_step(network.config, model.objectives, batch)
        # No step reads the other entries of a loader's batch, such as names.
        batch = {name: value for name, value in batch.items() if isinstance(value, (Tensor, int))}
        batch |= {_COUNT + kind: count for kind, count in (counts or {}).items()}
        shapes = {k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in batch.items()}
        # What was recorded with other settings of the model must not be replayed.
        execution = network.execution.backend, network.execution.layer_norm
        key = (network.training, model.step, model.objectives, *execution, *sorted(shapes.items()))
        if key not in self._recorded:
            self._recorded[key] = self._record(batch)
        recording = self._recorded[key]
        self._fill(recording.inputs, batch, seed)
        self._attach()
        recording.replay()
        return _map_losses(recording.losses, Tensor.clone)

    def _record(self, batch: Mapping[str, Any]) -> Recording:
        self._check()
        inputs = {k: v.to(self.device, copy=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        parameters: dict[str, nn.Parameter] = dict(self.network.named_parameters())
        held = {name: parameter.grad for name, parameter in parameters.items()}
        self.network.zero_grad(set_to_none=True)
        self._warm_up(inputs)
        for name, parameter in parameters.items():
            if parameter.grad is not None and name not in self._gradients:
                self._gradients[name] = torch.zeros_like(parameter)
            parameter.grad = held[name]
        # Recorded on the buffers, so that the backward adds to them in place.
        self._attach()
        replay, losses = self._capture(lambda: self._step(inputs))
        return Recording(inputs, replay, losses)

    def _step(self, inputs: Mapping[str, Any]) -> SCLLosses:
        network, objectives = self.network, self.model.objectives
        counts = {name.removeprefix(_COUNT): value for name, value in inputs.items() if name.startswith(_COUNT)}
        batch = {name: value for name, value in inputs.items() if not name.startswith(_COUNT)}
        # Casts of weights that autocast would keep belong to the weights of one replay.
        enabled = self.precision is not None
        with torch.autocast(self.device.type, self.precision, enabled=enabled, cache_enabled=False):
            losses = take_step(network, objectives, self.model.step, batch, self._seed, counts=counts or None)
        with phase("backward"):
            (losses.total * self.scale).backward()
        return _map_losses(losses, Tensor.detach)

    def _fill(self, inputs: dict[str, Any], batch: Mapping[str, Any], seed: int) -> None:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value, non_blocking=True)
        self._seed.fill_(seed)
        # Dropout draws from torch's generator, whose seed a replay reads.
        torch.manual_seed(seed)

    def _attach(self) -> None:
        """Make the buffers the ``.grad`` of their parameters, with the values that these have."""
        cleared = []
        for name, buffer in self._gradients.items():
            parameter = self.network.get_parameter(name)
            if parameter.grad is None:
                cleared.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if cleared:
            torch._foreach_zero_(cleared)

    # -- the device ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        check_capture(self.device, self.model.step)

    def _warm_up(self, inputs: Mapping[str, Any]) -> None:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self._step(inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)

    def _capture(self, step: Callable[[], SCLLosses]) -> tuple[Callable[[], None], SCLLosses]:
        if self._pool is None:
            # Graphs never run at the same time: they share the memory of what a step holds.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self._pool):
            losses = step()
        return graph.replay, losses


def _map_losses(losses: SCLLosses, change: Callable[[Tensor], Tensor]) -> SCLLosses:
    return SCLLosses(
        change(losses.total),
        {name: change(loss) for name, loss in losses.losses.items()},
        {name: change(metric) for name, metric in losses.metrics.items()},
    )
