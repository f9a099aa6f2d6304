"""``packed_attention``: attention of sequences that lie one after another, without padding, fused."""

from __future__ import annotations

import itertools
import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.ops.attention import (
    autocast,
    check_numbers,
    contiguous_channels,
    takes_torch,
    torch_attention,
    unsupported,
)
from sclkern.ops.dispatch import choose, interpreted, may_read
from sclkern.random import seed_tensor
from sclkern.reference.attention import pack_sequences, pad_sequences


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each query to the keys of its own sequence; the same numbers as ``attention`` of the padded form.

    On a GPU nothing waits for the device, so the op can be captured into a CUDA graph: the lengths may change from
    replay to replay within ``max_seqlen``. On a CPU, "auto" computes sequences of equal lengths together, without
    dropout by torch's scaled_dot_product_attention; "eager" is ``reference.packed_attention``, which pads.

    Args:
        query: (Tq, H, D), dtypes and head dims as in ``attention``. key, value: (Tk, H, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on the device of query: 0, then where each sequence ends. Length 0
            is allowed on either side; queries without keys get zeros. The last end may lie before Tq and Tk: the tokens
            after it fill a buffer, are never read, and get zeros, in the result and in the gradients.
        max_seqlen_q, max_seqlen_k: no sequence is longer; the nearer to the longest, the fewer idle programs.
        dropout_p, softmax_scale: as in ``attention``; its limits of the lengths hold for ``max_seqlen``.
        seed: as in ``attention``; the mask of a sequence is that of a sample of ``reference.attention_dropout_mask``.

    Returns:
        (Tq, H, D) in the dtype of query.

    Raises:
        TypeError: a tensor, the seed or a number has the wrong type. ValueError: wrong shape, device, range or lengths
            (their values are read on a CPU, on a GPU under ``SCLKERN_DEBUG=1`` alone), or unknown backend.
            RuntimeError: second derivatives; ``backend="eager"`` has them.
    """
    query, key, value = (autocast(tensor) for tensor in (query, key, value))
    check(query, key, value)
    check_lengths(query, "q", cu_seqlens_q, max_seqlen_q, query.shape[0])
    check_lengths(query, "k", cu_seqlens_k, max_seqlen_k, key.shape[0])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        shapes = tuple(cu_seqlens_k.shape), tuple(cu_seqlens_q.shape)
        raise ValueError(f"cu_seqlens_k: got shape {shapes[0]}, expected that of cu_seqlens_q, {shapes[1]}")
    check_numbers(dropout_p, softmax_scale, seed, query.device, max_seqlen_q, max_seqlen_k)
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else float(softmax_scale)
    lengths = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    if choose(query, key, value, backend=backend, unsupported=unsupported(query, scale)).backend == "triton":
        seed = seed_tensor(seed, query.device) if dropout_p > 0 else None
        tensors = (contiguous_channels(tensor) for tensor in (query, key, value))
        limits = max_seqlen_q, max_seqlen_k
        return torch.ops.sclkern.packed_attention(*tensors, *lengths, seed, *limits, float(dropout_p), scale)[0]
    # Groups need the lengths on the host, which a traced graph does not have.
    if takes_torch(query, 0.0, seed, backend) and not torch.compiler.is_compiling() and cu_seqlens_q.shape[0] > 1:
        seed = seed_tensor(seed, query.device) if dropout_p > 0 and seed is not None else None
        return _grouped(query, key, value, *lengths, dropout_p, scale, seed)
    options = {"dropout_p": dropout_p, "softmax_scale": scale, "seed": seed}
    return reference.packed_attention(query, key, value, *lengths, max_seqlen_q, max_seqlen_k, **options)


def check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.is_floating_point():
        raise TypeError(f"query: got {query.dtype}, expected a floating dtype")
    if query.ndim != 3 or 0 in query.shape[1:]:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected (Tq, H, D) with H and D of at least 1")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected that of query, {query.dtype}")
        if tensor.ndim != 3 or tensor.shape != (key.shape[0], *query.shape[1:]):
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected (Tk, H, D), the same Tk for key and value, "
                f"for query of shape (Tq, H, D) = {tuple(query.shape)}"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of query, {query.device}")


def check_lengths(query: Tensor, side: str, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """``side`` is "q" or "k"; ``total`` the tokens of that side."""
    name, limit = f"cu_seqlens_{side}", f"max_seqlen_{side}"
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: got {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: got shape {tuple(cu_seqlens.shape)}, expected (B + 1,)")
    if cu_seqlens.device != query.device:
        raise ValueError(f"{name}: got device {cu_seqlens.device}, expected that of query, {query.device}")
    if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
        raise TypeError(f"{limit}: got {type(max_seqlen).__name__}, expected an int")
    if max_seqlen < 0:
        raise ValueError(f"{limit}: got {max_seqlen}, expected at least 0")
    if may_read(cu_seqlens):
        ends = cu_seqlens.tolist()
        sizes = [end - start for start, end in itertools.pairwise(ends)]
        if ends[0] != 0 or min(sizes, default=0) < 0 or ends[-1] > total:
            raise ValueError(f"{name}: got {_shortened(ends)}, expected 0, then ascending ends of at most {total}")
        if max(sizes, default=0) > max_seqlen:
            raise ValueError(f"{limit}: got {max_seqlen}, expected at least the longest sequence, {max(sizes)}")


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{str(numbers[:12])[:-1]}, ...]"


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float,
    scale: float,
    seed: Tensor | None,
) -> Tensor:
    """``reference.packed_attention`` without padding: one batch for all sequences of the same two lengths."""
    ends_q, ends_k, total = cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), query.shape[0]
    groups: dict[tuple[int, int], list[int]] = {}
    for place, pair in enumerate(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)):
        groups.setdefault(pair, []).append(place)
    alone = len(groups) == 1
    if alone:
        query, key, value = query[: ends_q[-1]], key[: ends_k[-1]], value[: ends_k[-1]]
    else:
        # One gather of all tokens into the order of the groups, and one back.
        order_q, order_k = (
            torch.cat([torch.arange(ends[i], ends[i + 1]) for group in groups.values() for i in group])
            for ends in (ends_q, ends_k)
        )
        query, key, value = (t.index_select(0, o) for t, o in ((query, order_q), (key, order_k), (value, order_k)))
    sizes_q, sizes_k = ([len(group) * pair[side] for pair, group in groups.items()] for side in (0, 1))
    outputs = []
    for (pair, group), q, k, v in zip(
        groups.items(), query.split(sizes_q), key.split(sizes_k), value.split(sizes_k), strict=True
    ):
        q, k, v = (t.unflatten(0, (len(group), length)) for t, length in ((q, pair[0]), (k, pair[1]), (v, pair[1])))
        if seed is None:
            out = torch_attention(q, k, v, None, scale, dropout_p)
        else:
            weights = reference.attention_probabilities(q, k, softmax_scale=scale)
            places = torch.tensor(group)
            keep = reference.attention_dropout_mask(places, *weights.shape[1:], dropout_p=dropout_p, seed=seed)
            weights = weights.masked_fill(~keep, 0.0) * reference.attention_dropout_threshold(dropout_p)[1]
            out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        outputs.append(out.flatten(0, 1))
    out = outputs[0] if alone else torch.cat(outputs)
    if ends_q[-1] < total:
        out = F.pad(out, (0, 0, 0, 0, 0, total - ends_q[-1]))
    if alone:
        return out
    place = torch.arange(total)
    place[order_q] = torch.arange(ends_q[-1])
    return out.index_select(0, place)


# The log-sum-exp of the op has base 2 and the shape (H, Tq). Optional as in ``ops.attention``.
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Optional[Tensor],  # noqa: UP045
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    from sclkern.kernels import attention as kernels  # here, because Triton is optional

    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(query):
        return kernels.attention_forward(query, key, value, None, seed, dropout_p, softmax_scale, packing)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import attention_backward as kernels

    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    tensors = contiguous_channels(grad_out), query, key, value
    with torch.cuda.device_of(query):
        return kernels.attention_backward(*tensors, None, seed, out, lse, dropout_p, softmax_scale, packing)


_op = torch.library.custom_op("sclkern::packed_attention", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    "sclkern::packed_attention_backward", _backward, mutates_args=(), device_types="cuda"
)


def _padded(query, key, value, cu_q, cu_k, max_q, max_k):
    (q, _), (k, valid), (v, _) = (
        pad_sequences(t, cu, longest)
        for t, cu, longest in ((query, cu_q, max_q), (key, cu_k, max_k), (value, cu_k, max_k))
    )
    return q, k, v, valid


@_op.register_kernel("cpu")
def _(query, key, value, cu_q, cu_k, seed, max_q, max_k, dropout_p, softmax_scale):
    if interpreted():
        return _forward(query, key, value, cu_q, cu_k, seed, max_q, max_k, dropout_p, softmax_scale)
    padded = _padded(query, key, value, cu_q, cu_k, max_q, max_k)
    out, lse = torch.ops.sclkern.attention(*padded, seed, dropout_p, softmax_scale)
    lse = lse.view(query.shape[1], -1, max_q) if max_q else lse.view(query.shape[1], cu_q.shape[0] - 1, 0)
    lse = pack_sequences(lse.permute(1, 2, 0), cu_q, query.shape[0])
    lse[cu_q[-1] :] = -math.inf
    return pack_sequences(out, cu_q, query.shape[0]), lse.T.contiguous()


@_op_backward.register_kernel("cpu")
def _(grad_out, query, key, value, cu_q, cu_k, seed, out, lse, max_q, max_k, dropout_p, softmax_scale):
    if interpreted():
        return _backward(
            grad_out, query, key, value, cu_q, cu_k, seed, out, lse, max_q, max_k, dropout_p, softmax_scale
        )  # fmt: skip
    padded = _padded(query, key, value, cu_q, cu_k, max_q, max_k)
    grad_out, out = (pad_sequences(t, cu_q, max_q)[0] for t in (grad_out, out))
    # A CPU computes the padded form from its inputs alone, and the log-sum-exp again.
    gradients = torch.ops.sclkern.attention_backward(grad_out, *padded, seed, out, lse, dropout_p, softmax_scale)
    sides = ((cu_q, query.shape[0]), (cu_k, key.shape[0]), (cu_k, key.shape[0]))
    return tuple(pack_sequences(g, cu, total) for g, (cu, total) in zip(gradients, sides, strict=True))


@_op.register_fake
def _(query, key, value, cu_q, cu_k, seed, max_q, max_k, dropout_p, softmax_scale):
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@_op_backward.register_fake
def _(grad_out, query, key, value, cu_q, cu_k, seed, out, lse, max_q, max_k, dropout_p, softmax_scale):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.max_q, ctx.max_k, ctx.dropout_p, ctx.softmax_scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    numbers = ctx.max_q, ctx.max_k, ctx.dropout_p, ctx.softmax_scale
    gradients = torch.ops.sclkern.packed_attention_backward(grad_out, *ctx.saved_tensors, *numbers)
    return (*gradients, *[None] * 7)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('packed_attention: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
