"""``completion_loss``: InfoNCE of two sets of features, fused, without the N x M similarities in memory."""

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
from sclkern.ops._registration import choose, interpretable, kernels, public_op, register, second_derivative_error
from sclkern.ops.dispatch import Choice, no_autocast, select_backend, takes_cpu_form

DIRECTIONS = ("both", "recovered_to_complete")
REDUCTIONS = ("mean", "sum", "none")
GATHERS = ("exact", "published", None)
# On a CPU the eager definition holds several N x M matrices; above this many columns it works in tiles.
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
    normalize: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
    gather: Literal["exact", "published"] | None = "exact",
    backend: str = "auto",
) -> Tensor:
    r"""Cosine InfoNCE: each recovered feature must find its own complete feature among those of the batch.

    The formula is that of ``sclkern.reference.completion_loss`` (Luo et al., SCL, arXiv 2211.13437): each term is
    softplus(logsumexp over the other pairs - positive), so that confident positives keep their gradient.

    There may be more columns than rows: those after the first N, such as hard negatives, belong to no row. They are
    negatives of every row, and have no loss of their own.

    Memory is O((N + M) D) with the kernels, beside at most 128 MiB of weights (half precision, M up to 524,288) and 192
    MiB of partial sums, and on a CPU under "auto" when M is above 3072. At most 3072 columns of one process on a CPU,
    and ``backend="eager"`` by name, take the eager definition, which holds N x M and alone supports double backward.

    With W ranks each computes its own rows and its own columns, 1/W of the similarities; row i of a rank belongs to
    column i of that rank, and the further columns of every rank are negatives of all rows. Features and a few floats
    for each row are exchanged in the forward, nothing in the backward. Every rank has the loss of all rows, the same
    to the bit. Only the eager definition computes everything on every rank.

    Args:
        recovered: (N, D), or (G, N, D) for G separate contrasts; float16, bfloat16 or float32 (any floating dtype on
            the eager path), any strides.
        complete: (M, D) or (G, M, D), M >= N: row i belongs to column i. If the dtypes differ, both are promoted.
        temperature: positive float, or 0-d tensor (learnable) on the device of the features, whose value is not
            checked: a diverged run shows in its losses. A learnable log scale s is ``temperature=(-s).exp()``.
        directions: "both" adds the loss of columns 0 to N - 1 against all rows to that of the rows.
        reduction: "mean" over the valid rows of a group and then over groups, "sum" over all, or "none".
        valid: (N,) or (G, N) bool; the other rows, and the columns that belong to them, take no part, whatever they
            hold, and contribute zero loss and gradient.
        same: (M,) int64 ids of what counts as equal, such as the image that a column shows, for all groups and across
            ranks; the first N are those of the rows, too. Pairs of one id, other than positives, are no negatives, in
            either direction.
        normalize: divide features by their norms, so that similarities are cosines; False takes dot products.
        eps: smallest norm of a feature, where they are normalised.
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
        TypeError: features or temperature not floating, ``valid`` or ``normalize`` not bool, ``same`` not int64.
            ValueError: wrong shape, device or value; on every rank, if ranks differ in shape, dtype or options (see
            ``sclkern.distributed.compare``). RuntimeError: second derivatives other than by ``backend="eager"``.
    """
    options = temperature, directions, reduction, valid, same, normalize, eps, group, gather, backend
    path = choose("completion_loss", check, plan, recovered, complete, *options)
    dtype = torch.promote_types(recovered.dtype, complete.dtype)
    if recovered.dtype != complete.dtype:
        recovered, complete = recovered.to(dtype), complete.to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    world = 1 if gather is None else world_size(group)
    learnable = isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled()
    rows, columns, both = recovered.shape[-2], complete.shape[-2], directions == "both"
    if world > 1:
        given = {"both": both, "learnable": learnable, "valid": valid is not None, "same": same is not None}
        given |= {"plain products": not normalize, "further columns": columns > rows}
        compare("recovered", recovered, group, given)
        if columns > rows:
            compare("complete", complete, group)
    if path == "eager":
        if world > 1:
            recovered, complete = (_gather_rows(x, rows, -2, group, gather) for x in (recovered, complete))
            valid, same = (None if x is None else _gather_rows(x, rows, -1, group, gather) for x in (valid, same))
        named: dict[str, Any] = {"directions": directions, "reduction": reduction, "valid": valid, "same": same}
        features = recovered.to(precise), complete.to(precise)
        return reference.completion_loss(*features, temperature=temperature, normalize=normalize, eps=eps, **named)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=precise, device=recovered.device)
    temperature, groups, flat = temperature.to(precise), recovered.shape[:-2].numel(), recovered.ndim == 2
    recovered, complete = (x.reshape(groups, *x.shape[-2:]).contiguous() for x in (recovered, complete))
    mask = None if valid is None else valid.reshape(groups, rows).contiguous()
    ids = None if same is None else same.contiguous()
    if world > 1:
        scale = world if gather == "exact" else 1
        flags = both, learnable, normalize, float(eps)
        losses, mask = _AcrossRanks.apply(recovered, complete, temperature, mask, ids, *flags, group, scale)
    else:
        window = 0, rows, rows, columns - rows
        losses = _op(recovered, complete, temperature, mask, ids, both, learnable, normalize, float(eps), *window)[0]
    if flat:
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
    if (recovered if complete is None else complete).shape[-2] > MAX_EAGER_ROWS:
        return choice.via("tiled", f"above {MAX_EAGER_ROWS} rows or columns a CPU works in tiles")
    return choice.via("eager", f"up to {MAX_EAGER_ROWS} rows and columns a CPU takes the definition")


