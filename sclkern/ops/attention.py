"""``attention``: scaled dot-product attention with key padding, a bias of the scores and dropout, fused."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sclkern import reference
from sclkern.cpu import attention as cpu_attention
from sclkern.cpu import dropout as cpu_dropout
from sclkern.kernels.attention_gradients import fake_gradients, neighbours, padded_gradients, separate_gradients
from sclkern.kernels.attention_statistics import fake_statistics
from sclkern.ops import _attention, _checks
from sclkern.ops._registration import choose, kernels, public_op, register
from sclkern.ops.dispatch import Choice, autocast_all, select_backend
from sclkern.random import seed_tensor


@public_op
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention; scores and probabilities are never in memory (Dao et al., arXiv 2205.14135).

    Where no kernel can run on a CPU, "auto" uses PyTorch's scaled_dot_product_attention; with dropout and no
    ``key_padding_mask`` and ``bias`` a form that draws the mask of every backend as fast.

    Args:
        query: (B, Lq, H, D) float16, bfloat16 or float32 (any floating dtype on the eager path), any strides; the
            kernel supports D of 32, 64 and 128, and 72, 80, 88, 96 and 104 by tiles of 128 channels. Under autocast
            query, key and value are cast as torch's own attention casts them.
        key: (B, Lk, H, D) in the dtype of query; Lk may be 0.
        value: like key.
        key_padding_mask: (B, Lk) bool, True = attend. Padded keys and values are never read, not even NaN; a query with
            no valid key gets zeros.
        bias: (B or 1, H or 1, Lq, Lk) in the dtype of query or float32, any strides: added to the scores after
            ``softmax_scale``, such as a relative position's. A size of 1 serves all samples or heads, and the gradient
            is summed over them; of a tensor expanded to B or H, the gradient has B or H too. -inf excludes a key, as
            ``key_padding_mask`` does, and so does any number below -2.3e38, such as the lowest of float32; where the
            mask is False, the bias is not read. Not with ``backend="flash"``.
        dropout_p: dropout probability, rounded to a multiple of 1 / 65536. With dropout at most 65536 queries and
            524288 keys are supported.
        softmax_scale: factor of the scores, default 1 / sqrt(D). The kernel supports scales above 0.
        seed: of the dropout mask (``reference.attention_dropout_mask``): int, or int64 tensor of one element on the
            device of query; every backend drops the same probabilities. None draws from torch's generator: a seed, or
            the mask itself on the eager path, where counting is slow.
        dropout_ids: (B,) int64 on the device of query: the dropout mask of a sample depends on its id in place of its
            index, so that the sample keeps it in another batch, at another place and in ``packed_attention``. Ids from
            0 to 2**63 / H - 1 have masks of their own, equal ids equal ones; the ids 0 to B - 1 are the default.
        return_lse: also return the log-sum-exp.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``), or "flash":
            flash-attn 2, which draws a dropout mask of its own (``sclkern.libraries.flash``).

    Returns:
        (B, Lq, H, D) in the dtype of query; with ``return_lse`` also the natural log-sum-exp of the scores (before
        dropout), (B, H, Lq) float32 (float64 for float64), -inf without a valid key. It carries no gradient.

    Raises:
        TypeError: a tensor, the seed or a number has the wrong type.
        ValueError: wrong shape, device or range, unknown backend, or one requested by name that cannot run.
        RuntimeError: second derivatives of the kernel; ``backend="eager"`` has them.
    """
    numbers = dropout_p, softmax_scale, seed, dropout_ids, return_lse, backend
    path = choose("attention", check, plan, query, key, value, key_padding_mask, bias, *numbers)
    query, key, value = autocast_all(query, key, value)
    scale = _attention.resolve_scale(query.shape[-1], softmax_scale)
    if path == "triton":
        mask = None if key_padding_mask is None else key_padding_mask.contiguous()
        out, lse = run_kernel(query, key, value, mask, None, seed, dropout_ids, dropout_p, scale, bias)
        if not return_lse:
            return out
        # (H, B * Lq) in the kernel, with a dropout mask after them if one was drawn.
        lse = lse.detach()[: query.shape[2]].view(query.shape[2], *query.shape[:2]).transpose(0, 1)
        return out, lse * math.log(2)
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "dropout_ids": dropout_ids}
    if path in _attention.THEIRS:
        biased = () if bias is None else (bias,)
        out = _attention.THEIRS[path](query, key, value, key_padding_mask, scale, dropout_p, *biased)
    elif path == "cpu":
        out = cpu_attention.attention(query, key, value, scale=scale, **options)
    else:
        options |= {"key_padding_mask": key_padding_mask, "bias": bias, "softmax_scale": scale}
        out = reference.attention(query, key, value, **options)
    if not return_lse:
        return out
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    return out, reference.attention_log_sum_exp(query, key, mask=mask, bias=bias, softmax_scale=scale)


