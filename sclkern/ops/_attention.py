"""What the attention ops share: checks, and the plan of plain attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sclkern.cpu.attention import sdpa_attention
from sclkern.libraries import flash
from sclkern.ops import _checks
from sclkern.ops.dispatch import Choice, autocast_like, select_backend, takes_cpu_form
from sclkern.reference.attention import check_dropout_lengths

# Those of vision models beyond 64 (SigLIP so400m, ViT-H, ViT-g, ViT-bigG) fill tiles of 128 channels.
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 128)
FRAME_HEAD_DIMS = (32, 64, 128)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, forms: tuple[str, str], same_length: bool = False) -> None:
    """Raise for tensors that no path takes.

    Args:
        query: (..., H, D), its form the first of ``forms``.
        key: as query, of another length, its form the second of ``forms``.
        value: of the shape of key.
        forms: the shapes in letters; their number of sizes is that of the tensors.
        same_length: whether key is as long as query.
    """
    _checks.floating(query=query, key=key, value=value)
    dimensions = forms[0].count(",") + 1
    _checks.rank(forms[0], (dimensions,), query=query)
    if 0 in query.shape[-3 if same_length else -2 :]:
        sizes = "a length, H and D" if same_length else "H and D"
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected {forms[0]} with {sizes} of at least 1")
    cast_query, cast_key, cast_value = autocast_like(query, key, value)
    _checks.same_dtype("query", cast_query, key=cast_key, value=cast_value)
    length = query.shape[-3] if same_length else key.shape[-3] if key.ndim == dimensions else None
    _checks.shape(forms[1], (*query.shape[:-3], length, *query.shape[-2:]), key=key, value=value)
    _checks.same_device("query", query, key=key, value=value)


def check_padding_mask(like: str, first: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise for a padding mask that no path takes.

    Args:
        like: name of an argument.
        first: that argument, whose device the mask shares.
        key: (B, Lk, ...).
        key_padding_mask: (B, Lk) bool, or None.
    """
    if key_padding_mask is not None:
        _checks.dtype(torch.bool, key_padding_mask=key_padding_mask)
        _checks.shape("(B, Lk)", key.shape[:2], key_padding_mask=key_padding_mask)
        _checks.same_device(like, first, key_padding_mask=key_padding_mask)


def check_bias(query: Tensor, key: Tensor, bias: Tensor | None) -> None:
    """Raise for a bias that no path takes.

    Args:
        query: (B, Lq, H, D).
        key: (B, Lk, H, D).
        bias: (B or 1, H or 1, Lq, Lk), or None.
    """
    if bias is None:
        return
    _checks.floating(bias=bias)
    if bias.dtype not in (query.dtype, torch.float32, autocast_like(query)[0].dtype):
        raise TypeError(f"bias: got {bias.dtype}, expected that of query, {query.dtype}, or torch.float32")
    sizes: tuple[int, ...] = (query.shape[0], query.shape[2])
    if bias.ndim == 4:
        sizes = tuple(1 if given == 1 else size for given, size in zip(bias.shape[:2], sizes, strict=True))
    _checks.shape("(B or 1, H or 1, Lq, Lk)", (*sizes, query.shape[1], key.shape[1]), bias=bias)
    _checks.same_device("query", query, bias=bias)


def check_numbers(
    dropout_p: float, softmax_scale: float | None, seed: int | Tensor | None, device: torch.device, num_queries: int,
    num_keys: int,
) -> None:  # fmt: skip
    """Raise for numbers that no path takes.

    Args:
        dropout_p: from 0 to 1.
        softmax_scale: finite, or None.
        seed: int, int64 tensor of one element, or None.
        device: of the other tensors.
        num_queries: of the longest sequence.
        num_keys: of the longest sequence.
    """
    _checks.probability("dropout_p", dropout_p)
    if softmax_scale is not None:
        _checks.number("softmax_scale", softmax_scale)
    _checks.seed(seed, device)
    if dropout_p > 0:
        check_dropout_lengths(num_queries, num_keys)


def resolve_scale(head_dim: int, softmax_scale: float | None) -> float:
    """``softmax_scale``, or 1 / sqrt(D)."""
    return 1 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)


def kernel_problems(
    head_dim: int, softmax_scale: float | None, head_dims: tuple[int, ...] = HEAD_DIMS
) -> tuple[str, ...]:
    """Why the kernels cannot compute this head dimension and scale."""
    problems: tuple[str, ...] = ()
    if head_dim not in head_dims:
        problems += (f"head dim {head_dim} has no kernel, {', '.join(map(str, head_dims))} have",)
    if softmax_scale is not None and not softmax_scale > 0:
        # The kernels scale the maximum of the scores, not each of them.
        problems += (f"softmax_scale {softmax_scale} is not above 0",)
    return problems


def plan_heads(
    tensors: tuple[Tensor | None, ...], head_dim: int, softmax_scale: float | None, backend: str, sdpa: str,
    sdpa_problems: tuple[str, ...] = (), head_dims: tuple[int, ...] = HEAD_DIMS,
) -> Choice:  # fmt: skip
    """The path of an attention op: its kernel, PyTorch's attention on a CPU, or the definition.

    Args:
        tensors: the floating-point inputs; None stands for one that is not given.
        head_dim: D.
        softmax_scale: factor of the scores; None is the default.
        backend: "auto", "triton" or "eager".
        sdpa: what PyTorch's attention computes, for the reasons.
        sdpa_problems: why it cannot.
        head_dims: those that the kernel has.

    Returns:
        The path "triton", "sdpa" or "eager".
    """
    given = autocast_like(*tensors)
    choice = select_backend(*given, backend=backend, unsupported=kernel_problems(head_dim, softmax_scale, head_dims))
    if not takes_cpu_form(choice, backend, given[0]):
        return choice
    return Choice("eager", choice.reasons + sdpa_problems) if sdpa_problems else choice.via("sdpa", sdpa)


def plan_flash(query: Tensor, empty: bool, *call: object) -> Choice:
    """The path of an attention op with ``backend="flash"``.

    Args:
        query: (..., D).
        empty: whether there are no queries or no keys.
        *call: what else ``flash.require`` asks for.

    Returns:
        The path "flash"; "eager" for an empty call.

    Raises:
        ValueError: flash-attn cannot run.
    """
    flash.require(query.device, autocast_like(query)[0].dtype, query.shape[-1], *call)
    return Choice("eager", ("no queries or no keys",)) if empty else Choice("flash", (f"flash-attn {flash.version()}",))


def contiguous_channels(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` with a last dimension of stride 1, as the kernels read it, and other strides that 8 divides where 16
    does not divide the head dim."""
    unit = 8 if tensors[0].shape[-1] % 16 else 1
    for tensor in tensors:
        *others, last = tensor.stride()
        if last != 1 or (unit > 1 and any(stride % unit for stride in others)):
            break
    else:
        return tensors
    fits = [t.stride(-1) == 1 and not any(stride % unit for stride in t.stride()[:-1]) for t in tensors]
    return tuple(tensor if fit else tensor.contiguous() for tensor, fit in zip(tensors, fits, strict=True))


# Plain attention that is not ours, by the name of its path.
THEIRS = {"sdpa": sdpa_attention, "flash": flash.attention}