def check(
    recovered: Tensor, complete: Tensor, temperature: float | Tensor, directions: str, reduction: str,
    valid: Tensor | None, same: Tensor | None, normalize: bool, eps: float, group: dist.ProcessGroup | None,
    gather: str | None,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.floating(recovered=recovered, complete=complete)
    _checks.rank("(N, D) or (G, N, D)", (2, 3), recovered=recovered)
    size = recovered.shape
    _checks.shape("(M, D) or (G, M, D)", (*size[:-2], None, size[-1]), complete=complete)
    if complete.shape[-2] < size[-2]:
        expected = f"at least {size[-2]} rows, of which row i belongs to row i of recovered and others come after"
        raise ValueError(f"complete: got shape {tuple(complete.shape)}, expected {expected}")
    if isinstance(temperature, Tensor):
        _checks.floating(temperature=temperature)
        _checks.shape("()", (), temperature=temperature)
    else:
        _checks.positive("temperature", temperature)
    if valid is not None:
        _checks.dtype(torch.bool, valid=valid)
        _checks.shape("(N,) or (G, N)", size[:-1], valid=valid)
    if same is not None:
        _checks.dtype(torch.int64, same=same)
        _checks.shape("(M,)", complete.shape[-2:-1], same=same)
    others = {"complete": complete, "temperature": temperature, "valid": valid, "same": same}
    _checks.same_device("recovered", recovered, **others)
    _checks.boolean("normalize", normalize)
    _checks.positive("eps", eps)
    _checks.choice("directions", directions, DIRECTIONS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.choice("gather", gather, GATHERS)


def _gather_rows(x: Tensor, rows: int, dim: int, group: dist.ProcessGroup | None, mode: Any) -> Tensor:
    """The rows of all ranks, or the columns that belong to them, and after those the further columns of all ranks."""
    parts = x.movedim(dim, 0).split([rows, x.shape[dim] - rows])
    gathered = [gather_rows(part, group, mode) for part in parts if x.shape[dim] > rows or part is parts[0]]
    return (gathered[0] if len(gathered) == 1 else torch.cat(gathered)).movedim(0, dim)


class _AcrossRanks(torch.autograd.Function):
    """Losses (G, N) of the rows of all ranks, and which are valid, from this rank's rows and columns (G, .., D)."""

    @staticmethod
    def forward(
        ctx: Any, recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, same: Tensor | None,
        both: bool, learnable: bool, normalize: bool, eps: float, group: dist.ProcessGroup | None, scale: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        rows, further, rank = recovered.shape[1], complete.shape[1] - recovered.shape[1], dist.get_rank(group)
        parts = stack(torch.cat([recovered, complete], 1), group).transpose(0, 1).split([rows, rows, further], 2)
        recovered, complete, more = (part.flatten(1, 2) for part in parts)
        complete = torch.cat([complete, more], 1) if further else complete
        valid = None if valid is None else stack(valid, group).transpose(0, 1).flatten(1, 2)
        if same is not None:
            same = torch.cat([part.flatten() for part in stack(same, group).split([rows, further], 1)])
        saved = recovered, complete, temperature, valid, same
        numbers = normalize, eps, rank * rows, rows, recovered.shape[1] + rank * further, further
        losses, positive, lse, spread, *norms = torch.ops.sclkern.completion_loss(*saved, both, learnable, *numbers)
        # The gradient of a row needs the log-sum-exp of every column, that of the temperature the sums of all rows.
        statistics = stack(torch.cat([losses[None], lse, spread]), group).permute(1, 2, 0, 3).flatten(2, 3)
        all_losses, lse, spread = statistics.split([1, len(lse), len(spread)])
        ctx.save_for_backward(*saved, positive, lse, spread, *norms)
        ctx.numbers, ctx.scale, ctx.learnable = numbers, scale, learnable
        if valid is not None:
            ctx.mark_non_differentiable(valid)
        return all_losses[0].clone(), valid

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> Any:
        if torch.is_grad_enabled():
            raise second_derivative_error("completion_loss")
        needs = *ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.learnable
        gradients = torch.ops.sclkern.completion_loss_backward(grad, *ctx.saved_tensors, *ctx.numbers, *needs[:2])
        factors = ctx.scale, ctx.scale, 1
        scaled = (g * factor if need else None for g, factor, need in zip(gradients, factors, needs, strict=True))
        return *scaled, *(None,) * 8


def _in_tiles(features: Tensor) -> bool:
    return features.device.type == "cpu" and not interpretable(features)


def _forward(
    recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, same: Tensor | None, both: bool,
    learnable: bool, normalize: bool, eps: float, offset: int, rows: int, further_offset: int, further: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of ``rows`` rows from offset on, whose gradients the backward also computes, with those of the columns that
    belong to them and of further ones."""
    launch = tiled.forward if _in_tiles(recovered) else kernels.completion_loss.completion_loss_forward
    return launch(recovered, complete, temperature, valid, same, both, learnable, normalize, eps, offset, rows)


def _backward(
    grad_losses: Tensor, recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None,
    same: Tensor | None, positive: Tensor, lse: Tensor, spread: Tensor, rnorm: Tensor, column_rnorm: Tensor,
    normalize: bool, eps: float, offset: int, rows: int, further_offset: int, further: int, needs_recovered: bool,
    needs_complete: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    columns = [(offset, rows), (further_offset, further)] if further else [(offset, rows)]
    if offset + rows == further_offset:
        columns = [(offset, rows + further)]
    windows = [(offset, rows)] if needs_recovered else [], columns if needs_complete else []
    saved = recovered, complete, temperature, valid, same, positive, lse, (rnorm, column_rnorm)
    # Backward may be called under autocast, which would round the product of float32 features.
    with no_autocast(recovered):
        launch = tiled.backward if _in_tiles(recovered) else kernels.completion_loss_backward.completion_loss_backward
        weight, gradients = launch(grad_losses, *saved, normalize, eps, windows)
    # dL/dtau = -1/tau times the mean of s - positive under each softmax, which the forward added up: no tile is
    # computed again. Empty where the temperature is not learnable.
    by_temperature = -(weight * spread).sum() / temperature if len(spread) else temperature.new_empty(0)
    return *gradients, by_temperature


def _fake(
    recovered: Tensor, complete: Tensor, temperature: Tensor, both: bool, learnable: bool, rows: int, **_: Any
) -> tuple[Tensor, ...]:
    groups, length = recovered.shape[:2]
    directions = 2 if both else 1
    own, all_rows = (groups, rows), (groups, length)
    shapes = own, all_rows, (directions, *own), (directions * learnable, *own), all_rows, complete.shape[:2]
    return tuple(temperature.new_empty(shape) for shape in shapes)


def _fake_backward(
    recovered: Tensor, complete: Tensor, temperature: Tensor, spread: Tensor, rows: int, further: int,
    needs_recovered: bool, needs_complete: bool, **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups, _rows, width = recovered.shape
    grad_recovered = recovered.new_empty((groups, rows, width) if needs_recovered else 0)
    grad_complete = complete.new_empty((groups, rows + further, width) if needs_complete else 0)
    return grad_recovered, grad_complete, temperature.new_empty(() if len(spread) else 0)


# The gradient of a window of rows needs the statistics of the other windows: ``_AcrossRanks`` exchanges them.
_op = register(
    "completion_loss", _forward, _fake, _backward, _fake_backward,
    outputs="losses positive lse spread rnorm column_rnorm", gradients="recovered complete temperature",
    cpu=_forward, cpu_backward=_backward,
)  # fmt: skip
