"""``completion_loss``: cosine InfoNCE of two sets of features, fused, without the N x N similarities in memory."""

from __future__ import annotations

from typing import Literal, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from sclkern import reference
from sclkern.distributed import compare, stack, world_size
from sclkern.distributed import gather as gather_rows
from sclkern.ops import completion_loss_tiled as tiled
from sclkern.ops.dispatch import BACKENDS, asked, choose, interpreted

DIRECTIONS = ("both", "recovered_to_complete")
REDUCTIONS = ("mean", "sum", "none")
GATHERS = ("exact", "reference", None)
# On a CPU the plain definition holds several N x N matrices: from here on it works in tiles.
PLAIN_ROWS = 3072


def completion_loss(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float | Tensor,
    directions: Literal["both", "recovered_to_complete"] = "both",
    reduction: Literal["mean", "sum", "none"] = "mean",
    valid: Tensor | None = None,
    eps: float = 1e-8,
    group=None,
    gather: Literal["exact", "reference"] | None = "exact",
    backend: str = "auto",
) -> Tensor:
    r"""Cosine InfoNCE: each recovered feature must find its own complete feature among those of the batch.

    The formula is that of ``sclkern.reference.completion_loss`` (Luo et al., SCL, arXiv 2211.13437): each term is
    softplus(logsumexp over the other pairs - positive), so that confident positives keep their gradient.

    Memory is O(N D) with the kernels, beside at most 128 MiB of weights (half precision, N up to 524,288), 192 MiB of
    partial sums, and on a CPU under "auto" when N is above 3072. At most 3072 rows of one process on a CPU, and
    ``backend="eager"`` by name, take the plain definition, which holds N x N and alone supports double backward.

    With W ranks each computes its own rows and its own columns, 1/W of the similarities; features and a few floats for
    each row are exchanged in the forward, nothing in the backward. Every rank has the loss of all rows, the same to
    the bit. Only the plain definition computes everything on every rank.

    Args:
        recovered, complete: (N, D), or (G, N, D) for G separate contrasts; float16, bfloat16 or float32 (any floating
            dtype on the eager path), any strides. Of different dtypes, they are promoted.
        temperature: positive float, or 0-d tensor (learnable) on the device of the features, whose value is not
            checked: a run that diverged is told by its losses.
        directions: "both" adds the loss over columns to that over rows.
        reduction: "mean" over the valid rows of a group and then over groups, "sum" over all, or "none".
        valid: (N,) or (G, N) bool; the other rows take no part, whatever they hold, and lose 0.
        eps: smallest norm of a feature.
        group: process group whose rows are negatives too, if torch.distributed is initialised.
        gather: gradient of the features of this rank: "exact" is W times that of the loss of all rows, so that DDP's
            mean over ranks is one big batch's; "reference" leaves the W out, 1/W of that after DDP, as the published
            code does. That of the temperature is whole on every rank in both. None contrasts within the process.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``).

    Returns:
        Scalar, or with "none" (N,) or (G, N), both directions added and N the rows of all ranks, rank by rank;
        float32, or float64 for float64 features. 0 with zero gradient for rows that are not valid or have no negatives.

    Raises:
        TypeError: features or temperature not floating, ``valid`` not bool. ValueError: wrong shape, device or value;
            on every rank, if ranks differ in shape, dtype or what is asked for (see ``sclkern.distributed.compare``).
            RuntimeError: second derivatives other than by ``backend="eager"``.
    """
    check(recovered, complete, temperature, directions, reduction, valid, eps, gather)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    dtype = torch.promote_types(recovered.dtype, complete.dtype)
    precise = torch.promote_types(dtype, torch.float32)
    recovered, complete = recovered.to(dtype), complete.to(dtype)
    world = 1 if gather is None else world_size(group)
    fused = choose(recovered, complete, backend=backend).backend == "triton"
    # Across ranks tiles at any size: the plain definition would compute everything on every rank.
    blockwise = world > 1 or recovered.shape[-2] > PLAIN_ROWS
    if not (fused or (asked(backend) != "eager" and recovered.device.type == "cpu" and blockwise)):
        if world > 1:
            recovered, complete = (_gather_rows(x, -2, group, gather) for x in (recovered, complete))
            valid = None if valid is None else _gather_rows(valid, -1, group, gather)
        return reference.completion_loss(
            recovered.to(precise),
            complete.to(precise),
            temperature=temperature,
            directions=directions,
            reduction=reduction,
            valid=valid,
            eps=eps,
        )
    learnable = isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(precise)
    else:
        temperature = torch.full((), temperature, dtype=precise, device=recovered.device)
    both, rows = directions == "both", recovered.shape[-2]
    shape = (recovered.shape[:-2].numel(), *recovered.shape[-2:])
    features = [x.reshape(shape).contiguous() for x in (recovered, complete)]
    mask = None if valid is None else valid.reshape(shape[:2]).contiguous()
    if world > 1:
        compare("recovered", recovered, group, {"both": both, "learnable": learnable, "valid": valid is not None})
        arguments = temperature, mask, both, learnable, eps, group, world if gather == "exact" else 1
        losses, mask = _AcrossRanks.apply(*features, *arguments)
    else:
        losses = torch.ops.sclkern.completion_loss(*features, temperature, mask, both, learnable, eps, 0, rows)[0]
    if recovered.ndim == 2:
        losses, mask = losses[0], None if mask is None else mask[0]
    return reference.reduce_rows(losses, mask, reduction)


