"""One way to make an op of a launcher: schema, CUDA kernel, fake function, autograd, and the table of all ops.

Kernels are reached through ``kernels``, which imports a module of ``sclkern.kernels`` at its first use: sclkern
imports without Triton.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from sclkern.ops.dispatch import INTERPRETED_DTYPES, Choice, interpreted

_LIBRARY = torch.library.Library("sclkern", "FRAGMENT")
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Every public op by name; ``public_op`` fills it.
OPS: dict[str, Callable[..., Any]] = {}


class _Kernels:
    """The modules of ``sclkern.kernels`` as attributes, each imported at its first use."""

    def __getattr__(self, name: str) -> ModuleType:
        module = importlib.import_module(f"sclkern.kernels.{name}")
        setattr(self, name, module)
        return module


kernels = _Kernels()


def public_op(function: _Function) -> _Function:
    """Enter a public function into ``OPS``, the table behind ``sclkern.ops.explain``.

    Its module has a function ``plan``, or ``plan_<name>``, that takes the same arguments, checked, and returns the
    ``Choice`` on which the op acts; ``explain`` passes None for a required argument that it was not given. ``check``,
    or ``check_<name>``, raises for wrong arguments.
    """
    OPS[function.__name__] = function
    return function


def explain(op: str, *args: Any, **kwargs: Any) -> Choice:
    """The path that ``op`` takes for these arguments, with the reasons.

    The op itself acts on the same plan. Arguments that are not given are assumed to be supported, and the reasons name
    them: ``explain("bias_gelu", x)`` answers for any bias that the kernel takes.

    Args:
        op: name of a function of ``sclkern.ops``.
        *args: the arguments of the call, as the op takes them; the last ones may be left out.
        **kwargs: its keyword arguments; any may be left out.

    Returns:
        The path and the reasons; ``str()`` of it reads "triton: ..." or "eager: ...".

    Raises:
        TypeError: the op has no such argument, or an argument has the wrong type. ValueError: unknown op, no tensor,
            an argument that the op would refuse.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(sorted(OPS))}")
    function = OPS[op]
    module = inspect.getmodule(function)
    call = inspect.signature(function).bind_partial(*args, **kwargs)
    call.apply_defaults()
    missing = [name for name in call.signature.parameters if name not in call.arguments]
    plan, check = (getattr(module, f"{kind}_{op}", None) or getattr(module, kind) for kind in ("plan", "check"))
    if missing:
        choice: Choice = plan(**call.arguments, **dict.fromkeys(missing))
        return Choice(choice.path, (*choice.reasons, f"not given, assumed supported: {', '.join(missing)}"))
    check(**{name: call.arguments[name] for name in inspect.signature(check).parameters})
    return plan(**call.arguments)


def second_derivative_error(name: str) -> RuntimeError:
    """What every op raises where its backward is differentiated."""
    return RuntimeError(f'{name}: the kernel has no second derivative; backend="eager" has')


