"""What fake CUDA tensors lack on a machine without a GPU: autocast, which turns itself off, and the backward pass, for
which torch's engine asks for a CUDA context."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast("cuda")``.

    Args:
        dtype: of matrix products; None turns autocast off.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@contextmanager
def _recomputed_once() -> Iterator[None]:
    """Checkpointed blocks run again as in the engine's backward: once, and under the autocast of their forward."""
    # What autocast asks of a GPU before it turns on.
    asked = (torch.cuda.amp.common, "amp_definitely_not_available", False), (torch.cuda, "is_bf16_supported", True)
    before = [getattr(module, name) for module, name, _ in asked]
    for module, name, answer in asked:
        setattr(module, name, lambda *_, answer=answer, **__: answer)
    try:
        with GraphExecGroup():
            yield
    finally:
        for (module, name, _), function in zip(asked, before, strict=True):
            setattr(module, name, function)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def _python_owns_nodes() -> bool:
    node = _Probe.apply(torch.zeros(1, requires_grad=True)).grad_fn
    try:
        return len(node._input_metadata) == 1
    except RuntimeError:
        return False


# Whether a node can outlive what leads to it. In torch 2.11 the object of a function of Python does not hold its node.
FREES_NODES = _python_owns_nodes()


def backward(loss: Tensor, sums: dict[Tensor, Tensor] | None = None) -> dict[Tensor, Tensor]:
    """Run every node of a loss's graph as ``loss.backward()`` does, without setting ``.grad``.

    Gradients that meet are added, and cast to the dtype of what they are gradients of, as torch's engine does. A
    gradient whose strides are not those of its parameter is copied, as the engine would copy it. Each node is freed
    with what it saved once it has run; for that, the loss loses its graph. Without ``FREES_NODES`` all stay to the end.

    Args:
        loss: 0-d, with its graph.
        sums: gradients by parameter from before, to which those of this loss are added in place.

    Returns:
        Gradients by parameter.
    """
    with torch.no_grad(), _recomputed_once():
        found = {} if sums is None else sums
        roots, seed = [loss.grad_fn], torch.ones_like(loss)
        graph = _Graph(roots[0])
        if FREES_NODES:
            loss.detach_()
        _run_graph(graph, roots, seed, found)
    return found


class _Graph:
    """The nodes below a root that wait for gradients.

    Args:
        root: node of the loss.
    """

    def __init__(self, root: Any) -> None:
        self.waiting: dict[Any, int] = {root: 0}
        stack = [root]
        while stack:
            for child, _ in stack.pop().next_functions:
                if child is not None:
                    if child not in self.waiting:
                        self.waiting[child] = 0
                        stack.append(child)
                    self.waiting[child] += 1
        self.incoming: dict[Any, dict[int, Tensor]] = {node: {} for node in self.waiting}
        self.order = {node: number for number, node in enumerate(self.waiting)}

    def start(self, node: Any) -> dict[int, Tensor]:
        """Forget a node; its gradients."""
        del self.waiting[node], self.order[node]
        return self.incoming.pop(node)


def _run_graph(graph: _Graph, roots: list[Any], seed: Tensor, found: dict[Tensor, Tensor]) -> None:
    root = roots.pop()
    graph.incoming[root][0] = seed
    # Nodes that were made last run first, and gradients of parameters are added at once.
    ready = [(0.0, 0, root)]
    # No name may keep a node, nor what it saved, while the next ones run.
    del root, seed
    while ready:
        node = heapq.heappop(ready)[2]
        gradients = graph.start(node)
        if hasattr(node, "variable"):
            if gradients:
                _accumulate(found, node.variable, gradients[0])
            continue
        ordered = [gradients.pop(number, None) for number in range(len(node._input_metadata))]
        for child, number, gradient in _run(node, ordered):
            if gradient is not None:
                _add(graph.incoming[child], number, gradient, child._input_metadata[number])
            graph.waiting[child] -= 1
            if not graph.waiting[child]:
                sequence = -math.inf if hasattr(child, "variable") else -child._sequence_nr()
                heapq.heappush(ready, (sequence, graph.order[child], child))
        child = gradient = None


def _run(node: Any, gradients: list[Tensor | None]) -> list[tuple[Any, int, Tensor | None]]:
    """Its children, the number of their input, and the gradient for it."""
    edges = node.next_functions
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        outputs = node(*gradients)
        results = list(outputs) if isinstance(outputs, tuple) else [outputs]
    else:
        # A function of Python returns a gradient of every argument; only tensors have an edge.
        outputs = node.apply(*gradients)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = iter([gradient for gradient, needed in zip(outputs, node.needs_input_grad, strict=True) if needed])
        results = [None if child is None else next(found) for child, _ in edges]
    return [(child, number, g) for (child, number), g in zip(edges, results, strict=True) if child is not None]


def _add(incoming: dict[int, Tensor], number: int, gradient: Tensor, metadata: Any) -> None:
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    if gradient.dtype != metadata.dtype:
        gradient = gradient.to(metadata.dtype)
    incoming[number] = incoming[number] + gradient if number in incoming else gradient


def _accumulate(found: dict[Tensor, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    if parameter in found:
        found[parameter].add_(gradient)
    elif gradient.stride() == parameter.stride():
        found[parameter] = gradient
    else:
        found[parameter] = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
