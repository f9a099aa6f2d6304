"""Trying a module: whether its forward and the fused one compute the same, wherever they might differ.

Both run on copies with random weights, so that nothing of the model changes, and on a CPU in float32; where kernels
run, once more on them. The outcome depends on the module's class and configuration, and is remembered while a model is
fused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sclkern.integrations.fuse.modules import Fused, fused_class, ops_forced
from sclkern.integrations.fuse.structure import changed, clone, configuration
from sclkern.ops.dispatch import select_backend

# Relative to the norm of the result: another formula differs by more. Kernels on a GPU may round products to TF32.
TOLERANCE, TOLERANCE_OF_KERNELS = 1e-3, 5e-2
_outcomes: list[dict[Any, Any]] = []


class Difference(Exception):  # noqa: N818 - not an error
    """A module's forward and the fused one differ; the message says where."""


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Try each class and configuration once while this is open.

    Yields:
        Nothing.
    """
    _outcomes.append({})
    try:
        # Whatever the user has set around it: a trial needs gradients, and values.
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        _outcomes.pop()


def once(module: nn.Module, kind: Any, find: Callable[[], Any]) -> Any:
    """What ``find`` returns for a module of this class and configuration.

    Args:
        module: the module.
        kind: what else the outcome depends on.
        find: tries the module.

    Returns:
        Its result, perhaps that of an equal module.
    """
    if not _outcomes:
        return find()
    key = (*configuration(module), kind)
    if key not in _outcomes[-1]:
        _outcomes[-1][key] = find()
    return _outcomes[-1][key]


class Probe(nn.Dropout):
    """A dropout that always drops the same elements, half of them, so that one can see what it is applied to."""

    def forward(self, x):
        """Multiply by 0 or 2."""
        return x * keep(x)


def keep(x: Tensor) -> Tensor:
    """What ``Probe`` multiplies a tensor by.

    Args:
        x: the tensor.

    Returns:
        0 or 2, like x.
    """
    return 2.0 * torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(1)).to(x)


class Trial:
    """Compares a module with its fused form.

    Args:
        module: the module; nothing of it changes.
        mixin: the class of its fused form.
        settings: those of the fused form.
    """

    def __init__(self, module: nn.Module, mixin: type[Fused], settings: Any) -> None:
        self.module, self.mixin = module, mixin
        self.own: Any
        self.fused: Any
        double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
        self.dtype = torch.float64 if double else torch.float32
        self.own, self.fused = self._pair("cpu", self.dtype)
        self.settings = settings

    @property
    def settings(self) -> Any:
        """Settings of the fused form."""
        return self.fused.__dict__["_sclkern"]

    @settings.setter
    def settings(self, settings: Any) -> None:
        self.fused.__dict__["_sclkern"] = settings

    def compare(self, where: str, call: dict[str, Any], gradients: bool = False, backend: str = "eager") -> None:
        """Compare both on one call, in the mode in which the copies are.

        Args:
            where: what is special about the call, for the reason.
            call: arguments by name.
            gradients: compare the gradients too.
            backend: of the ops.

        Raises:
            Difference: results or gradients differ.
        """
        with torch.set_grad_enabled(gradients):
            theirs, form = _run(self.own, call, gradients)
            with ops_forced(backend):
                ours, our_form = _run(self.fused, call, gradients)
        tolerance = TOLERANCE if backend == "eager" else TOLERANCE_OF_KERNELS
        # The gradient of a bias of keys is rounding alone.
        least = 1e-2 * max(float(tensor.detach().float().norm()) for tensor in theirs)
        if form != our_form or not agree(ours[0], theirs[0], tolerance, least):
            raise Difference(f"its forward computes something else {where}")
        if not all(agree(a, b, tolerance, least) for a, b in zip(ours, theirs, strict=True)):
            raise Difference(f"it has other gradients {where}")

    def equals(self, where: str, call: dict[str, Any], formula: Callable[[Any], Tensor]) -> None:
        """Compare the module with a formula.

        Args:
            where: what is special about the call, for the reason.
            call: arguments by name.
            formula: of a module with the same weights.

        Raises:
            Difference: the results differ.
        """
        with torch.no_grad():
            (theirs, *_), _ = _run(self.own, call, False)
            if not agree(theirs, formula(self.own), TOLERANCE):
                raise Difference(f"its forward computes something else {where}")

    def train(self, mode: bool, dropout: float | nn.Module | None = None) -> None:
        """Set modes of the copies, and their dropout.

        Args:
            mode: training or not.
            dropout: probability of every dropout, or a module in their place; None leaves them.
        """
        for copied in (self.own, self.fused):
            copied.train(mode)
            for name, child in list(copied.named_children()):
                if isinstance(child, nn.Dropout) and isinstance(dropout, nn.Module):
                    setattr(copied, name, dropout)
                elif isinstance(child, nn.Dropout) and isinstance(dropout, float):
                    setattr(copied, name, nn.Dropout(dropout).train(mode))

    def on_kernels(self, call: dict[str, Any]) -> None:
        """Compare both where the module is, if kernels run there.

        Args:
            call: arguments by name, on a CPU.

        Raises:
            Difference: the results differ.
        """
        parameter = next(self.module.parameters())
        if select_backend(parameter).backend != "triton":
            return
        self.own, self.fused = self._pair(parameter.device, parameter.dtype, self.settings)
        self.train(False)

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)

        self.compare("on the kernels", {name: moved(value) for name, value in call.items()}, backend="auto")

    def unchanged(self) -> None:
        """Check that no call has changed an attribute that the settings hold.

        Raises:
            Difference: one has.
        """
        if (name := changed(self.own, self.settings.attributes)) is not None:
            raise Difference(f"its forward changes {name}")

    def _pair(self, device: torch.device | str, dtype: torch.dtype, settings: Any = None) -> tuple[Any, Any]:
        own, fused = clone(self.module, device, dtype), clone(self.module, device, dtype)
        fused.__class__ = fused_class(type(fused), self.mixin)
        fused.__dict__["_sclkern"] = settings
        return own, fused


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without autocast, without warnings of fused modules, and with the random numbers of the user untouched.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(0)
        yield


def agree(actual: Tensor, expected: Tensor, tolerance: float, least: float = 1e-3) -> bool:
    """Whether results are equal up to rounding.

    Args:
        actual: one.
        expected: the other.
        tolerance: of the difference, relative to the norm of ``expected``.
        least: the least norm to relate it to.

    Returns:
        False if shapes or dtypes differ, or the tensors by more than the tolerance.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    error, norm = (actual - expected).float().norm(), expected.float().norm()
    return bool(error <= tolerance * norm.clamp_min(least))


def random_input(dtype: torch.dtype, *shape: int) -> Tensor:
    """Draw an input from a generator of its own.

    Args:
        dtype: of the input.
        *shape: its shape.

    Returns:
        Normally distributed values, the same in every call with one shape.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def first(out: Any) -> Tensor:
    """The result of a forward: the tensor that it returns, or the first of its tuple.

    Args:
        out: what the forward returned.

    Returns:
        The tensor.

    Raises:
        Difference: it is something else.
    """
    result = out[0] if type(out) is tuple and out else out
    if not isinstance(result, Tensor):
        raise Difference(f"its forward returns {type(result).__name__}")
    return result


def _run(module: nn.Module, call: dict[str, Any], gradients: bool) -> tuple[list[Tensor], tuple[type, int]]:
    """Result and gradients of one call; and the class and length of what it returns."""
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    leaves: list[Tensor] = list(module.parameters()) if gradients else []
    for value in inputs.values():
        if gradients and isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            leaves.append(value.requires_grad_())
    returned = module(**inputs)
    out, form = first(returned), (type(returned), len(returned))
    if not gradients:
        return [out], form
    weights = random_input(out.dtype, *out.shape).to(out.device)
    found = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    return [out.detach(), *zeros], form