def check(recovered, complete, temperature, directions, reduction, valid, eps, gather) -> None:
    for name, tensor in (("recovered", recovered), ("complete", complete)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")
    shape, device = recovered.shape, recovered.device
    if recovered.ndim not in (2, 3):
        raise ValueError(f"recovered: got shape {tuple(shape)}, expected (N, D) or (G, N, D)")
    if complete.shape != shape:
        raise ValueError(f"complete: got shape {tuple(complete.shape)}, expected that of recovered, {tuple(shape)}")
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise TypeError(f"temperature: got {temperature.dtype}, expected a floating dtype")
        if temperature.ndim:
            raise ValueError(f"temperature: got shape {tuple(temperature.shape)}, expected a 0-d tensor")
    elif not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number")
    if valid is not None:
        if valid.dtype != torch.bool:
            raise TypeError(f"valid: got {valid.dtype}, expected torch.bool")
        if valid.shape != shape[:-1]:
            raise ValueError(f"valid: got shape {tuple(valid.shape)}, expected {tuple(shape[:-1])}")
    for name, tensor in (("complete", complete), ("temperature", temperature), ("valid", valid)):
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of recovered, {device}")
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected a positive number")
    for name, value, known in (
        ("directions", directions, DIRECTIONS),
        ("reduction", reduction, REDUCTIONS),
        ("gather", gather, GATHERS),
    ):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, known))}")


def _gather_rows(x: Tensor, dim: int, group, mode: str) -> Tensor:
    return gather_rows(x.movedim(dim, 0), group, mode).movedim(0, dim)


class _AcrossRanks(torch.autograd.Function):
    """Losses (G, N) of the rows of all ranks, and which are valid, from this rank's (G, rows, D)."""

    @staticmethod
    def forward(ctx, recovered, complete, temperature, valid, both, learnable, eps, group, scale):
        rows = recovered.shape[1]
        ctx.offset, ctx.eps, ctx.scale, ctx.learnable = dist.get_rank(group) * rows, eps, scale, learnable
        features = stack(torch.stack([recovered, complete]), group).permute(1, 2, 0, 3, 4).flatten(2, 3)
        valid = None if valid is None else stack(valid, group).transpose(0, 1).flatten(1, 2)
        own, positive, lse, spread, rnorm = torch.ops.sclkern.completion_loss(
            *features.unbind(), temperature, valid, both, learnable, eps, ctx.offset, rows
        )
        # The gradient of a row needs the log-sum-exp of every column, that of the temperature the sums of all rows.
        statistics = stack(torch.cat([own[None], lse, spread]), group).permute(1, 2, 0, 3).flatten(2, 3)
        losses, lse, spread = statistics.split([1, len(lse), len(spread)])
        ctx.save_for_backward(*features.unbind(), temperature, valid, positive, lse, spread, rnorm)
        ctx.rows = rows
        if valid is not None:
            ctx.mark_non_differentiable(valid)
        return losses[0].clone(), valid

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            _no_second_derivative(ctx)
        wanted = *ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.learnable
        found = torch.ops.sclkern.completion_loss_backward(
            grad, *ctx.saved_tensors, ctx.eps, ctx.offset, ctx.rows, *wanted[:2]
        )
        factors = ctx.scale, ctx.scale, 1
        sides = (side * factor if want else None for side, factor, want in zip(found, factors, wanted, strict=True))
        return *sides, None, None, None, None, None, None


