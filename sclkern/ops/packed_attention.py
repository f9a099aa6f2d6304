"""``packed_attention``: attention of concatenated variable-length sequences, without padding, fused."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sclkern import reference
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
    backend: str = "auto",
) -> Tensor:
    """Attention of each query to the keys of its own sequence; the same numbers as ``attention`` of the padded form.

    On a GPU nothing waits for the device, so the op can be captured into a CUDA graph: the lengths may change from
    replay to replay within ``max_seqlen``. Where no kernel can run on a CPU, "auto" computes sequences of equal lengths
    together, by PyTorch's scaled_dot_product_attention unless the dropout mask of a seed is wanted; "eager" is
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
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        (Tq, H, D) in the dtype of query.

    Raises:
        TypeError: a tensor, the seed or a number has the wrong type.
        ValueError: wrong shape, device, range or lengths (their values are read on a CPU, on a GPU only under
            ``SCLKERN_DEBUG=1``), or unknown backend.
        RuntimeError: second derivatives of the kernel; ``backend="eager"`` has them.
    """
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    path = choose("packed_attention", check, plan, query, key, value, *packing, dropout_p, softmax_scale, seed, backend)
    query, key, value = autocast_all(query, key, value)
    packing = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k
    scale = _attention.resolve_scale(query.shape[-1], softmax_scale)
    if path == "triton":
        return run_kernel(query, key, value, None, packing, seed, dropout_p, scale)[0]
    if path == "grouped":
        return _attend_by_lengths(query, key, value, *packing[:2], dropout_p, scale, seed)
    return reference.packed_attention(query, key, value, *packing, dropout_p=dropout_p, softmax_scale=scale, seed=seed)


def plan(
    query: Tensor | None, key: Tensor | None, value: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, *, dropout_p: float = 0.0,
    softmax_scale: float | None = None, seed: int | Tensor | None = None, backend: str = "auto",
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    if query is None:
        return select_backend(key, value, backend=backend)
    problems: tuple[str, ...] = ()
    if torch.compiler.is_compiling():
        problems += ("a compiled graph does not know the lengths, so they cannot be grouped",)
    if cu_seqlens_q is not None and cu_seqlens_q.shape[0] <= 1:
        problems += ("no sequences",)
    by = "PyTorch's scaled_dot_product_attention"
    if dropout_p > 0 and seed is not None:
        by = "the definition, for the dropout mask of a seed"
    grouped = f"sequences of equal lengths are computed together, by {by}"
    choice = _attention.plan_heads((query, key, value), query.shape[-1], softmax_scale, backend, grouped, problems)
    return choice._replace(path="grouped") if choice.path == "sdpa" else choice


def check(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, seed: int | Tensor | None,
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


def _check_ends(name: str, limit: str, ends: list[int], max_seqlen: int, num_tokens: int) -> None:
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[:1] != [0] or min(lengths, default=0) < 0 or ends[-1] > num_tokens:
        shown = str(ends) if len(ends) <= 12 else f"{str(ends[:12])[:-1]}, ...]"
        raise ValueError(f"{name}: got {shown}, expected 0, then ascending ends of at most {num_tokens}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"{limit}: got {max_seqlen}, expected at least the longest sequence, {max(lengths)}")


def _attend_by_lengths(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, dropout_p: float,
    scale: float, seed: int | Tensor | None,
) -> Tensor:  # fmt: skip
    """``reference.packed_attention`` without padding: one batch for all sequences of the same two lengths."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    groups: dict[tuple[int, int], list[int]] = {}
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    for sequence, pair in enumerate(lengths):
        groups.setdefault(pair, []).append(sequence)
    if len(groups) == 1:
        queries, keys, values = query[: ends_q[-1]], key[: ends_k[-1]], value[: ends_k[-1]]
    else:
        # One gather brings all tokens into the order of the groups, one scatter takes them back.
        queries = query.index_select(0, _tokens(groups, ends_q))
        keys, values = (tensor.index_select(0, _tokens(groups, ends_k)) for tensor in (key, value))
    sizes_q, sizes_k = ([len(group) * pair[side] for pair, group in groups.items()] for side in (0, 1))
    sides = zip(groups.items(), queries.split(sizes_q), keys.split(sizes_k), values.split(sizes_k), strict=True)
    outputs = []
    for ((num_queries, num_keys), group), q, k, v in sides:
        q = q.unflatten(0, (len(group), num_queries))
        k, v = (tensor.unflatten(0, (len(group), num_keys)) for tensor in (k, v))
        outputs.append(_attend_group(q, k, v, torch.tensor(group), dropout_p, scale, seed).flatten(0, 1))
    if len(groups) == 1 and ends_q[-1] == query.shape[0]:
        return outputs[0]
    out = torch.cat(outputs)
    return out.new_zeros(query.shape).index_copy(0, _tokens(groups, ends_q), out)


def _tokens(groups: dict[tuple[int, int], list[int]], ends: list[int]) -> Tensor:
    """Indices of the tokens in the order of the groups."""
    sequences = [sequence for group in groups.values() for sequence in group]
    return torch.cat([torch.arange(ends[sequence], ends[sequence + 1]) for sequence in sequences])


def _attend_group(
    query: Tensor, key: Tensor, value: Tensor, sequences: Tensor, dropout_p: float, scale: float,
    seed: int | Tensor | None,
) -> Tensor:  # fmt: skip
    """``attention`` of a batch whose samples are these sequences."""
    if dropout_p > 0 and seed is not None:
        p = reference.attention_probabilities(query, key, softmax_scale=scale)
        keep = reference.attention_dropout_mask(sequences, *p.shape[1:], dropout_p=dropout_p, seed=seed)
        p_dropped = p.masked_fill(~keep, 0.0) * reference.attention_dropout_threshold(dropout_p)[1]
        return torch.einsum("bhqk,bkhd->bqhd", p_dropped, value)
    if 0 in (query.shape[1], key.shape[1]):
        return reference.attention(query, key, value, softmax_scale=scale)
    return _attention.sdpa_attention(query, key, value, None, scale, dropout_p)
