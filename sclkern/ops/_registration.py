"""One way to make an op of a launcher: schema, CUDA kernel, fake function, autograd, and the table of all ops.

Kernels are reached through ``kernels``, which imports a module of ``sclkern.kernels`` at its first use: sclkern
imports without Triton.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from sclkern.ops.dispatch import (
    INTERPRETED_DTYPES,
    PLAIN_TENSORS,
    Choice,
    interpreted,
    logged,
    may_read,
    resolve_backend,
)

_LIBRARY = torch.library.Library("sclkern", "FRAGMENT")
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Every public op by name; ``public_op`` fills it.
OPS: dict[str, Callable[..., Any]] = {}
_PARAMETERS: dict[str, tuple[str, ...]] = {}
# Ops whose checks may read values, and devices where they do not.
_READERS: set[str] = set()
SETTLED_ON = {"cuda"}
# The choices of ``choose``, of no more calls than this.
MAX_CHOICES = 4096
_choices: dict[Any, Choice] = {}
_profiler_enabled = torch._C._autograd._profiler_enabled
# The dispatch keys that a thread includes, outside of modes and tracers; the second are those of inference mode.
_included = torch._C._dispatch_tls_local_include_set
_BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_USUAL = {
    (_BELOW | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)).raw_repr(),
    _BELOW.raw_repr(),
}
_PLAIN = {bool, int, float, str, type(None), torch.device, *PLAIN_TENSORS}
_described = operator.attrgetter("shape", "dtype", "device", "requires_grad")
# By the types of arguments, what picks the tensors and what picks the others.
_layouts: dict[tuple[type, ...], Any] = {}


class _Kernels:
    """The modules of ``sclkern.kernels`` as attributes, each imported at its first use."""

    def __getattr__(self, name: str) -> ModuleType:
        module = importlib.import_module(f"sclkern.kernels.{name}")
        setattr(self, name, module)
        return module


kernels = _Kernels()


def public_op(function: _Function) -> _Function:
    """Enter a public function into ``OPS``, the table behind ``sclkern.ops.explain``.

    Its module has a function ``plan``, or ``plan_<name>``, that takes the same arguments by keyword, checked, and
    returns the ``Choice`` on which the op acts; ``explain`` passes None for a required argument that it was not given.
    ``check``, or ``check_<name>``, takes them in their order without ``backend``, and raises for wrong ones. The
    function hands both to ``choose``.
    """
    OPS[function.__name__] = function
    _PARAMETERS[function.__name__] = tuple(inspect.signature(function).parameters)
    if "may_read" in function.__globals__:
        _READERS.add(function.__name__)
    return function


def choose(op: str, check: Callable[..., None], plan: Callable[..., Choice], *values: Any) -> str:
    """Check the arguments of an op and take its path; on a GPU once for all calls that
    differ in the values of their tensors alone.

    Args:
        op: name of the op.
        check: its checks.
        plan: its plan.
        *values: its arguments, in the order of its parameters.

    Returns:
        The path.
    """
    key = None if torch.compiler.is_compiling() else _signature(op, values)
    choice = _choices.get(key)
    if choice is None:
        check(*values[:-1])
        choice = logged(op, plan(**dict(zip(_PARAMETERS[op], values, strict=True))))
        if key is not None:
            if len(_choices) >= MAX_CHOICES:
                _choices.clear()
            _choices[key] = choice
    return choice.path


def _signature(op: str, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that checks and plans ask for; None where that is the values of tensors, or sizes that are no numbers."""
    # The types are part of it, because 1, 1.0 and True are equal.
    kinds = tuple(map(type, values))
    if (sorted_out := _layouts.get(kinds)) is None:
        places = [i for i, kind in enumerate(kinds) if kind in PLAIN_TENSORS]
        if not places or not set(kinds) <= _PLAIN:
            return None
        sorted_out = _layouts[kinds] = _picker(places), _picker([i for i in range(len(kinds)) if i not in places])
    tensors, others = (pick(values) for pick in sorted_out)
    device = tensors[0].device.type
    if device not in SETTLED_ON or (op in _READERS and may_read(tensors[0])):
        return None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    surroundings = op, kinds, torch.is_grad_enabled(), autocast, resolve_backend(values[-1])
    return *surroundings, others, *map(_described, tensors)


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
    derived: str = "",
    derive: Callable[..., tuple[Any, ...]] | None = None,
    finish: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    cpu: Callable[..., Any] | None = None,
    cpu_backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``torch.ops.sclkern.<name>`` and ``<name>_backward``, and connect them.

    The names of the backward's parameters say what it gets, and so what is saved: ``grad_<output>`` is the incoming
    gradient (None where nothing reads that output), ``needs_<input>`` whether that input needs a gradient; any other
    name is one of ``derived``, an input of the forward, or one of ``outputs``. Outputs without a ``grad_`` parameter
    are not differentiable. The backward has no derivative of its own and says so.

    Kernels are called without torch's dispatcher, which takes longer than the launch itself, where nobody could tell:
    by ``RUNNERS``, outside of compilers, tracers, function transforms, dispatch modes (selective checkpointing,
    FakeTensor) and profilers, and on no subclass of a tensor. Everywhere else ``torch.ops.sclkern.<name>`` is called.

    Args:
        name: of the op and of the public function.
        forward: runs the launchers; its annotations are the op's schema.
        fake: allocates what ``forward`` returns; it is called by keyword, so it names what it needs and takes ``**_``.
        backward: runs the launchers of the backward; annotated too. None for an op without gradient.
        fake_backward: allocates what ``backward`` returns, likewise.
        outputs: names of what ``forward`` returns, in its order, separated by spaces.
        gradients: names of the inputs that have a gradient, in the order in which ``backward`` returns them. It returns
            none for an optional input that was None.
        derived: names of values to save beside inputs and outputs, or in place of those of the same name.
        derive: those values from all inputs and outputs.
        finish: from the results of ``backward``, the gradients; for results that two inputs share, because an op's
            results may not share memory.
        cpu: the forward on a CPU, for an op whose public function uses it there. Without it the op runs on a CPU only
            in Triton's interpreter.
        cpu_backward: the backward on a CPU.

    Returns:
        A function of the forward's arguments that calls the op with autograd at the least cost.
    """
    op = _define(name, forward, fake, cpu)
    run = apply = _runner(name, op)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*inputs)
        return apply(*inputs)

    if backward is None:
        return call
    backward_op = _define(f"{name}_backward", backward, fake_backward, cpu_backward)
    setup, gradient = _autograd(name, op, backward_op, outputs.split(), gradients.split(), derived, derive, finish)

    def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
        raise second_derivative_error(name)

    torch.library.register_autograd(f"sclkern::{name}", gradient, setup_context=setup, lib=_LIBRARY)
    torch.library.register_autograd(f"sclkern::{name}_backward", no_second_derivative, lib=_LIBRARY)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup(ctx, inputs, output)
            return output

        backward = staticmethod(gradient)

    apply = Function.apply
    return call


# What computes an op on a type of device, by the op's name.
RUNNERS: dict[str, dict[str, Callable[..., Any]]] = {}
# The function of each op that runs its launchers, also on tensors without memory.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


def _define(name: str, function: Callable[..., Any], fake: Any, cpu: Callable[..., Any] | None) -> Any:
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LAUNCHERS[name] = function

    def launch(*arguments: Any) -> Any:
        # Triton launches on the current device, which may not be the tensors'.
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                break
        index = tensor.get_device()
        if index < 0 or index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device_of(tensor):
            return function(*arguments)

    def on_cpu(*arguments: Any) -> Any:
        return (launch if cpu is None or interpretable(*arguments) else cpu)(*arguments)

    RUNNERS[name] = {"cuda": launch} | ({"cpu": on_cpu} if cpu is not None or interpreted() else {})
    for device, run in RUNNERS[name].items():
        _LIBRARY.impl(name, run, device.upper())
    op = getattr(torch.ops.sclkern, name).default
    names = [argument.name for argument in op._schema.arguments]

    def fake_by_name(*arguments: Any) -> Any:
        return fake(**dict(zip(names, arguments, strict=True)))

    torch.library.register_fake(f"sclkern::{name}", fake_by_name, lib=_LIBRARY)
    return op


def _runner(name: str, op: Any) -> Callable[..., Any]:
    """The op below autograd: what runs it, or the dispatcher where somebody may watch or replace the call."""
    runners = RUNNERS[name]

    def run(*arguments: Any) -> Any:
        device = None
        if _included().raw_repr() in _USUAL and not (torch.compiler.is_compiling() or _profiler_enabled()):
            for argument in arguments:
                if type(argument) in PLAIN_TENSORS:
                    device = device or argument.device.type
                elif isinstance(argument, Tensor):
                    device = None
                    break
        if device in runners:
            return runners[device](*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return run


def interpretable(*arguments: Any) -> bool:
    """Whether Triton's interpreter runs the kernels, and takes the dtypes of these tensors."""
    floating = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    return interpreted() and all(tensor.dtype in INTERPRETED_DTYPES for tensor in floating)


