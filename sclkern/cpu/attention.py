"""Attention of sequences of equal lengths together: with dropout by scores that a core's cache holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.cpu.dropout import LOWEST, attention_counters, attention_draws
from sclkern.kernels.attention_gradients import neighbours
from sclkern.random import seed_tensor
from sclkern.reference.attention import attention_dropout_threshold, biased_mask

# Scores at once.
PIECE = 2**18


class Batch(NamedTuple):
    """Neighbouring sequences of the same two lengths.

    Attributes:
        first: number of the first of them.
        size: how many.
        queries: length of each.
        keys: length of each.
        query_start: the first token.
        key_start: the first token.
    """

    first: int
    size: int
    queries: int
    keys: int
    query_start: int
    key_start: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to attend from or to."""
        return not self.queries or not self.keys

    def of_queries(self, x: Tensor) -> Tensor:
        """(size, queries, H, D) of (Tq, H, D)."""
        stop = self.query_start + self.size * self.queries
        return x[self.query_start : stop].unflatten(0, (self.size, self.queries))

    def of_keys(self, x: Tensor) -> Tensor:
        """(size, keys, H, D) of (Tk, H, D)."""
        stop = self.key_start + self.size * self.keys
        return x[self.key_start : stop].unflatten(0, (self.size, self.keys))


def batches(lengths: Sequence[tuple[int, int]]) -> list[Batch]:
    """Put sequences together that are neighbours and of the same lengths.

    Args:
        lengths: queries and keys of each sequence.

    Returns:
        The batches.
    """
    found: list[Batch] = []
    query = key = 0
    for number, (queries, keys) in enumerate(lengths):
        if found and found[-1].queries == queries and found[-1].keys == keys:
            found[-1] = found[-1]._replace(size=found[-1].size + 1)
        else:
            found.append(Batch(number, 1, queries, keys, query, key))
        query, key = query + queries, key + keys
    return found


class Pieces(NamedTuple):
    """Some heads of one sequence, or all of some: what is computed at once.

    Attributes:
        sequences: of the batch.
        heads: of each.
        rows: (sequence, head) pairs in the probabilities of the batch.
    """

    sequences: slice
    heads: slice
    rows: slice

    def take(self, x: Tensor) -> Tensor:
        """(N, L, D) of (size, L, H, D), N sequences and heads."""
        return self.place(x).flatten(0, 1)

    def place(self, x: Tensor) -> Tensor:
        """(sequences, heads, L, D) of (size, L, H, D), a view."""
        return x[self.sequences, :, self.heads].transpose(1, 2)


