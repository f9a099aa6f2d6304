"""Features of all ranks, and the gradient that each rank gets back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sclkern.profiling import collective

Group = dist.ProcessGroup | None
K = TypeVar("K")
V = TypeVar("V")

# Ranks send the index of their dtype in this list.
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_DIMS = 6
# (group, description) that were compared already, where a comparison makes the host wait for the device.
_compared: set[tuple[Any, ...]] = set()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, group: Group, scale: float) -> Tensor:
        ctx.rank, ctx.rows, ctx.scale = dist.get_rank(group), features.shape[0], scale
        return stack(features, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Every rank holds the same loss of the same features, so its slice is the whole gradient of its rows.
        rows = grad[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]
        return rows * ctx.scale, None, None


def gather(features: Tensor, group: Group = None, mode: Literal["exact", "published"] | None = "exact") -> Tensor:
    """Concatenate the rows of all ranks, rank by rank.

    Args:
        features: (B, ...), of the same shape and dtype on every rank.
        group: process group; None is the default group.
        mode: the gradient. "exact" multiplies this rank's slice by the world size, so that DDP's mean over ranks is the
            gradient of one big batch; "published" leaves the slice as it is, 1/world of that (AllGather_multi in the
            published dist_utils.py). None gathers nothing.

    Returns:
        (world * B, ...); ``features`` itself without an initialised process group, or with ``mode=None``.

    Raises:
        ValueError: on every rank, if their shapes or dtypes differ (see ``compare``).
    """
    if mode is None or world_size(group) == 1:
        return features
    compare("features", features, group)
    if not features.is_floating_point():
        return stack(features, group).flatten(0, 1)
    return _Gather.apply(features, group, world_size(group) if mode == "exact" else 1)


def world_size(group: Group = None) -> int:
    """Number of ranks; 1 without an initialised process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def stack(tensor: Tensor, group: Group = None) -> Tensor:
    """Stack the tensor of every rank, (...) to (world, ...), without gradient."""
    out = tensor.new_empty((world_size(group), *tensor.shape))
    if out.numel():
        # The name since torch 2.14, which warns of the old one.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with collective("all-gather"):
            all_gather(out.view(-1), tensor.detach().flatten(), group=group)
    return out


def total(tensor: Tensor, group: Group = None) -> Tensor:
    """Add up the tensor of every rank, without gradient.

    Args:
        tensor: of the same shape and dtype on every rank.
        group: process group; None is the default group.

    Returns:
        The sum, the same on every rank; a new tensor.
    """
    summed = tensor.detach().clone()
    if world_size(group) > 1:
        with collective("all-reduce"):
            dist.all_reduce(summed, group=group)
    return summed


def merge(entries: Mapping[K, V], group: Group = None) -> dict[K, V]:
    """The entries of all ranks in one dictionary, the same on every rank.

    Args:
        entries: those of this rank, small, and pickled.
        group: process group; None is the default group. On a CPU backend, where it has one, no GPU is waited for.

    Returns:
        The entries in the order of the ranks; of equal keys the value is that of the last rank.
    """
    if world_size(group) == 1:
        return dict(entries)
    of_ranks: list[Any] = [None] * world_size(group)
    dist.all_gather_object(of_ranks, dict(entries), group=group)
    return {key: value for of_rank in of_ranks for key, value in of_rank.items()}


def gather_parts(parts: Mapping[int, Tensor], group: Group = None) -> Tensor:
    """Concatenate parts that are dealt to ranks, without gradient.

    Each part is sent to the others as it is, so that ranks may have different numbers of parts and rows, or none.

    Args:
        parts: those of this rank by a number that no other part has, (rows, ...); all of the same dtype, device type
            and sizes behind the first dimension.
        group: process group; None is the default group.

    Returns:
        The rows of all ranks, in the order of the numbers of their parts.
    """
    if world_size(group) == 1:
        return torch.cat([parts[number] for number in sorted(parts)])
    rank = dist.get_rank(group)
    own = {number: (rank, tuple(part.shape), part.dtype, part.device.type) for number, part in parts.items()}
    forms = dict(sorted(merge(own, group).items()))
    rows = [shape[0] for _, shape, _, _ in forms.values()]
    _, (_, *sizes), dtype, device = next(iter(forms.values()))
    out = torch.empty((sum(rows), *sizes), dtype=dtype, device=device)
    for (number, form), part in zip(forms.items(), out.split(rows), strict=True):
        if number in parts:
            part.copy_(parts[number])
        dist.broadcast(part, group=group, group_src=form[0])
    return out


def compare(name: str, tensor: Tensor, group: Group = None, options: dict[str, bool] | None = None) -> None:
    """Raise on every rank if shape, dtype or ``options`` differ between ranks.

    A collective of unequal sizes hangs or mixes rows, so ranks first exchange a description of about 80 bytes. If the
    group has a CPU backend (gloo, or "cpu:gloo,cuda:nccl", the default of ``init_process_group``), every call does so
    and waits for no GPU. With NCCL alone the answer must be read back from the device, so it happens once for each
    new description on this rank; a rank whose number of rows changes later is then not detected: drop the last
    incomplete batch, or give the group a CPU backend. While a CUDA graph is captured nothing is compared, because the
    warm-up run before it has done so.

    Args:
        name: of the argument, for the message.
        tensor: what will be gathered.
        group: process group; None is the default group.
        options: further values, by name, that must agree.

    Raises:
        ValueError: they differ, or more than 6 dimensions; the message names what each rank has.
    """
    if tensor.ndim > _DIMS or tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: got {tensor.ndim} dimensions of {tensor.dtype}, cannot be gathered")
    shape, options = tuple(tensor.shape), options or {}
    description = (
        _DTYPES.index(tensor.dtype),
        len(shape),
        *shape,
        *(0,) * (_DIMS - len(shape)),
        *map(int, options.values()),
    )
    device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else tensor.device
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing() or (group, description) in _compared:
            return
        _compared.add((group, description))
    rows = stack(torch.tensor(description, device=device), group).tolist()
    if all(tuple(row) == description for row in rows):
        return
    ranks = (f"rank {rank} {_describe(row, options)}" for rank, row in enumerate(rows))
    raise ValueError(f"{name}: got {', '.join(ranks)}, expected the same on every rank")


def _describe(row: list[int], options: dict[str, bool]) -> str:
    dtype, dims, *rest = row
    text = [str(tuple(rest[:dims])), str(_DTYPES[dtype]).removeprefix("torch.")]
    return " ".join(text + [name for name, value in zip(options, rest[_DIMS:], strict=True) if value])
