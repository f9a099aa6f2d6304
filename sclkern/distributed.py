"""Contrast over ranks: gather features, and say what gradient comes back."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

# Their places are what ranks tell one another.
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
# (group, description) already compared, where comparing would make the host wait for the device.
_compared: set[tuple] = set()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, group, scale: float) -> Tensor:
        ctx.rank, ctx.rows, ctx.scale = dist.get_rank(group), features.shape[0], scale
        return stack(features, group).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Every rank holds the same loss of the same features, so its own slice is the whole gradient of its rows.
        own = grad[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]
        return own * ctx.scale, None, None


def gather(features: Tensor, group=None, mode: Literal["exact", "published"] = "exact") -> Tensor:
    """Stack the rows of all ranks: (B, ...) to (world * B, ...), rank by rank; B is the same on each.

    ``mode`` is the gradient: "exact" multiplies this rank's slice by the world size, so that DDP's mean over ranks is
    the gradient of one big batch; "published" leaves the slice as it is, 1/world of that (AllGather_multi in the
    published dist_utils.py). Without an initialised process group the features come back as they are.

    Raises:
        ValueError: on every rank, if their shapes or dtypes differ (see ``compare``).
    """
    if world_size(group) == 1:
        return features
    compare("features", features, group)
    if not features.is_floating_point():
        return stack(features, group).flatten(0, 1)
    return _Gather.apply(features, group, world_size(group) if mode == "exact" else 1)


def world_size(group=None) -> int:
    """Number of ranks; 1 without an initialised process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def stack(tensor: Tensor, group=None) -> Tensor:
    """(...) of each rank to (world, ...), without gradient."""
    out = tensor.new_empty((world_size(group), *tensor.shape))
    if out.numel():
        dist.all_gather_into_tensor(out.view(-1), tensor.detach().flatten(), group=group)
    return out


def compare(name: str, tensor: Tensor, group=None, options: dict[str, bool] | None = None) -> None:
    """Raise on every rank if shape, dtype or ``options`` differ between ranks.

    A collective of unequal sizes hangs or mixes rows up, so ranks first tell one another theirs, about 80 bytes. Where
    the group has a CPU backend (gloo, or "cpu:gloo,cuda:nccl", the default of ``init_process_group``) this happens at
    every call, and no GPU is waited for. With NCCL alone the answer must be read back from the device, so it happens
    once for each new description on this rank, and a rank whose rows alone change later is not caught: drop the last
    incomplete batch, or give the group a CPU backend. Nothing is compared while a CUDA graph is captured: the run
    before, which warms up, has done it.

    Raises:
        ValueError: they differ, or more than 6 dimensions; the message names what each rank has.
    """
    if tensor.ndim > _DIMS or tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: got {tensor.ndim} dimensions of {tensor.dtype}, cannot be gathered")
    shape, options = tuple(tensor.shape), options or {}
    own = (_DTYPES.index(tensor.dtype), len(shape), *shape, *(0,) * (_DIMS - len(shape)), *map(int, options.values()))
    device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else tensor.device
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing() or (group, own) in _compared:
            return
        _compared.add((group, own))
    found = stack(torch.tensor(own, device=device), group).tolist()
    if all(tuple(row) == own for row in found):
        return
    ranks = (f"rank {rank} {_describe(row, options)}" for rank, row in enumerate(found))
    raise ValueError(f"{name}: got {', '.join(ranks)}, expected the same on every rank")


def _describe(row: list[int], options: dict[str, bool]) -> str:
    dtype, dims, *rest = row
    text = [str(tuple(rest[:dims])), str(_DTYPES[dtype]).removeprefix("torch.")]
    return " ".join(text + [name for name, value in zip(options, rest[_DIMS:], strict=True) if value])