def _autograd(
    name: str, op: Any, backward_op: Any, outputs: list[str], gradients: list[str], derived: str,
    derive: Callable[..., tuple[Any, ...]] | None, finish: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None,
) -> tuple[Callable[..., None], Callable[..., Any]]:  # fmt: skip
    """The functions ``setup_context`` and ``backward`` of an op, from the names of its backward's parameters."""
    inputs = [argument.name for argument in op._schema.arguments]
    # Of derived values and those that they replace, the derived are found first.
    names = [*derived.split(), *inputs, *outputs]
    parameters = {p.name: "Tensor" in str(p.type) for p in backward_op._schema.arguments}
    incoming, needed = ([f"{kind}_{n}" for n in of] for kind, of in (("grad", outputs), ("needs", inputs)))
    kept = [n for n in parameters if n not in incoming and n not in needed]
    tensors, constants = ([n for n in kept if parameters[n] == is_tensor] for is_tensor in (True, False))
    pick_tensors, pick_constants = (_picker([names.index(n) for n in wanted]) for wanted in (tensors, constants))
    collected = [*incoming, *tensors, *constants, *needed]
    pick_arguments = _picker([collected.index(name) for name in parameters])
    not_differentiable = [i for i, output in enumerate(outputs) if f"grad_{output}" not in parameters]
    positions = [inputs.index(name) for name in gradients]
    run_backward = _runner(f"{name}_backward", backward_op)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.given = [i for i in positions if inputs[i] is not None]
        if not_differentiable:
            ctx.mark_non_differentiable(*[results[i] for i in not_differentiable])
        # Otherwise zeros are allocated and filled for every output that nothing reads.
        ctx.set_materialize_grads(False)
        values = (*inputs, *results) if derive is None else (*derive(*inputs, *results), *inputs, *results)
        ctx.save_for_backward(*pick_tensors(values))
        ctx.constants = pick_constants(values)

    def gradient(ctx: Any, *grads: Tensor | None) -> Any:
        found: list[Tensor | None] = [None] * len(inputs)
        if grads[0] is None and all(grad is None for grad in grads):
            return tuple(found)
        needs = ctx.needs_input_grad
        arguments = pick_arguments((*grads, *ctx.saved_tensors, *ctx.constants, *needs))
        # The op's own derivative says that there is none.
        results = (backward_op if torch.is_grad_enabled() else run_backward)(*arguments)
        for i, result in zip(ctx.given, results if finish is None else finish(results), strict=False):
            if needs[i]:
                found[i] = result
        return tuple(found)

    return setup, gradient


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Of a sequence, what stands at these places."""
    # A getter of a single value returns no tuple.
    return operator.itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[i] for i in places)