def plan(
    query: Tensor | None, key: Tensor | None, value: Tensor | None, *, key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None,
    seed: int | Tensor | None = None, dropout_ids: Tensor | None = None, return_lse: bool = False,
    backend: str = "auto",
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    if query is None:
        return select_backend(key, value, backend=backend)
    empty = 0 in query.shape[:2] or (key is not None and key.shape[1] == 0)
    if backend == "flash":
        return _attention.plan_flash(query, empty, dropout_p, softmax_scale, seed, dropout_ids, return_lse, bias)
    problems: tuple[str, ...] = ("no queries or no keys",) if empty else ()
    others = (query, key, value, bias), query.shape[-1], softmax_scale, backend
    if dropout_p > 0 and key_padding_mask is None and bias is None:
        problems += cpu_dropout.problems(dropout_p, query, key, value)
        choice = _attention.plan_heads(*others, "scores that a cache holds, for dropout on a CPU", problems)
        return choice._replace(path="cpu") if choice.path == "sdpa" else choice
    if dropout_p > 0 and not (seed is None and dropout_ids is None):
        problems += ("PyTorch's attention cannot draw the dropout mask of a seed or of ids",)
    return _attention.plan_heads(*others, "PyTorch's scaled_dot_product_attention on a CPU", problems)


def check(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, bias: Tensor | None, dropout_p: float,
    softmax_scale: float | None, seed: int | Tensor | None, dropout_ids: Tensor | None, return_lse: bool,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _attention.check_tensors(query, key, value, ("(B, Lq, H, D)", "(B, Lk, H, D)"))
    _attention.check_padding_mask("query", query, key, key_padding_mask)
    _attention.check_bias(query, key, bias)
    _checks.dropout_ids("(B,)", query.shape[:1], "query", query, dropout_ids)
    _checks.boolean("return_lse", return_lse)
    _attention.check_numbers(dropout_p, softmax_scale, seed, query.device, query.shape[1], key.shape[1])


Packing = tuple[Tensor, Tensor, int, int]
"""``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q`` and ``max_seqlen_k`` of packed sequences."""


def run_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packing: Packing | None,
    seed: int | Tensor | None, dropout_ids: Tensor | None, dropout_p: float, scale: float, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel of padded and packed attention.

    Args:
        query: (B, Lq, H, D), or packed (Tq, H, D).
        key: (B, Lk, H, D), or packed (Tk, H, D).
        value: like key.
        mask: (B, Lk) bool, contiguous, or None.
        packing: the lengths of packed sequences, contiguous, or None.
        seed: of the dropout mask; None draws one.
        dropout_ids: (B,) int64, or None.
        dropout_p: dropout probability.
        scale: factor of the scores.
        bias: (B or 1, H or 1, Lq, Lk), not of packed sequences, or None.

    Returns:
        Like query; and the log-sum-exp, (H or more, rows of query) float32, without a gradient, in base 2, the kernel's
        own: a conversion would round a score of 1000 twice more.
    """
    seed = seed_tensor(seed, query.device) if dropout_p > 0 else None
    ids = None if seed is None or dropout_ids is None else dropout_ids.contiguous()
    tensors = _attention.contiguous_channels(query, key, value)
    shared = 0
    # A compiler may keep the parts of a tensor as tensors of their own.
    if key.stride(-3) > key.shape[-2] * key.shape[-1] and not torch.compiler.is_compiling():
        shared = 3 if neighbours(*tensors) else 2 if neighbours(*tensors[1:]) else 0
    numbers = float(dropout_p), scale, shared
    if bias is not None:
        return _op_with_bias(*tensors, bias, mask, seed, ids, *numbers)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packing or (None, None, 0, 0)
    return _op(*tensors, mask, cu_seqlens_q, cu_seqlens_k, seed, ids, max_seqlen_q, max_seqlen_k, *numbers)


def _packing(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_q: int, max_k: int) -> Packing | None:
    return None if cu_seqlens_q is None or cu_seqlens_k is None else (cu_seqlens_q, cu_seqlens_k, max_q, max_k)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seed: Tensor | None, dropout_ids: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, shared: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = dropout_p, softmax_scale, packing, dropout_ids
    return kernels.attention.attention_forward(query, key, value, mask, seed, *options)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seed: Tensor | None, dropout_ids: Tensor | None, out: Tensor, lse: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, shared: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With ``shared`` the gradients of so many are parts of one result, as the tensors are of one tensor."""
    tensors = *_attention.contiguous_channels(grad_out), query, key, value, mask, seed, out, lse
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = dropout_p, softmax_scale, packing, dropout_ids, shared
    return padded_gradients(*kernels.attention_backward.attention_backward(*tensors, *options))


def _fake(query: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), fake_statistics(query, **others)


_op = register(
    "attention", _forward, _fake, _backward, fake_gradients, outputs="out lse",
    gradients="query key value", finish=separate_gradients,
)  # fmt: skip


def _forward_with_bias(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, seed: Tensor | None,
    dropout_ids: Tensor | None, dropout_p: float, softmax_scale: float, shared: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = dropout_p, softmax_scale, None, dropout_ids, bias
    return kernels.attention.attention_forward(query, key, value, mask, seed, *options)


def _backward_with_bias(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None,
    seed: Tensor | None, dropout_ids: Tensor | None, out: Tensor, lse: Tensor, dropout_p: float,
    softmax_scale: float, shared: int, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``_backward``; without ``needs_bias`` the gradient of the bias is empty."""
    tensors = *_attention.contiguous_channels(grad_out), query, key, value, mask, seed, out, lse
    numbers = dropout_p, softmax_scale
    gradients = kernels.attention_backward.attention_backward(*tensors, *numbers, None, dropout_ids, shared, bias)
    grad_bias = (
        kernels.attention_backward_bias.attention_backward_bias(*tensors, *numbers, bias, dropout_ids)
        if needs_bias
        else bias.new_empty((0,))
    )
    return *padded_gradients(*gradients), grad_bias


def _fake_with_bias(query: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    return _fake(query, cu_seqlens_k=None, max_seqlen_k=0, **others)


def _fake_gradients_with_bias(bias: Tensor, needs_bias: bool, **others: Any) -> tuple[Tensor, ...]:
    return *fake_gradients(**others), bias.new_empty(bias.shape if needs_bias else (0,))


_op_with_bias = register(
    "attention_with_bias", _forward_with_bias, _fake_with_bias, _backward_with_bias, _fake_gradients_with_bias,
    outputs="out lse", gradients="query key value bias",
    finish=lambda results: [*separate_gradients(results[:3]), results[3]],
)  # fmt: skip
