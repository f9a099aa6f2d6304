"""What the description of an op consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")

# Dimensions and options of a size by name, as records store them.
Values = Mapping[str, Any]
# Arguments of an op by keyword.
Inputs = dict[str, Any]
# Launches the backward kernels.
Backward = Callable[[], object]


class Cost(NamedTuple):
    """The least bytes and FLOPs of an op: every input and output once, matrix products only (a multiply-add is two)."""

    forward_bytes: float
    forward_flops: float
    backward_bytes: float = 0.0
    backward_flops: float = 0.0

    def of(self, pass_: str) -> tuple[float, float]:
        """(bytes, FLOPs) of one of ``PASSES``."""
        forward, backward = self[:2], self[2:]
        if pass_ == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if pass_ == "forward" else backward


@dataclass(frozen=True)
class Size:
    """A size at which an op is benchmarked.

    Attributes:
        name: short name in cases and tables, such as "325x13".
        values: what ``OpSpec.inputs`` and ``OpSpec.cost`` take.
        priority: 1 runs first, 3 last.
        dropout_p: dropout probability, for ops with dropout.
    """

    name: str
    values: dict[str, Any] = field(hash=False)
    priority: int
    dropout_p: float = 0.0


@dataclass(frozen=True)
class AccuracyShape:
    """A shape of the workload at which tests on a GPU compare an op with float64.

    Attributes:
        name: short name, unique within the op.
        values: what ``OpSpec.inputs`` takes.
        dropout_p: dropout probability, for ops with dropout.
        kernel_options: further arguments that select the kernel under test.
        float32: arguments that stay float32 beside half-precision ones.
        magnitude: largest intermediate value (score, logit) that the op holds in float32; rounding scales with it.
    """

    name: str
    values: dict[str, Any]
    dropout_p: float = 0.0
    kernel_options: dict[str, Any] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    magnitude: float = 1.0


@dataclass(frozen=True)
class OpSpec:
    """An op's inputs, sizes, cost and launchers.

    Attributes:
        name: the op's name in ``sclkern.ops``.
        definition: its eager definition, in ``sclkern.reference``.
        kernels: modules of ``sclkern.kernels`` that hold its kernels.
        inputs: ``inputs(values, dtype, device)`` makes the arguments at a size, without dropout.
        small_inputs: ``small_inputs(length, device)`` makes float32 arguments of a few elements for contract tests;
            ``length`` is the dimension that differs from step to step.
        cost: ``cost(values, element_size)`` is the least cost at a size, with ``element_size`` bytes an element.
        launch: ``launch(inputs, dropout_p, seed)`` runs the forward launchers on what ``inputs`` made, also on the meta
            device, and returns what runs the backward launchers, None without a backward. Other configurations than
            the selected ones are tried inside ``sclkern.kernels.config.override``.
        sizes: sizes of benchmarks on a GPU.
        cpu_sizes: smaller sizes, for benchmarks on a CPU.
        accuracy: shapes at which tests on a GPU compare the op with float64.
        frozen: floating arguments by which the op has no gradient.
        detached: arguments that pre-training detaches, so that benchmarks leave their gradients out.
        float32: parameters that stay float32 beside half-precision features, as under autocast.
        dropout: whether the op takes ``dropout_p`` and ``seed``.
        differentiable: whether the op has a backward.
    """

    name: str
    definition: Callable[..., object]
    kernels: tuple[str, ...]
    inputs: Callable[[Values, torch.dtype, str], Inputs]
    small_inputs: Callable[[int, str], Inputs]
    cost: Callable[[Values, int], Cost]
    launch: Callable[[Inputs, float, Tensor | None], Backward | None]
    sizes: tuple[Size, ...]
    cpu_sizes: tuple[Size, ...]
    accuracy: tuple[AccuracyShape, ...] = ()
    frozen: tuple[str, ...] = ()
    detached: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    dropout: bool = False
    differentiable: bool = True

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that can be timed."""
        return PASSES if self.differentiable else PASSES[:1]

    def sizes_on(self, gpu: bool) -> tuple[Size, ...]:
        """The benchmark's sizes for a GPU or for a CPU."""
        return self.sizes if gpu else self.cpu_sizes

    def leaves(self, inputs: Inputs) -> tuple[str, ...]:
        """Names of the arguments whose gradients pre-training computes, in the order of ``inputs``."""
        without = {*self.frozen, *self.detached}
        return tuple(
            name
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name not in without
        )


def kernels(module: str) -> ModuleType:
    """A module of ``sclkern.kernels``, imported when it is needed: Triton is optional."""
    return import_module(f"sclkern.kernels.{module}")


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers, drawn in float32."""
    return (scale * torch.randn(shape, device=device)).to(dtype)


def seed_tensor(device: str) -> Tensor:
    """(1,) int64: a fixed seed of ops that draw."""
    return torch.tensor([7], device=device)