def register(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    fake_backward: Callable[..., Any] | None = None,
    *,
    outputs: str = "out",
    gradients: str = "",
    derive: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    finish: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    cpu: Callable[..., Any] | None = None,
    cpu_backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``torch.ops.sclkern.<name>`` and ``<name>_backward``, and connect them.

    The names of the backward's parameters say what it gets, and so what is saved: ``grad_<output>`` is the incoming
    gradient (None where nothing reads that output), ``needs_<input>`` whether that input needs a gradient; any other
    name is an input of the forward, one of ``outputs``, or a value of ``derive``. Outputs without a ``grad_`` parameter
    are not differentiable. The backward has no derivative of its own and says so.

    Args:
        name: of the op and of the public function.
        forward: runs the launchers; its annotations are the op's schema.
        fake: allocates what ``forward`` returns; it is called by keyword, so it names what it needs and takes ``**_``.
        backward: runs the launchers of the backward; annotated too. None for an op without gradient.
        fake_backward: allocates what ``backward`` returns, likewise.
        outputs: names of what ``forward`` returns, in its order, separated by spaces.
        gradients: names of the inputs that have a gradient, in the order in which ``backward`` returns them. It returns
            none for an optional input that was None.
        derive: from all inputs and outputs by name, values to save beside or in place of them.
        finish: from the results of ``backward``, the gradients; for results that two inputs share, because an op's
            results may not share memory.
        cpu: the forward on a CPU, for an op whose public function uses it there. Without it the op runs on a CPU only
            in Triton's interpreter.
        cpu_backward: the backward on a CPU.

    Returns:
        A function of the forward's arguments that calls the op with autograd at the least cost: torch's own autograd
        registration, which compiled code and function transforms need, takes 20 us longer.
    """
    op = _define(name, forward, fake, cpu)
    if backward is None:
        return op
    backward_op = _define(f"{name}_backward", backward, fake_backward, cpu_backward)
    setup, gradient = _autograd(op, backward_op, outputs.split(), gradients.split(), derive, finish)

    def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
        raise second_derivative_error(name)

    torch.library.register_autograd(f"sclkern::{name}", gradient, setup_context=setup, lib=_LIBRARY)
    torch.library.register_autograd(f"sclkern::{name}_backward", no_second_derivative, lib=_LIBRARY)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradient(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*inputs)
        return Function.apply(*inputs)

    return call


def _define(name: str, function: Callable[..., Any], fake: Any, cpu: Callable[..., Any] | None) -> Any:
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def launch(*arguments: Any) -> Any:
        # Triton launches on the current device, which may not be the tensors'.
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            return function(*arguments)

    def on_cpu(*arguments: Any) -> Any:
        return (launch if cpu is None or interpretable(*arguments) else cpu)(*arguments)

    _LIBRARY.impl(name, launch, "CUDA")
    if cpu is not None or interpreted():
        _LIBRARY.impl(name, on_cpu, "CPU")
    op = getattr(torch.ops.sclkern, name).default
    names = [argument.name for argument in op._schema.arguments]

    def fake_by_name(*arguments: Any) -> Any:
        return fake(**dict(zip(names, arguments, strict=True)))

    torch.library.register_fake(f"sclkern::{name}", fake_by_name, lib=_LIBRARY)
    return op


def interpretable(*arguments: Any) -> bool:
    """Whether Triton's interpreter runs the kernels, and takes the dtypes of these tensors."""
    floating = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    return interpreted() and all(tensor.dtype in INTERPRETED_DTYPES for tensor in floating)


def _autograd(
    op: Any, backward_op: Any, outputs: list[str], gradients: list[str],
    derive: Callable[[dict[str, Any]], dict[str, Any]] | None,
    finish: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None,
) -> tuple[Callable[..., None], Callable[..., Any]]:  # fmt: skip
    """The functions ``setup_context`` and ``backward`` of an op, from the names of its backward's parameters."""
    inputs = [argument.name for argument in op._schema.arguments]
    names = (*inputs, *outputs)
    parameters = {p.name: "Tensor" in str(p.type) for p in backward_op._schema.arguments}
    tensors = [n for n, is_tensor in parameters.items() if is_tensor and not n.startswith("grad_")]
    constants = [n for n, is_tensor in parameters.items() if not (is_tensor or n.startswith("needs_"))]
    needed = [n.removeprefix("needs_") for n in parameters if n.startswith("needs_")]
    not_differentiable = [i for i, output in enumerate(outputs) if f"grad_{output}" not in parameters]
    positions = [inputs.index(name) for name in gradients]
    incoming = [f"grad_{output}" for output in outputs]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        values = dict(zip(names, (*inputs, *results), strict=True))
        ctx.given = [inputs[i] is not None for i in positions]
        ctx.mark_non_differentiable(*[results[i] for i in not_differentiable])
        # Otherwise zeros are allocated and filled for every output that nothing reads.
        ctx.set_materialize_grads(False)
        if derive is not None:
            values |= derive(values)
        ctx.save_for_backward(*[values[name] for name in tensors])
        ctx.constants = {name: values[name] for name in constants}

    def gradient(ctx: Any, *grads: Tensor | None) -> Any:
        found: list[Tensor | None] = [None] * len(inputs)
        if all(grad is None for grad in grads):
            return tuple(found)
        needs = ctx.needs_input_grad
        values = dict(zip(tensors, ctx.saved_tensors, strict=True)) | ctx.constants
        values |= dict(zip(incoming, grads, strict=True))
        for name in needed:
            values[f"needs_{name}"] = needs[inputs.index(name)]
        arguments = [values[name] for name in parameters]
        if torch.is_grad_enabled():
            results = backward_op(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = backward_op(*arguments)
        remaining = iter(results if finish is None else finish(results))
        for position, given in zip(positions, ctx.given, strict=True):
            result = next(remaining) if given else None
            found[position] = result if needs[position] else None
        return tuple(found)

    return setup, gradient