def pieces(batch: Batch, num_heads: int) -> Iterator[Pieces]:
    """Cut a batch so that a piece has about ``PIECE`` scores."""
    pairs = max(1, PIECE // max(1, batch.queries * batch.keys))
    sequences, heads = max(1, pairs // num_heads), min(pairs, num_heads)
    for start in range(0, batch.size, sequences):
        stop = min(start + sequences, batch.size)
        for head in range(0, num_heads, heads):
            last = min(head + heads, num_heads)
            rows = slice(start * num_heads + head, (stop - 1) * num_heads + last)
            yield Pieces(slice(start, stop), slice(head, last), rows)


class _Attention(torch.autograd.Function):
    """Attention of batches. It keeps probabilities, negative where dropout has kept them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: list[Batch], ids: Tensor, seed: int,
        dropout_p: float, scale: float,
    ) -> Tensor:  # fmt: skip
        threshold, factor = attention_dropout_threshold(dropout_p)
        heads = query.shape[1]
        by_head = (ids[:, None] * heads + torch.arange(heads)).flatten() if dropout_p > 0 else ids
        out = _room(query, sum(part.size * part.queries for part in parts if part.keys))
        saved = []
        for part in parts:
            p = query.new_empty((part.size * heads, part.queries, part.keys))
            saved.append(p)
            if part.is_empty:
                continue
            q, k, v, o = part.of_queries(query), part.of_keys(key), part.of_keys(value), part.of_queries(out)
            counters = attention_counters(part.queries, part.keys) if dropout_p > 0 else None
            for piece in pieces(part, heads):
                scores = _product(piece.take(q), piece.take(k).transpose(1, 2), scale)
                rows = p[piece.rows]
                torch.softmax(scores, -1, out=rows)
                kept = rows
                if counters is not None:
                    first = part.first * heads
                    names = by_head[first + piece.rows.start : first + piece.rows.stop]
                    draws = attention_draws(names, counters, part.queries, part.keys, seed)
                    kept = torch.ge(draws, threshold + LOWEST, out=scores)
                    kept *= rows
                    rows.sub_(kept, alpha=2)
                mixed = torch.bmm(kept, piece.take(v))
                place = piece.place(o)
                torch.mul(mixed.view(place.shape), factor, out=place)
        ctx.save_for_backward(query, key, value, out, *saved)
        ctx.parts, ctx.numbers = parts, (dropout_p > 0, factor, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *saved = ctx.saved_tensors
        dropped, factor, scale = ctx.numbers
        heads = query.shape[1]
        grads = _gradients(query, key, value, ctx.parts)
        for part, p in zip(ctx.parts, saved, strict=True):
            if part.is_empty:
                continue
            q, k, v, o, d = (
                part.of_queries(query), part.of_keys(key), part.of_keys(value), part.of_queries(out),
                part.of_queries(grad_out),
            )  # fmt: skip
            places = part.of_queries(grads[0]), part.of_keys(grads[1]), part.of_keys(grads[2])
            # By head, what the softmax subtracts: the sum of probabilities and their gradients.
            total = (o * d).sum(-1).transpose(1, 2).flatten(0, 1)[..., None]
            for piece in pieces(part, heads):
                rows, grad = p[piece.rows], piece.take(d)
                kept = rows.clamp(max=0) if dropped else rows
                sign = -factor if dropped else 1.0
                grad_value = torch.bmm(kept.transpose(1, 2), grad)
                grad_scores = torch.bmm(grad, piece.take(v).transpose(1, 2))
                grad_scores *= kept
                if dropped:
                    torch.abs(rows, out=kept)
                grad_scores.addcmul_(kept, total[piece.rows] / -sign)
                for place, x, by in (
                    (places[0], torch.bmm(grad_scores, piece.take(k)), sign * scale),
                    (places[1], torch.bmm(grad_scores.transpose(1, 2), piece.take(q)), sign * scale),
                    (places[2], grad_value, sign),
                ):
                    place = piece.place(place)
                    torch.mul(x.view(place.shape), by, out=place)
        return *grads, None, None, None, None, None


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    out = a.new_empty((*a.shape[:2], b.shape[2]))
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _room(x: Tensor, computed: int, *parts: int) -> Tensor:
    """Memory for tokens like x, or for several of each; zeros if not all are computed, such as those after the last
    sequence."""
    allocate = x.new_empty if computed == len(x) else x.new_zeros
    return allocate((len(x), *parts, *x.shape[1:]))


def _gradients(query: Tensor, key: Tensor, value: Tensor, parts: list[Batch]) -> tuple[Tensor, ...]:
    """Memory for the gradients, of which those of one projection lie in one tensor."""
    computed = [part for part in parts if not part.is_empty]
    queries = sum(part.size * part.queries for part in computed)
    keys = sum(part.size * part.keys for part in computed)
    if neighbours(query, key, value):
        return _room(query, min(queries, keys), 3).unbind(1)
    joint = _room(key, keys, 2).unbind(1) if neighbours(key, value) else (_room(key, keys), _room(value, keys))
    return _room(query, queries), *joint


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, scale: float, seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``reference.attention`` without a mask of keys; None as the seed draws one.

    Args:
        query: (B, Lq, H, D).
        key: (B, Lk, H, D).
        value: like key.
        dropout_p: above 0, rounded to a multiple of 1 / 65536, and less than 1 then.
        scale: factor of the scores.
        seed: of the dropout mask; None draws one.
        dropout_ids: (B,) int64, or None.

    Returns:
        (B, Lq, H, D).
    """
    count, queries, keys = *query.shape[:2], key.shape[1]
    packed = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    parts = [Batch(0, count, queries, keys, 0, 0)]
    out = _attend(*packed, parts, torch.arange(count) if dropout_ids is None else dropout_ids, dropout_p, scale, seed)
    return out.view(query.shape)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, dropout_p: float,
    scale: float, seed: int | Tensor | None = None, dropout_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``reference.packed_attention`` without padding; without dropout by PyTorch's attention.

    Args:
        query: (Tq, H, D).
        key: (Tk, H, D).
        value: like key.
        cu_seqlens_q: (B + 1,) int32, B at least 1.
        cu_seqlens_k: likewise.
        dropout_p: as in ``attention``, or 0.
        scale: factor of the scores.
        seed: of the dropout mask; None draws one.
        dropout_ids: (B,) int64, or None.

    Returns:
        (Tq, H, D).
    """
    lengths = list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))
    ids = torch.arange(len(lengths)) if dropout_ids is None else dropout_ids
    groups: dict[tuple[int, int], list[int]] = {}
    for sequence, pair in enumerate(lengths):
        groups.setdefault(pair, []).append(sequence)
    order = [sequence for group in groups.values() for sequence in group]
    if order == sorted(order):
        return _attend(query, key, value, batches(lengths), ids, dropout_p, scale, seed)
    # One gather brings all tokens into the order of the groups, one scatter takes them back.
    queries, keys = (_tokens(order, ends.tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
    tensors = query.index_select(0, queries), key.index_select(0, keys), value.index_select(0, keys)
    parts = batches([lengths[sequence] for sequence in order])
    out = _attend(*tensors, parts, ids[torch.tensor(order)], dropout_p, scale, seed)
    return out.new_zeros(query.shape).index_copy(0, queries, out)


def _tokens(sequences: list[int], ends: list[int]) -> Tensor:
    return torch.cat([torch.arange(ends[sequence], ends[sequence + 1]) for sequence in sequences])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, parts: list[Batch], ids: Tensor, dropout_p: float, scale: float,
    seed: int | Tensor | None,
) -> Tensor:  # fmt: skip
    if attention_dropout_threshold(dropout_p)[0]:
        number = int(seed_tensor(seed, query.device))
        out: Tensor = _Attention.apply(query, key, value, parts, ids, number, dropout_p, scale)
        return out
    sizes = [[part.size * length for length in (part.queries, part.keys)] for part in parts]
    sides = []
    for tensor, side in ((query, 0), (key, 1), (value, 1)):
        whole = [size[side] for size in sizes]
        sides.append(tensor.split([*whole, len(tensor) - sum(whole)]))
    outputs = []
    for part, q, k, v in zip(parts, *(side[:-1] for side in sides), strict=True):
        q, k, v = q.unflatten(0, (part.size, -1)), k.unflatten(0, (part.size, -1)), v.unflatten(0, (part.size, -1))
        out = (
            reference.attention(q, k, v, softmax_scale=scale) if part.is_empty else sdpa_attention(q, k, v, None, scale)
        )
        outputs.append(out.flatten(0, 1))
    rest = sides[0][-1]
    if len(rest):
        outputs.append(torch.zeros_like(rest))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``reference.attention`` by PyTorch's attention, which stores no scores without dropout and gradients of a bias.

    Args:
        query: (B, Lq, H, D), B and Lq at least 1.
        key: (B, Lk, H, D), Lk at least 1.
        value: as key.
        mask: (B, Lk) bool, True = attend, or None.
        scale: factor of the scores.
        dropout_p: dropout probability, drawn by torch.
        bias: (B or 1, H or 1, Lq, Lk), or None.

    Returns:
        (B, Lq, H, D).
    """
    if bias is not None:
        return _biased_sdpa(query, key, value, mask, scale, dropout_p, bias)
    if mask is not None:
        padding = ~mask[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
        # Without a valid key the query attends to all of them: their values are the zeros that it gets.
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, dropout_p=dropout_p)
    return out.transpose(1, 2)


def _biased_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout_p: float, bias: Tensor
) -> Tensor:
    """``sdpa_attention`` with a bias, into which the mask goes."""
    attended: Tensor | None = None
    if mask is not None:
        padding = ~mask[:, :, None, None]
        key, value, attended = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0), mask[:, None, None, :]
    attended = biased_mask(bias, attended)
    # Without a valid key the query attends to all of them, and gets zeros afterwards.
    empty = ~attended.any(-1, keepdim=True)
    bias = bias.to(query.dtype).masked_fill(~attended, -math.inf).masked_fill(empty, 0.0)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, dropout_p=dropout_p)
    return out.masked_fill(empty, 0.0).transpose(1, 2)
