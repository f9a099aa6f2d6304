"""``packed_attention``: attention of concatenated variable-length sequences, without padding, fused."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sclkern import reference
from sclkern.cpu import attention as cpu_attention
from sclkern.cpu import dropout as cpu_dropout
from sclkern.libraries import flash
from sclkern.ops import _attention, _checks
from sclkern.ops._registration import choose, public_op
from sclkern.ops.attention import run_kernel
from sclkern.ops.dispatch import Choice, autocast_all, may_read, select_backend


@public_op
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
    dropout_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each query to the keys of its own sequence; the same numbers as ``attention`` of the padded form.

    On a GPU nothing waits for the device, so the op can be captured into a CUDA graph: the lengths may change from
    replay to replay within ``max_seqlen``. Where no kernel can run on a CPU, "auto" computes sequences of equal lengths
    together, by PyTorch's scaled_dot_product_attention unless there is dropout; "eager" is
    ``reference.packed_attention``, which pads.

    Args:
        query: (Tq, H, D), dtypes and head dims as in ``attention``.
        key: (Tk, H, D) in the dtype of query.
        value: like key.
        cu_seqlens_q: (B + 1,) int32 on the device of query: 0, then the end of each sequence. Sequences may be empty;
            queries without keys get zeros. The last end may lie before Tq: the tokens after it pad a buffer, are never
            read, and get zeros, in the result and in the gradients.
        cu_seqlens_k: the same for the keys, whose last end may lie before Tk.
        max_seqlen_q: upper bound of the query lengths; a tight bound leaves fewer programs idle.
        max_seqlen_k: upper bound of the key lengths.
        dropout_p: as in ``attention``, whose limits hold for ``max_seqlen_q`` and ``max_seqlen_k``.
        softmax_scale: as in ``attention``.
        seed: as in ``attention``; sequence b has the dropout mask of sample b of a padded batch.
        dropout_ids: (B,) int64, of the sequences, as in ``attention``.
        backend: as in ``attention``.

    Returns:
        (Tq, H, D) in the dtype of query.

    Raises:
        TypeError: a tensor, the seed or a number has the wrong type.
        ValueError: wrong shape, device, range or lengths (their values are read on a CPU, on a GPU only under
            ``SCLKERN_DEBUG=1``), unknown backend, or one requested by name that cannot run.
        RuntimeError: second derivatives of the kernel; ``backend="eager"`` has them.
    """
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    numbers = dropout_p, softmax_scale, seed, dropout_ids, backend
    path = choose("packed_attention", check, plan, query, key, value, *packing, *numbers)
    query, key, value = autocast_all(query, key, value)
    packing = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k
    scale = _attention.resolve_scale(query.shape[-1], softmax_scale)
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "dropout_ids": dropout_ids}
    if path == "triton":
        return run_kernel(query, key, value, None, packing, seed, dropout_ids, dropout_p, scale)[0]
    if path == "flash":
        return flash.packed_attention(query, key, value, *packing, dropout_p, scale)
    if path == "grouped":
        return cpu_attention.packed_attention(query, key, value, *packing[:2], scale=scale, **options)
    return reference.packed_attention(query, key, value, *packing, softmax_scale=scale, **options)


def plan(
    query: Tensor | None, key: Tensor | None, value: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, *, dropout_p: float = 0.0,
    softmax_scale: float | None = None, seed: int | Tensor | None = None, dropout_ids: Tensor | None = None,
    backend: str = "auto",
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    if query is None:
        return select_backend(key, value, backend=backend)
    if backend == "flash":
        empty = 0 in (max_seqlen_q, max_seqlen_k) or (cu_seqlens_q is not None and cu_seqlens_q.shape[0] <= 1)
        return _attention.plan_flash(query, empty, dropout_p, softmax_scale, seed, dropout_ids)
    problems: tuple[str, ...] = ()
    if torch.compiler.is_compiling():
        problems += ("a compiled graph does not know the lengths, so they cannot be grouped",)
    if cu_seqlens_q is not None and cu_seqlens_q.shape[0] <= 1:
        problems += ("no sequences",)
    by = "PyTorch's scaled_dot_product_attention"
    if dropout_p > 0:
        by = "scores that a cache holds, for dropout"
        problems += cpu_dropout.problems(dropout_p, query, key, value)
    grouped = f"sequences of equal lengths are computed together, by {by}"
    choice = _attention.plan_heads((query, key, value), query.shape[-1], softmax_scale, backend, grouped, problems)
    return choice._replace(path="grouped") if choice.path == "sdpa" else choice


def check(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, seed: int | Tensor | None,
    dropout_ids: Tensor | None,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _attention.check_tensors(query, key, value, ("(Tq, H, D)", "(Tk, H, D)"))
    sides = (("q", cu_seqlens_q, max_seqlen_q, query), ("k", cu_seqlens_k, max_seqlen_k, key))
    for side, cu_seqlens, max_seqlen, tokens in sides:
        name, limit = f"cu_seqlens_{side}", f"max_seqlen_{side}"
        _checks.dtype(torch.int32, **{name: cu_seqlens})
        _checks.shape("(B + 1,)", (cu_seqlens_q.shape[0] if side == "k" else None,), **{name: cu_seqlens})
        if cu_seqlens.shape[0] == 0:
            raise ValueError(f"{name}: got shape (0,), expected (B + 1,), of at least one element")
        _checks.same_device("query", query, **{name: cu_seqlens})
        _checks.integer(limit, max_seqlen, 0)
        if may_read(cu_seqlens):
            _check_ends(name, limit, cu_seqlens.tolist(), max_seqlen, tokens.shape[0])
    _attention.check_numbers(dropout_p, softmax_scale, seed, query.device, max_seqlen_q, max_seqlen_k)
    _checks.dropout_ids("(B,)", (cu_seqlens_q.shape[0] - 1,), "query", query, dropout_ids)


def _check_ends(name: str, limit: str, ends: list[int], max_seqlen: int, num_tokens: int) -> None:
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[:1] != [0] or min(lengths, default=0) < 0 or ends[-1] > num_tokens:
        shown = str(ends) if len(ends) <= 12 else f"{str(ends[:12])[:-1]}, ...]"
        raise ValueError(f"{name}: got {shown}, expected 0, then ascending ends of at most {num_tokens}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"{limit}: got {max_seqlen}, expected at least the longest sequence, {max(lengths)}")
