"""Casts of weights under autocast: those of a block in one launch, and their gradients in another.

Autocast casts every weight and bias in a launch of its own, forward and backward, and again for each slice of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# The kernel of bias and GELU reads the bias as it is; the decoder of MLM is cast by the op of its loss.
NOT_CAST = ("fc1.bias", "mlm_head.decoder.weight", "mlm_head.decoder.bias")
_Forward = TypeVar("_Forward", bound=Callable[..., Any])


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return _cast(weights, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(found) for grad in grads)


def _cast(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if cast:
        torch._foreach_copy_(cast, list(tensors))
    return tuple(cast)


@contextmanager
def weights_cast(modules: Iterable[tuple[str, nn.Module]], device: str) -> Iterator[None]:
    """Inside, linear layers have weights that autocast would cast; without autocast they stay what they are.

    The numbers are those of autocast. Weights that are no plain parameters, or not in float32, are left to it; so are
    all while a compiler traces.

    Args:
        modules: of which the linear layers are changed, by name.
        device: type of their device.
    """
    if torch.compiler.is_compiling() or device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    swapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for path, layer in modules:
        if type(layer) is nn.Linear:
            for name, weight in layer._parameters.items():
                if weight is not None and _castable(weight, dtype) and not f"{path}.{name}".endswith(NOT_CAST):
                    swapped.append((layer._parameters, name, weight))
    try:
        # A frozen weight must not seem to need a gradient.
        for trained in (True, False):
            group = [one for one in swapped if one[2].requires_grad == trained]
            if group:
                cast = _CastTogether.apply(dtype, *(weight for *_, weight in group))
                for (parameters, name, _), tensor in zip(group, cast, strict=True):
                    parameters[name] = tensor
        yield
    finally:
        for parameters, name, weight in swapped:
            parameters[name] = weight


def weights_cast_once(forward: _Forward) -> _Forward:
    """Decorate the ``forward`` of a block to run with ``weights_cast`` of its layers."""

    def run(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        first = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
        with weights_cast(self.named_modules(), first.device.type):
            return forward(self, *inputs, **options)

    run.__doc__ = forward.__doc__
    return run  # type: ignore[return-value]


def _castable(weight: Any, dtype: torch.dtype) -> bool:
    # Of a subclass such as DTensor only itself knows how it is cast.
    plain = isinstance(weight, nn.Parameter) and not is_traceable_wrapper_subclass(weight)
    return plain and weight.dtype == torch.float32 != dtype
