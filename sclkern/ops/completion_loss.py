"""``completion_loss``: cosine InfoNCE of two sets of features, fused, without the N x N similarities in memory."""

from __future__ import annotations

from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.dispatch import BACKENDS, choose, interpreted
from sclkern.distributed import gather as gather_rows

DIRECTIONS = ("both", "recovered_to_complete")
REDUCTIONS = ("mean", "sum", "none")
GATHERS = ("exact", "reference", None)
# On a CPU the plain definition holds several N x N matrices: from here on it works in tiles.
PLAIN_ROWS = 2048
# Similarities of a tile on a CPU.
TILE = 2**22
# As in the kernels: far below any similarity, yet sums of it stay finite.
_EXCLUDED = -1e30


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

    Memory is O(N D) with the kernels, and on a CPU under "auto" when N is above 2048. At most 2048 rows on a CPU, and
    ``backend="eager"`` by name, take the plain definition, which holds N x N and alone supports double backward.

    Args:
        recovered, complete: (N, D), or (G, N, D) for G separate contrasts; float16, bfloat16 or float32 (any floating
            dtype on the eager path), any strides. Of different dtypes, they are promoted.
        temperature: positive float, or 0-d tensor (learnable) on the device of the features; never read back.
        directions: "both" adds the loss over columns to that over rows.
        reduction: "mean" over the valid rows of a group and then over groups, "sum" over all, or "none".
        valid: (N,) or (G, N) bool; the other rows take no part, whatever they hold, and lose 0.
        eps: smallest norm of a feature.
        group: process group whose rows are negatives too, if torch.distributed is initialised.
        gather: how the rows of the other ranks join (see ``sclkern.distributed.gather``: "exact" or "reference"); None
            contrasts within the process. Every rank computes the loss of all gathered rows.
        backend: "auto", "triton" or "eager" (see ``sclkern.dispatch.choose``).

    Returns:
        Scalar, or with "none" (N,) or (G, N), both directions added and N the gathered rows; float32, or float64 for
        float64 features. 0 with zero gradient for rows that are not valid or have no negatives.

    Raises:
        TypeError: features or temperature not floating, ``valid`` not bool. ValueError: wrong shape, device or value.
    """
    check(recovered, complete, temperature, directions, reduction, valid, eps, gather)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    dtype = torch.promote_types(recovered.dtype, complete.dtype)
    precise = torch.promote_types(dtype, torch.float32)
    recovered, complete = recovered.to(dtype), complete.to(dtype)
    if gather is not None:
        recovered, complete = (_gather_rows(x, -2, group, gather) for x in (recovered, complete))
        valid = None if valid is None else _gather_rows(valid, -1, group, gather)
    fused = choose(recovered, complete, backend=backend).backend == "triton"
    tiled = backend != "eager" and recovered.device.type == "cpu" and recovered.shape[-2] > PLAIN_ROWS
    if not (fused or tiled):
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
    shape = (recovered.shape[:-2].numel(), *recovered.shape[-2:])
    losses = torch.ops.sclkern.completion_loss(
        recovered.reshape(shape).contiguous(),
        complete.reshape(shape).contiguous(),
        temperature,
        None if valid is None else valid.reshape(shape[:2]).contiguous(),
        directions == "both",
        learnable,
        eps,
    )[0]
    return reference.reduce_rows(losses.reshape(recovered.shape[:-1]), valid, reduction)


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


def _forward(
    recovered: Tensor,
    complete: Tensor,
    temperature: Tensor,
    valid: Optional[Tensor],  # noqa: UP045, operator schemas of older torch know no other spelling
    both: bool,
    learnable: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sclkern.kernels import completion_loss as kernels  # here, because Triton is optional

    return kernels.completion_loss_forward(recovered, complete, temperature, valid, both, learnable, eps)


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
    need_recovered: bool,
    need_complete: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import completion_loss as kernels

    grad = grad.contiguous()
    anchors = lse[0], lse[1] if len(lse) == 2 else None
    sides = [
        kernels.completion_loss_gradient(
            grad, x, y, temperature, valid, positive, anchors[i], anchors[1 - i], rnorm[i], rnorm[1 - i], eps
        )
        if needed
        else x.new_empty(0)
        for i, (x, y, needed) in enumerate(
            ((recovered, complete, need_recovered), (complete, recovered, need_complete))
        )
    ]
    return sides[0], sides[1], _temperature_gradient(grad, temperature, valid, positive, lse, spread)


_op = torch.library.custom_op("sclkern::completion_loss", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    "sclkern::completion_loss_backward", _backward, mutates_args=(), device_types="cuda"
)


def _temperature_gradient(grad, temperature, valid, positive, lse, spread) -> Tensor:
    """dL/dtau = -1/tau times the mean of s - positive under each softmax, which the forward added up: no tile is
    computed again. Empty where the forward was not asked to."""
    if not len(spread):
        return temperature.new_empty(0)
    if valid is not None:
        grad = grad.masked_fill(~valid, 0.0)
    return -(grad * torch.sigmoid(lse - positive) * spread).sum() / temperature


def _interpretable(x: Tensor) -> bool:
    return interpreted() and x.dtype in (torch.float16, torch.float32)


def _tiles(recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, rnorm: Tensor):
    """Row blocks, group by group: group, rows, normalised features of the group, similarities, what to exclude."""
    groups, length, _ = recovered.shape
    step = max(1, min(1024, TILE // max(length, 1)))
    column = torch.arange(length, device=recovered.device)
    for group in range(groups):
        x, y = (
            _normalised(f[group], valid, group, r[group]) for f, r in zip((recovered, complete), rnorm, strict=True)
        )
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            similarity = x[rows] @ y.T / temperature
            excluded = column[rows, None] == column
            if valid is not None:
                excluded = excluded | ~(valid[group, rows, None] & valid[group])
            yield group, rows, x, y, similarity, excluded


def _normalised(features: Tensor, valid: Tensor | None, group: int, rnorm: Tensor) -> Tensor:
    features = features.to(rnorm.dtype)
    if valid is not None:
        features = features.masked_fill(~valid[group, :, None], 0.0)
    return features * rnorm[:, None]


@_op.register_kernel("cpu")
def _(recovered, complete, temperature, valid, both, learnable, eps):
    if _interpretable(recovered):
        return _forward(recovered, complete, temperature, valid, both, learnable, eps)
    with torch.autocast("cpu", enabled=False):
        return _tiled_forward(recovered, complete, temperature, valid, both, learnable, eps)


def _tiled_forward(recovered, complete, temperature, valid, both, learnable, eps):
    shape, precise = recovered.shape[:2], temperature.dtype
    rnorm = torch.empty((2, *shape), dtype=precise)
    positive = torch.ones(shape, dtype=precise)
    for side, features in zip(rnorm, (recovered, complete), strict=True):
        torch.linalg.vector_norm(features, dim=-1, dtype=precise, out=side).clamp_(min=eps).reciprocal_()
    if valid is not None:
        rnorm.masked_fill_(~valid, 0.0)
    lse = torch.full((2 if both else 1, *shape), _EXCLUDED, dtype=precise)
    # Relative to the maximum so far, which for columns rises from one row block to the next.
    total, spread = torch.zeros_like(lse), torch.zeros_like(lse)
    for group, rows, x, y, similarity, excluded in _tiles(recovered, complete, temperature, valid, rnorm):
        if rows.start == 0:
            positive[group] = (x * y).sum(-1) / temperature
        similarity.masked_fill_(excluded, _EXCLUDED)
        for direction in range(len(lse)):
            here, dim = (rows, 1) if direction == 0 else (slice(None), 0)
            anchor = positive[group, here].unsqueeze(dim)
            old, sums, spreads = (t[direction, group, here] for t in (lse, total, spread))
            raised = torch.maximum(old, similarity.amax(dim))
            shrink, weight = torch.exp(old - raised), torch.exp(similarity - raised.unsqueeze(dim))
            sums.mul_(shrink).add_(weight.sum(dim))
            if learnable:
                spreads.mul_(shrink).add_((weight * (similarity - anchor)).sum(dim))
            old.copy_(raised)
    lse += total.log()
    losses = F.softplus(lse - positive).sum(0)
    return losses, positive, lse, spread / total if learnable else spread[:0].clone(), rnorm


@_op_backward.register_kernel("cpu")
def _(
    grad, recovered, complete, temperature, valid, positive, lse, spread, rnorm, eps, need_recovered, need_complete
):  # fmt: skip
    if _interpretable(recovered):
        return _backward(
            grad, recovered, complete, temperature, valid, positive, lse, spread, rnorm, eps, need_recovered,
            need_complete,
        )  # fmt: skip
    with torch.autocast("cpu", enabled=False):
        sides = [None, None]
        if need_recovered or need_complete:
            sides = _tiled_backward(
                grad,
                recovered,
                complete,
                temperature,
                valid,
                positive,
                lse,
                rnorm,
                eps,
                (need_recovered, need_complete),
            )
        sides = [recovered.new_empty(0) if side is None else side for side in sides]
        return sides[0], sides[1], _temperature_gradient(grad, temperature, valid, positive, lse, spread)


def _tiled_backward(grad, recovered, complete, temperature, valid, positive, lse, rnorm, eps, needed):
    sides = [torch.zeros(recovered.shape, dtype=rnorm.dtype) if need else None for need in needed]
    anchor = grad * torch.sigmoid(lse - positive)
    if valid is not None:
        anchor.masked_fill_(~valid, 0.0)
    for group, rows, x, y, similarity, excluded in _tiles(recovered, complete, temperature, valid, rnorm):
        weight = torch.exp(similarity - lse[0, group, rows, None]) * anchor[0, group, rows, None]
        if len(lse) == 2:
            weight += torch.exp(similarity - lse[1, group]) * anchor[1, group]
        weight.masked_fill_(excluded, 0.0)
        weight.diagonal(rows.start).copy_(-anchor[:, group, rows].sum(0))
        if needed[0]:
            sides[0][group, rows] = weight @ y
        if needed[1]:
            sides[1][group] += weight.T @ x[rows]
    for side, (features, scale) in enumerate(zip((recovered, complete), rnorm, strict=True)):
        if not needed[side]:
            continue
        for group, push in enumerate(sides[side]):
            x = _normalised(features[group], valid, group, scale[group])
            # A norm below eps was replaced by eps, a constant: nothing to project away.
            clamped = (scale[group] >= torch.tensor(eps, dtype=scale.dtype).reciprocal())[:, None]
            push -= ((push * x).sum(-1, keepdim=True) * x).masked_fill_(clamped, 0.0)
            push *= (scale[group] / temperature)[:, None]
            if valid is not None:
                push.masked_fill_(~valid[group, :, None], 0.0)
        sides[side] = sides[side].to(features.dtype)
    return sides


@_op.register_fake
def _(recovered, complete, temperature, valid, both, learnable, eps):
    shape, new = recovered.shape[:2], temperature.new_empty
    directions = 2 if both else 1
    return new(shape), new(shape), new((directions, *shape)), new((directions * learnable, *shape)), new((2, *shape))


@_op_backward.register_fake
def _(
    grad, recovered, complete, temperature, valid, positive, lse, spread, rnorm, eps, need_recovered, need_complete
):  # fmt: skip
    return (
        recovered.new_empty(recovered.shape if need_recovered else 0),
        complete.new_empty(complete.shape if need_complete else 0),
        temperature.new_empty(() if len(spread) else 0),
    )


def _setup(ctx, inputs, output) -> None:
    recovered, complete, temperature, valid, _, ctx.learnable, ctx.eps = inputs
    ctx.save_for_backward(recovered, complete, temperature, valid, *output[1:])


def _gradient(ctx, grad, *_):
    needs = ctx.needs_input_grad
    found = torch.ops.sclkern.completion_loss_backward(grad, *ctx.saved_tensors, ctx.eps, needs[0], needs[1])
    wanted = needs[0], needs[1], needs[2] and ctx.learnable
    return (*(side if want else None for side, want in zip(found, wanted, strict=True)), None, None, None, None)


_op.register_autograd(_gradient, setup_context=_setup)