def _forward(
    recovered: Tensor,
    complete: Tensor,
    temperature: Tensor,
    valid: Optional[Tensor],  # noqa: UP045, operator schemas of older torch know no other spelling
    both: bool,
    learnable: bool,
    eps: float,
    offset: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sclkern.kernels import completion_loss as kernels  # here, because Triton is optional

    arguments = recovered, complete, temperature, valid, both, learnable, eps, offset, rows
    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(recovered):
        return kernels.completion_loss_forward(*arguments)


def _backward(
    grad: Tensor,
    recovered: Tensor,
    complete: Tensor,
    temperature: Tensor,
    valid: Optional[Tensor],  # noqa: UP045
    positive: Tensor,
    lse: Tensor,
    spread: Tensor,
    rnorm: Tensor,
    eps: float,
    offset: int,
    rows: int,
    need_recovered: bool,
    need_complete: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import completion_loss_backward as kernels

    sides = [recovered.new_empty(0), complete.new_empty(0)]
    # Backward may be called under autocast, which would round the product of float32 features.
    with torch.cuda.device_of(recovered), torch.autocast(recovered.device.type, enabled=False):
        weight = kernels.completion_loss_anchors(grad.contiguous(), valid, positive, lse)
        weights, anchors = ((t[0], t[1] if len(t) == 2 else None) for t in (weight, lse))
        for i, needed in enumerate((need_recovered, need_complete)):
            if needed:
                x, y = (recovered, complete) if i == 0 else (complete, recovered)
                sides[i] = kernels.completion_loss_gradient(
                    x, y, temperature, valid, weights[i], weights[1 - i], anchors[i], anchors[1 - i], rnorm[i],
                    rnorm[1 - i], eps, offset, rows,
                )  # fmt: skip
    return *sides, _temperature_gradient(weight, temperature, spread)


_op = torch.library.custom_op("sclkern::completion_loss", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    "sclkern::completion_loss_backward", _backward, mutates_args=(), device_types="cuda"
)


def _temperature_gradient(weight: Tensor, temperature: Tensor, spread: Tensor) -> Tensor:
    """dL/dtau = -1/tau times the mean of s - positive under each softmax, which the forward added up: no tile is
    computed again. Empty where the forward was not asked to."""
    return -(weight * spread).sum() / temperature if len(spread) else temperature.new_empty(0)


def _interpretable(x: Tensor) -> bool:
    return interpreted() and x.dtype in (torch.float16, torch.float32)


@_op.register_kernel("cpu")
def _(recovered, complete, *arguments):
    if _interpretable(recovered):
        return _forward(recovered, complete, *arguments)
    with torch.autocast("cpu", enabled=False):
        return tiled.forward(recovered, complete, *arguments)


@_op_backward.register_kernel("cpu")
def _(
    grad, recovered, complete, temperature, valid, positive, lse, spread, rnorm, eps, offset, rows, need_recovered,
    need_complete,
):  # fmt: skip
    needed = need_recovered, need_complete
    if _interpretable(recovered):
        return _backward(
            grad, recovered, complete, temperature, valid, positive, lse, spread, rnorm, eps, offset, rows, *needed
        )
    weight = grad * torch.sigmoid(lse - positive)
    if valid is not None:
        weight.masked_fill_(~valid, 0.0)
    sides = [recovered.new_empty(0), complete.new_empty(0)]
    if any(needed):
        with torch.autocast("cpu", enabled=False):
            found = tiled.backward(
                recovered, complete, temperature, valid, weight, lse, rnorm, eps, offset, rows, needed
            )
        sides = [empty if side is None else side for side, empty in zip(found, sides, strict=True)]
    return *sides, _temperature_gradient(weight, temperature, spread)


@_op.register_fake
def _(recovered, complete, temperature, valid, both, learnable, eps, offset, rows):
    (groups, length), new = recovered.shape[:2], temperature.new_empty
    directions = 2 if both else 1
    own = (groups, rows)
    return (
        new(own),
        new((groups, length)),
        new((directions, *own)),
        new((directions * learnable, *own)),
        new((2, groups, length)),
    )


@_op_backward.register_fake
def _(
    grad, recovered, complete, temperature, valid, positive, lse, spread, rnorm, eps, offset, rows, need_recovered,
    need_complete,
):  # fmt: skip
    shape = recovered.shape[0], rows, recovered.shape[2]
    return (
        recovered.new_empty(shape if need_recovered else 0),
        complete.new_empty(shape if need_complete else 0),
        temperature.new_empty(() if len(spread) else 0),
    )


def _setup(ctx, inputs, output) -> None:
    recovered, complete, temperature, valid, _, ctx.learnable, *ctx.numbers = inputs
    ctx.save_for_backward(recovered, complete, temperature, valid, *output[1:])


def _gradient(ctx, grad, *_):
    needs = ctx.needs_input_grad
    found = torch.ops.sclkern.completion_loss_backward(grad, *ctx.saved_tensors, *ctx.numbers, needs[0], needs[1])
    wanted = needs[0], needs[1], needs[2] and ctx.learnable
    return (*(side if want else None for side, want in zip(found, wanted, strict=True)), *(None,) * 6)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('completion_loss: the kernel has no second derivative; backend="eager" has')


# Of a window, the gradient needs what the other windows have: sclkern.ops.completion_loss exchanges it.
_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
