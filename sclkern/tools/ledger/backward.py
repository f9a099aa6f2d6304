"""The backward pass of fake CUDA tensors on a machine without a GPU, where torch's engine asks for a CUDA context."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor


def backward(loss: Tensor) -> dict[Tensor, Tensor]:
    """Run every node of a loss's graph as ``loss.backward()`` does, without setting ``.grad``.

    Gradients that meet are added, and cast to the dtype of what they are gradients of, as torch's engine does. A
    gradient whose strides are not those of its parameter is copied, as the engine would copy it.

    Args:
        loss: 0-d, with its graph.

    Returns:
        Gradients by parameter.
    """
    root: Any = loss.grad_fn
    waiting: dict[Any, int] = {root: 0}
    stack = [root]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                if child not in waiting:
                    waiting[child] = 0
                    stack.append(child)
                waiting[child] += 1
    # Nodes that were made last run first.
    incoming: dict[Any, dict[int, Tensor]] = {node: {} for node in waiting}
    order = {node: number for number, node in enumerate(waiting)}
    ready = [(0, order[root], root)]
    found: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        incoming[root][0] = torch.ones_like(loss)
        while ready:
            *_, node = heapq.heappop(ready)
            gradients = incoming.pop(node)
            if hasattr(node, "variable"):
                if gradients:
                    found[node.variable] = _like(node.variable, gradients[0])
                continue
            inputs = node._input_metadata
            outputs = _run(node, [gradients.get(number) for number in range(len(inputs))])
            for (child, number), gradient in zip(node.next_functions, outputs, strict=True):
                if child is None:
                    continue
                if gradient is not None:
                    _add(incoming[child], number, gradient, child._input_metadata[number])
                waiting[child] -= 1
                if not waiting[child]:
                    sequence = 0 if hasattr(child, "variable") else -child._sequence_nr()
                    heapq.heappush(ready, (sequence, order[child], child))
    return found


def _run(node: Any, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients of a node's tensors, in the order of ``next_functions``."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        outputs = node(*gradients)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]
    # A function of Python returns a gradient of every argument; only tensors have an edge.
    outputs = node.apply(*gradients)
    found = iter([gradient for gradient, needed in zip(outputs, node.needs_input_grad, strict=True) if needed])
    return [None if child is None else next(found) for child, _ in node.next_functions]


def _add(incoming: dict[int, Tensor], number: int, gradient: Tensor, metadata: Any) -> None:
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    if gradient.dtype != metadata.dtype:
        gradient = gradient.to(metadata.dtype)
    incoming[number] = incoming[number] + gradient if number in incoming else gradient


def _like(parameter: Tensor, gradient: Tensor) -> Tensor:
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
