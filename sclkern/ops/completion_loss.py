"""``completion_loss``: cosine InfoNCE of two sets of features, fused, without the N x N similarities in memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sclkern import reference
from sclkern.distributed import compare, stack, world_size
from sclkern.distributed import gather as gather_rows
from sclkern.kernels import completion_loss_cpu as tiled
from sclkern.ops import _checks
from sclkern.ops._registration import choose, kernels, public_op, register, second_derivative_error
from sclkern.ops.dispatch import Choice, no_autocast, select_backend, takes_cpu_form

DIRECTIONS = ("both", "recovered_to_complete")
REDUCTIONS = ("mean", "sum", "none")
GATHERS = ("exact", "published", None)
# On a CPU the eager definition holds several N x N matrices; above this many rows it works in tiles.
MAX_EAGER_ROWS = 3072


@public_op
def completion_loss(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float | Tensor,
    directions: Literal["both", "recovered_to_complete"] = "both",
    reduction: Literal["mean", "sum", "none"] = "mean",
    valid: Tensor | None = None,
    same: Tensor | None = None,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
    gather: Literal["exact", "published"] | None = "exact",
    backend: str = "auto",
) -> Tensor:
    r"""Cosine InfoNCE: each recovered feature must find its own complete feature among those of the batch.

    The formula is that of ``sclkern.reference.completion_loss`` (Luo et al., SCL, arXiv 2211.13437): each term is
    softplus(logsumexp over the other pairs - positive), so that confident positives keep their gradient.

    Memory is O(N D) with the kernels, beside at most 128 MiB of weights (half precision, N up to 524,288) and 192 MiB
    of partial sums, and on a CPU under "auto" when N is above 3072. At most 3072 rows of one process on a CPU, and
    ``backend="eager"`` by name, take the eager definition, which holds N x N and alone supports double backward.

    With W ranks each computes its own rows and its own columns, 1/W of the similarities; features and a few floats for
    each row are exchanged in the forward, nothing in the backward. Every rank has the loss of all rows, the same to
    the bit. Only the eager definition computes everything on every rank.

    Args:
        recovered: (N, D), or (G, N, D) for G separate contrasts; float16, bfloat16 or float32 (any floating dtype on
            the eager path), any strides.
        complete: of the shape of recovered. If the dtypes differ, both are promoted.
        temperature: positive float, or 0-d tensor (learnable) on the device of the features, whose value is not
            checked: a diverged run shows in its losses.
        directions: "both" adds the loss over columns to that over rows.
        reduction: "mean" over the valid rows of a group and then over groups, "sum" over all, or "none".
        valid: (N,) or (G, N) bool; the other rows take no part, whatever they hold, and contribute zero loss and
            gradient.
        same: (N,) int64 ids of what counts as equal, such as the image that a row shows, for all groups and across
            ranks: pairs of rows of one id, other than positives, are no negatives, in either direction.
        eps: smallest norm of a feature.
        group: process group whose rows are negatives too, if torch.distributed is initialised.
        gather: gradient of the features of this rank: "exact" is W times that of the loss of all rows, so that DDP's
            mean over ranks is the gradient of one big batch; "published" leaves the W out, 1/W of that after DDP, as
            the published code does. That of the temperature is whole on every rank in both. None contrasts within the
            process.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        Scalar, or with "none" (N,) or (G, N), both directions added and N the rows of all ranks, rank by rank;
        float32, or float64 for float64 features. 0 with zero gradient without rows, and for rows that are not valid or
        have no negatives.

    Raises:
        TypeError: features or temperature not floating, ``valid`` not bool, ``same`` not int64. ValueError: wrong
            shape, device or value; on every rank, if ranks differ in shape, dtype or options (see
            ``sclkern.distributed.compare``). RuntimeError: second derivatives other than by ``backend="eager"``.
    """
    options = temperature, directions, reduction, valid, same, eps, group, gather, backend
    path = choose("completion_loss", check, plan, recovered, complete, *options)
    dtype = torch.promote_types(recovered.dtype, complete.dtype)
    if recovered.dtype != complete.dtype:
        recovered, complete = recovered.to(dtype), complete.to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    world = 1 if gather is None else world_size(group)
    if path == "eager":
        if world > 1:
            recovered, complete = (_gather_rows(x, -2, group, gather) for x in (recovered, complete))
            valid, same = (None if x is None else _gather_rows(x, -1, group, gather) for x in (valid, same))
        named: dict[str, Any] = {"directions": directions, "reduction": reduction, "valid": valid, "same": same}
        recovered, complete = recovered.to(precise), complete.to(precise)
        return reference.completion_loss(recovered, complete, temperature=temperature, eps=eps, **named)
    learnable = isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled()
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=precise, device=recovered.device)
    temperature, both, rows = temperature.to(precise), directions == "both", recovered.shape[-2]
    shape = (recovered.shape[:-2].numel(), *recovered.shape[-2:])
    features = [x.reshape(shape).contiguous() for x in (recovered, complete)]
    mask = None if valid is None else valid.reshape(shape[:2]).contiguous()
    ids = None if same is None else same.contiguous()
    if world > 1:
        given = {"valid": valid is not None, "same": same is not None}
        compare("recovered", recovered, group, {"both": both, "learnable": learnable, **given})
        scale = world if gather == "exact" else 1
        losses, mask = _AcrossRanks.apply(*features, temperature, mask, ids, both, learnable, eps, group, scale)
    else:
        losses = _op(*features, temperature, mask, ids, both, learnable, float(eps), 0, rows)[0]
    if recovered.ndim == 2:
        losses, mask = losses[0], None if mask is None else mask[0]
    return reference.reduce_rows(losses, mask, reduction)


def plan(
    recovered: Tensor | None, complete: Tensor | None, *, group: dist.ProcessGroup | None = None,
    gather: str | None = "exact", backend: str = "auto", **_: Any,
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    if recovered is not None and complete is not None and recovered.dtype != complete.dtype:
        dtype = torch.promote_types(recovered.dtype, complete.dtype)
        recovered, complete = recovered.to(dtype), complete.to(dtype)
    choice = select_backend(recovered, complete, backend=backend)
    if recovered is None or not takes_cpu_form(choice, backend, recovered):
        return choice
    if gather is not None and world_size(group) > 1:
        return choice.via("tiled", "across ranks a CPU computes this rank's tiles alone")
    if recovered.shape[-2] > MAX_EAGER_ROWS:
        return choice.via("tiled", f"above {MAX_EAGER_ROWS} rows a CPU works in tiles")
    return choice.via("eager", f"up to {MAX_EAGER_ROWS} rows a CPU takes the definition")


def check(
    recovered: Tensor, complete: Tensor, temperature: float | Tensor, directions: str, reduction: str,
    valid: Tensor | None, same: Tensor | None, eps: float, group: dist.ProcessGroup | None, gather: str | None,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.floating(recovered=recovered, complete=complete)
    _checks.rank("(N, D) or (G, N, D)", (2, 3), recovered=recovered)
    _checks.shape("(N, D) or (G, N, D)", recovered.shape, complete=complete)
    if isinstance(temperature, Tensor):
        _checks.floating(temperature=temperature)
        _checks.shape("()", (), temperature=temperature)
    else:
        _checks.positive("temperature", temperature)
    if valid is not None:
        _checks.dtype(torch.bool, valid=valid)
        _checks.shape("(N,) or (G, N)", recovered.shape[:-1], valid=valid)
    if same is not None:
        _checks.dtype(torch.int64, same=same)
        _checks.shape("(N,)", recovered.shape[-2:-1], same=same)
    others = {"complete": complete, "temperature": temperature, "valid": valid, "same": same}
    _checks.same_device("recovered", recovered, **others)
    _checks.positive("eps", eps)
    _checks.choice("directions", directions, DIRECTIONS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.choice("gather", gather, GATHERS)


def _gather_rows(x: Tensor, dim: int, group: dist.ProcessGroup | None, mode: Any) -> Tensor:
    return gather_rows(x.movedim(dim, 0), group, mode).movedim(0, dim)


class _AcrossRanks(torch.autograd.Function):
    """Losses (G, N) of the rows of all ranks, and which are valid, from this rank's (G, rows, D)."""

    @staticmethod
    def forward(
        ctx: Any, recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, same: Tensor | None,
        both: bool, learnable: bool, eps: float, group: dist.ProcessGroup | None, scale: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        rows = recovered.shape[1]
        ctx.offset, ctx.eps, ctx.scale, ctx.learnable = dist.get_rank(group) * rows, eps, scale, learnable
        features = stack(torch.stack([recovered, complete]), group).permute(1, 2, 0, 3, 4).flatten(2, 3)
        valid = None if valid is None else stack(valid, group).transpose(0, 1).flatten(1, 2)
        same = None if same is None else stack(same, group).flatten()
        arguments = temperature, valid, same, both, learnable, eps, ctx.offset, rows
        losses, positive, lse, spread, rnorm = torch.ops.sclkern.completion_loss(*features.unbind(), *arguments)
        # The gradient of a row needs the log-sum-exp of every column, that of the temperature the sums of all rows.
        statistics = stack(torch.cat([losses[None], lse, spread]), group).permute(1, 2, 0, 3).flatten(2, 3)
        all_losses, lse, spread = statistics.split([1, len(lse), len(spread)])
        ctx.save_for_backward(*features.unbind(), temperature, valid, same, positive, lse, spread, rnorm)
        ctx.rows = rows
        if valid is not None:
            ctx.mark_non_differentiable(valid)
        return all_losses[0].clone(), valid

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> Any:
        if torch.is_grad_enabled():
            raise second_derivative_error("completion_loss")
        needs = *ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.learnable
        numbers = ctx.eps, ctx.offset, ctx.rows, *needs[:2]
        gradients = torch.ops.sclkern.completion_loss_backward(grad, *ctx.saved_tensors, *numbers)
        factors = ctx.scale, ctx.scale, 1
        scaled = (g * factor if need else None for g, factor, need in zip(gradients, factors, needs, strict=True))
        return *scaled, None, None, None, None, None, None, None


def _forward(
    recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, same: Tensor | None, both: bool,
    learnable: bool, eps: float, offset: int, rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    launch = kernels.completion_loss.completion_loss_forward
    return launch(recovered, complete, temperature, valid, same, both, learnable, eps, offset, rows)


def _backward(
    grad_losses: Tensor, recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None,
    same: Tensor | None, positive: Tensor, lse: Tensor, spread: Tensor, rnorm: Tensor, eps: float, offset: int,
    rows: int, needs_recovered: bool, needs_complete: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launchers = kernels.completion_loss_backward
    gradients = [recovered.new_empty(0), complete.new_empty(0)]
    # Backward may be called under autocast, which would round the product of float32 features.
    with no_autocast(recovered):
        weight = launchers.completion_loss_anchors(grad_losses.contiguous(), valid, positive, lse)
        # A view takes as long as a launch.
        pairs = [(*t.unbind(), None)[:2] for t in (weight, lse)] + [rnorm.unbind()]
        for i, needed in enumerate((needs_recovered, needs_complete)):
            if needed:
                x, y = (recovered, complete) if i == 0 else (complete, recovered)
                statistics = [pair[j] for pair in pairs for j in (i, 1 - i)]
                launch = launchers.completion_loss_gradient
                gradients[i] = launch(x, y, temperature, valid, same, *statistics, eps, offset, rows)
    return gradients[0], gradients[1], _temperature_gradient(weight, temperature, spread)


def _temperature_gradient(weight: Tensor, temperature: Tensor, spread: Tensor) -> Tensor:
    """dL/dtau = -1/tau times the mean of s - positive under each softmax, which the forward added up: no tile is
    computed again. Empty where the temperature is not learnable."""
    return -(weight * spread).sum() / temperature if len(spread) else temperature.new_empty(0)


def _tiled_backward(
    grad_losses: Tensor, recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None,
    same: Tensor | None, positive: Tensor, lse: Tensor, spread: Tensor, rnorm: Tensor, *arguments: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    weight = grad_losses * torch.sigmoid(lse - positive)
    if valid is not None:
        weight.masked_fill_(~valid, 0.0)
    gradients = tiled.backward(recovered, complete, temperature, valid, same, weight, lse, rnorm, *arguments)
    return *gradients, _temperature_gradient(weight, temperature, spread)


def _fake(
    recovered: Tensor, temperature: Tensor, both: bool, learnable: bool, rows: int, **_: Any
) -> tuple[Tensor, ...]:
    groups, length = recovered.shape[:2]
    directions = 2 if both else 1
    own, all_rows = (groups, rows), (groups, length)
    shapes = own, all_rows, (directions, *own), (directions * learnable, *own), (2, *all_rows)
    return tuple(temperature.new_empty(shape) for shape in shapes)


def _fake_backward(
    recovered: Tensor, complete: Tensor, temperature: Tensor, spread: Tensor, rows: int, needs_recovered: bool,
    needs_complete: bool, **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = recovered.shape[0], rows, recovered.shape[2]
    grad_recovered = recovered.new_empty(shape if needs_recovered else 0)
    grad_complete = complete.new_empty(shape if needs_complete else 0)
    return grad_recovered, grad_complete, temperature.new_empty(() if len(spread) else 0)


# The gradient of a window of rows needs the statistics of the other windows: ``_AcrossRanks`` exchanges them.
_op = register(
    "completion_loss", _forward, _fake, _backward, _fake_backward,
    outputs="losses positive lse spread rnorm", gradients="recovered complete temperature",
    cpu=tiled.forward, cpu_backward=_tiled_backward,
)  # fmt: skip
