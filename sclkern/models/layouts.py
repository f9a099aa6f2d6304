"""How the tokens of a batch lie in memory, and attention between two such layouts.

Every layer works on (..., width), so the encoders run on padded and on packed tokens alike; only attention has to know
where a sequence ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import ops, reference

MODEL_BACKENDS = ("auto", "triton", "sdpa", "eager")


class Padded(NamedTuple):
    """(B, L, ...).

    Attributes:
        mask: (B, L) bool, True = a token; None where every place is one.
        num_frames: above 1, a sample is that many frames of equal length, each with its CLS first, and attention of the
            tokens among themselves is ``ops.frame_attention``'s.
    """

    mask: Tensor | None = None
    num_frames: int = 1


class Packed(NamedTuple):
    """(T, ...): the tokens of one sequence after those of another. Tokens after the last sequence fill a bucket.

    Attributes:
        cu_seqlens: (S + 1,) int32, where each sequence starts and the last one ends.
        max_seqlen: no sequence is longer.
        parts: (sequences, length) of neighbours of equal length, in order; () where lengths are no host's knowledge.
        num_frames: as in ``Padded``, of every sequence.
        mask, order: where ``parts`` are unknown: the padded batch's (S, L) bool, and the place in it of each token,
            (T,) int64, all different.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    parts: tuple[tuple[int, int], ...] = ()
    num_frames: int = 1
    mask: Tensor | None = None
    order: Tensor | None = None


Layout = Padded | Packed


class Rows(NamedTuple):
    """Some tokens of a layout, K of each sequence: the only ones whose output is computed.

    Attributes:
        index: (B, K) int64 places in a sequence of ``Padded``; (R,) int64 tokens of ``Packed``.
        layout: of the tokens taken.
    """

    index: Tensor
    layout: Layout

    def take(self, x: Tensor) -> Tensor:
        """x (B, L, D) or (T, D) at the rows: (B, K, D) or (R, D)."""
        if isinstance(self.layout, Packed):
            return x.index_select(0, self.index)
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, queries: Layout, keys: Layout, *, dropout_p: float, backend: str
) -> Tensor:
    """Attention of the tokens of one layout to those of another.

    Args:
        query, key, value: (B, L, H, D) or (T, H, D). queries, keys: their layouts, both padded or both packed.
        backend: one of ``MODEL_BACKENDS``; "sdpa" is torch's own, for padded tokens.
    """
    frames = keys.num_frames > 1 and queries is keys
    op_backend = "eager" if backend == "sdpa" else backend
    if isinstance(queries, Packed):
        if frames:
            return _framed(query, key, value, keys, op_backend)
        lengths = queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen
        return ops.packed_attention(query, key, value, *lengths, dropout_p=dropout_p, backend=op_backend)
    if frames:
        return ops.frame_attention(query, key, value, keys.num_frames, backend=op_backend)
    if backend == "sdpa":
        mask = None if keys.mask is None else keys.mask[:, None, None, :]
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p).transpose(1, 2)
    return ops.attention(query, key, value, key_padding_mask=keys.mask, dropout_p=dropout_p, backend=backend)


def _framed(query: Tensor, key: Tensor, value: Tensor, layout: Packed, backend: str) -> Tensor:
    outputs, start = [], 0
    for sequences, length in layout.parts:
        stop = start + sequences * length
        part = (t[start:stop].unflatten(0, (sequences, length)) for t in (query, key, value))
        outputs.append(ops.frame_attention(*part, layout.num_frames, backend=backend).flatten(0, 1))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def recorded(
    query: Tensor, key: Tensor, value: Tensor, keys: Padded, probabilities: list[Tensor], *, dropout_p: float
) -> Tensor:
    """Attention by the eager definition, its (B, H, Lq, Lk) probabilities appended with their graph, before dropout."""
    mask = None if keys.mask is None else keys.mask[:, None, None, :]
    if keys.num_frames > 1:
        mask = reference.frame_attention_mask(keys.num_frames, key.shape[1] // keys.num_frames, key.device)
    weights = reference.attention_probabilities(query, key, mask=mask)
    probabilities.append(weights)
    return torch.einsum("bhqk,bkhd->bqhd", F.dropout(weights, dropout_p), value)


def by_part(x: Tensor, layout: Packed, others: Packed) -> list[tuple[Tensor, Tensor | None]]:
    """Packed tokens as padded batches, one for each part of either layout.

    Returns:
        For each part (sequences, L, D) and the (sequences, L) bool mask of its tokens, None where all are.
    """
    if layout.parts:
        ends = [sequences * length for sequences, length in layout.parts]
        return [(tokens.unflatten(0, part), None) for tokens, part in zip(x.split(ends), layout.parts, strict=True)]
    padded = (
        x.new_zeros((layout.mask.numel(), x.shape[-1])).index_copy(0, layout.order, x).unflatten(0, layout.mask.shape)
    )
    sizes = [sequences for sequences, _ in others.parts]
    return list(zip(padded.split(sizes), layout.mask.split(sizes), strict=True))


def from_parts(parts: list[Tensor], layout: Packed) -> Tensor:
    """The inverse of ``by_part``: (sequences, L, D) each, to (T, D)."""
    x = torch.cat([part.flatten(0, 1) for part in parts])
    return x if layout.parts else x.index_select(0, layout.order)
