"""The check of a case against float64, on the inputs and in the process in which it is timed afterwards."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness.implementations import Implementation, definition
from benchmarks.harness.op_cases import Case
from sclkern.tools.specs import SPECS, Size

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SEED = 11
# The definition holds some ten N x N matrices in float64: a larger loss is checked with this many rows.
MAX_CHECKED_ROWS = 16384


class WrongResultError(AssertionError):
    """An implementation is further from float64 than rounding explains: it is not timed."""


def make_inputs(op: str, size: Size, dtype: torch.dtype, without: Sequence[str] = ()) -> dict:
    """The op's inputs at a size, the same every time, with gradients where pre-training computes them.

    Args:
        op: name of the op.
        size: its size.
        dtype: of the features.
        without: arguments to leave out.
    """
    torch.manual_seed(SEED)
    spec = SPECS[op]
    inputs = spec.inputs(size.values, dtype, DEVICE)
    for name in spec.leaves(inputs):
        inputs[name].requires_grad_()
    return {name: value for name, value in inputs.items() if name not in without}


def leaves(inputs: dict) -> list[str]:
    """Names of the inputs that get a gradient."""
    return [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]


def output_gradient(out: Tensor) -> Tensor:
    """The gradient of the output, the same for every implementation."""
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    return torch.randn(out.shape, generator=generator, device=DEVICE, dtype=torch.float32).to(out.dtype)


def evaluate(run: Callable, inputs: dict, dropout_p: float, backward: bool) -> dict[str, Tensor]:
    """Output and gradients by name.

    Args:
        run: ``run(inputs, dropout_p, seed)`` of an implementation.
        inputs: of ``make_inputs``.
        dropout_p: dropout probability, with a fixed seed.
        backward: whether gradients are computed.
    """
    seed = torch.tensor([SEED], device=DEVICE) if dropout_p else None
    result = run(inputs, dropout_p, seed)
    outputs = list(result) if isinstance(result, tuple) else [result]
    names = leaves(inputs)
    if not names or not backward:
        return {f"out {i}": tensor.detach() for i, tensor in enumerate(outputs)}
    out = outputs[0]
    gradients = torch.autograd.grad(out, [inputs[name] for name in names], output_gradient(out))
    return {"out": out.detach(), **dict(zip((f"gradient of {name}" for name in names), gradients, strict=True))}


@functools.lru_cache(maxsize=4)
def _exact(
    op: str, size: Size, dtype: torch.dtype, dropout_p: float, without: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """The definition's results in float64, and the errors of the definition in ``dtype``, both by name."""
    inputs = make_inputs(op, size, dtype)
    for name in without:
        # The definition takes None for an argument that is left out.
        inputs[name] = None
    eager = evaluate(definition(op), inputs, dropout_p, True)
    names = leaves(inputs)
    wide = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    wide = {k: v.requires_grad_() if k in names else v for k, v in wide.items()}
    # The rounding of the output's gradient to dtype belongs to the input, not to the error.
    truth = evaluate(_rounding_gradient(definition(op), dtype), wide, dropout_p, True)
    return truth, {name: errors(eager[name], truth[name]) for name in truth}


def _rounding_gradient(run: Callable, dtype: torch.dtype) -> Callable:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, gradient):
            return gradient.to(dtype).to(gradient.dtype)

    def rounded(inputs: dict, dropout_p: float, seed: Tensor | None):
        result = run(inputs, dropout_p, seed)
        return Round.apply(result) if isinstance(result, Tensor) and result.requires_grad else result

    return rounded


def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root mean square error, in units of the largest true value; integers must be equal."""
    if not truth.is_floating_point():
        return (0.0, 0.0) if torch.equal(result, truth) else (math.inf, math.inf)
    if result.shape != truth.shape:
        return math.inf, math.inf
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = (result.double() - truth).abs() / scale
    return difference.max().item(), difference.square().mean().sqrt().item()


def verify(case: Case) -> dict:
    """Compare a case with float64; the measure is the definition's own error in the same dtype.

    The root mean square error may be 1.5 times the definition's plus a quarter of the dtype's rounding step, or a whole
    step for a single number, which is no mean. The largest error may be four times the definition's plus four steps,
    which one wrong row exceeds. Both are multiplied by the implementation's ``slack``.

    Args:
        case: what is to be timed.

    Returns:
        "error", the largest root mean square error, "eager_error", that of the definition beside it, and "checked_at",
        the name of the size.

    Raises:
        WrongResultError: a result is further off, or not finite.
    """
    size = case.size
    if size.values.get("N", 0) > MAX_CHECKED_ROWS:
        rows = MAX_CHECKED_ROWS
        size = Size(str(rows), {**size.values, "N": rows}, size.priority, size.dropout_p)
    return _verify(case.op, size, case.dtype, case.implementation)


@functools.lru_cache(maxsize=16)
def _verify(op: str, size: Size, dtype: torch.dtype, implementation: Implementation) -> dict:
    run = prepare(op, size, dtype, implementation, repeat_backward=False)
    step = torch.finfo(dtype).eps
    worst, of_eager = 0.0, 0.0
    for dropout_p in {0.0, size.dropout_p if implementation.seeded else 0.0}:
        truth, eager_errors = _exact(op, size, dtype, dropout_p, implementation.without)
        inputs = make_inputs(op, size, dtype, implementation.without)
        for name, value in evaluate(run, inputs, dropout_p, implementation.backward).items():
            name = "out" if name == "out 0" and name not in truth else name
            largest, square = errors(value, truth[name])
            eager_largest, eager_square = eager_errors[name]
            rounding = step if value.numel() == 1 else step / 4
            slack = implementation.slack
            bounds = slack * (4 * eager_largest + 4 * step), slack * (1.5 * eager_square + rounding)
            if not (largest <= bounds[0] and square <= bounds[1]):
                raise WrongResultError(
                    f"{op} {size.name} by {implementation.name}: {name} is off by {largest:.2e} at most and "
                    f"{square:.2e} in root mean square, allowed {bounds[0]:.2e} and {bounds[1]:.2e}; not timed"
                )
            if square >= worst:
                worst, of_eager = square, eager_square
    return {"error": worst, "eager_error": of_eager, "checked_at": size.name}


@functools.lru_cache(maxsize=2)
def prepare(
    op: str, size: Size, dtype: torch.dtype, implementation: Implementation, repeat_backward: bool
) -> Callable[..., object]:
    """The implementation's function, compiled where it is to be.

    Args:
        op: name of the op; with ``size`` and ``dtype`` what a compiled function is kept for.
        size: size of the op.
        dtype: of the features.
        implementation: what is run.
        repeat_backward: the backward runs more than once behind one forward.
    """
    if not implementation.compiled:
        return implementation.run
    torch.compiler.reset()
    compiled = torch.compile(implementation.run, dynamic=False)

    def run(inputs: dict, dropout_p: float, seed: Tensor | None):
        with torch._functorch.config.patch(donated_buffer=not repeat_backward):
            return compiled(inputs, dropout_p, None)

    return run


def clear_caches() -> None:
    """Forget earlier checks, so that the next one runs again."""
    for cached in (_verify, _exact, prepare):
        cached.cache_clear()
