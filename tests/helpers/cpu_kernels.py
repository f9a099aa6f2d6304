"""Kernels for a CPU, for tests alone: an op computed by its eager definition, with everything around it as on a GPU.

sclkern has none: on a CPU its functions take other paths. Here the registration, the fake functions and the autograd of
an op run, and so do compiled code and modules on the path of the kernels, without Triton's interpreter.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from sclkern import reference
from sclkern.ops.dispatch import interpreted

_LIBRARY = torch.library.Library("sclkern", "IMPL")


def _bias_gelu(x, bias, approximate):
    return reference.bias_gelu(x, bias, approximate=approximate)


# By op, from its inputs (by the names of its schema) to its first outputs, the others being statistics; the backward
# gets the inputs from the arguments of the op's own backward, so it must do with those.
DEFINITIONS: dict[str, Callable[..., Any]] = {"bias_gelu": _bias_gelu}


@functools.cache
def install() -> None:
    """Register the kernels once, where Triton does not interpret its own."""
    if interpreted():
        return
    for name, definition in DEFINITIONS.items():
        op = getattr(torch.ops.sclkern, name).default
        _LIBRARY.impl(name, _forward(op, definition), "CPU")
        if hasattr(torch.ops.sclkern, f"{name}_backward"):
            backward = getattr(torch.ops.sclkern, f"{name}_backward").default
            _LIBRARY.impl(f"{name}_backward", _backward(op, backward, definition), "CPU")


def _forward(op, definition):
    def forward(*inputs):
        arguments = dict(zip(_names(op), inputs, strict=True))
        computed = _tuple(definition(**arguments))
        results = _allocate(op, inputs)
        results[: len(computed)] = map(_like, computed, results)
        return tuple(results) if len(results) > 1 else results[0]

    return forward


def _backward(op, backward, definition):
    def run(*inputs):
        arguments = dict(zip(_names(backward), inputs, strict=True))
        gradients: list[torch.Tensor] = []
        # Autograd is off in a kernel; a new thread begins with it.
        thread = threading.Thread(target=lambda: gradients.extend(differentiate(arguments)))
        thread.start()
        thread.join()
        results = list(map(_like, gradients, _allocate(backward, inputs)))
        return results if "[]" in str(backward._schema.returns[0].type) else tuple(results)

    def differentiate(arguments):
        values = {name: arguments[name] for name in _names(op) if name in arguments}
        leaves = [name for name, value in values.items() if torch.is_tensor(value) and value.is_floating_point()]
        values |= {name: values[name].detach().requires_grad_() for name in leaves}
        out = _tuple(definition(**values))[0]
        grad = next(value for name, value in arguments.items() if name.startswith("grad_"))
        return torch.autograd.grad(out, [values[name] for name in leaves], _like(grad, out))

    return run


def _names(op) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def _tuple(out) -> tuple:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def _allocate(op, inputs) -> list[torch.Tensor]:
    """Zeros as the fake function of the op allocates its results."""
    fake = torch._library.simple_registry.singleton.find(op.name()).fake_impl.kernel
    return [torch.zeros_like(result) for result in _tuple(fake(*inputs))]


def _like(tensor, other):
    return torch.empty_like(other).copy_(tensor.reshape(other.shape))
