"""How the tokens of a batch lie in memory.

Every layer works on (..., width), so the encoders run on padded and on packed tokens alike; only attention has to know
where a sequence ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DropoutKeys(NamedTuple):
    """What dropout masks depend on, in place of where the tokens lie: the same tokens of another batch, packed or
    padded, checkpointed or not, have the same masks.

    Attributes:
        sequences: (S,) int64, an id for each sequence.
        tokens: int64 of the shape of the tokens, (B, L) or (T,), an id for each token.
        seeds: (1,) int64, of every module that has dropout, by its ``dropout_number``.
    """

    sequences: Tensor
    tokens: Tensor
    seeds: tuple[Tensor, ...]

    def of(self, number: int, dropout_p: float) -> dict[str, Tensor]:
        """Arguments of an attention op: the seed of a module, and the ids of the sequences.

        Args:
            number: ``dropout_number`` of the module.
            dropout_p: dropout probability; at 0 nothing is drawn.

        Returns:
            ``seed`` and ``dropout_ids``, or nothing.
        """
        return {"seed": self.seeds[number], "dropout_ids": self.sequences} if dropout_p > 0 else {}


class Padded(NamedTuple):
    """Tokens (B, L, ...): a batch of sequences of one length, short ones padded.

    Attributes:
        mask: (B, L) bool, True = a token; None if every position holds one.
        num_frames: if above 1, a sequence consists of that many frames of equal length, each with its CLS first, and
            its self-attention is ``ops.frame_attention``.
        keys: of dropout; None draws by where the tokens lie.
    """

    mask: Tensor | None = None
    num_frames: int = 1
    keys: DropoutKeys | None = None


class Packed(NamedTuple):
    """Tokens (T, ...): sequences concatenated without padding. Tokens after the last sequence fill a bucket.

    Lengths that the host knows are in ``groups``; of other lengths ``mask`` and ``padded_index`` say where the tokens
    stand in the padded batch.

    Attributes:
        cu_seqlens: (S + 1,) int32, the start of each sequence, then the end of the last.
        max_seqlen: upper bound of the sequence lengths.
        groups: (number of sequences, length) of each run of consecutive sequences of equal length; () if the host does
            not know the lengths.
        num_frames: as in ``Padded``, of every sequence.
        mask: (S, L) bool, the tokens of the padded batch.
        padded_index: (T,) int64, the position of each token in the flattened padded batch, all different.
        keys: as in ``Padded``.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    groups: tuple[tuple[int, int], ...] = ()
    num_frames: int = 1
    mask: Tensor | None = None
    padded_index: Tensor | None = None
    keys: DropoutKeys | None = None

    def fills(self, num_tokens: int) -> bool:
        """Whether the host knows that no token lies after the last sequence."""
        return sum(sequences * length for sequences, length in self.groups) == num_tokens


Layout = Padded | Packed


class Rows(NamedTuple):
    """Some tokens of a layout, K of each sequence: the only ones whose output is computed.

    Attributes:
        token_index: (B, K) int64, positions in each sequence of ``Padded``; (R,) int64, tokens of ``Packed``.
        layout: of the tokens taken.
    """

    token_index: Tensor
    layout: Layout

    @property
    def length(self) -> int:
        """The most tokens of a sequence that are taken. Of no sequences, too: their gradients are zeros, not absent."""
        if isinstance(self.layout, Packed):
            return max((length for _, length in self.layout.groups), default=self.token_index.numel())
        return self.token_index.shape[-1]

    def take(self, x: Tensor) -> Tensor:
        """x (B, L, D) or (T, D) at the rows: (B, K, D) or (R, D)."""
        if isinstance(self.layout, Packed):
            return x.index_select(0, self.token_index)
        return x.gather(1, self.token_index[..., None].expand(-1, -1, x.shape[-1]))


class Section(NamedTuple):
    """Neighbouring sequences of a batch.

    Attributes:
        start: their first index in the first dimension of the tokens.
        stop: the index after their last.
        layout: of these tokens alone.
    """

    start: int
    stop: int
    layout: Layout

    def take(self, x: Tensor) -> Tensor:
        """The tokens of the section."""
        return x[self.start : self.stop]


def merge_groups(layout: Packed, other: Packed) -> tuple[Packed, Packed]:
    """Neighbouring groups as one, where neither side of an attention changes its length: fewer calls do the same.

    Args:
        layout: of the queries.
        other: of the keys.

    Returns:
        Both, with fewer groups or the same. A layout without groups stays without.
    """
    sides = [side.groups for side in (layout, other) if side.groups]
    merged: list[list[tuple[int, int]]] = []
    for group in zip(*sides, strict=True):
        if merged and all(before[1] == now[1] for before, now in zip(merged[-1], group, strict=True)):
            merged[-1] = [(before[0] + now[0], now[1]) for before, now in zip(merged[-1], group, strict=True)]
        else:
            merged.append(list(group))
    columns = iter([tuple(column) for column in zip(*merged, strict=True)])
    first, second = (side._replace(groups=next(columns)) if side.groups else side for side in (layout, other))
    return first, second


def unpack_groups(x: Tensor, layout: Packed, other: Packed) -> list[tuple[Tensor, Tensor | None]]:
    """Packed tokens as padded batches, one for each group.

    Args:
        x: (T, D) tokens in ``layout``.
        layout: of x.
        other: the layout on the other side of the attention; its groups are used if ``layout`` has none.

    Returns:
        For each group its tokens (sequences, L, D) and their (sequences, L) bool mask, None if there is no padding.

    Raises:
        ValueError: the layout has neither groups nor the positions in a padded batch.
    """
    if layout.groups:
        sizes = [sequences * length for sequences, length in layout.groups]
        return [(tokens.unflatten(0, group), None) for tokens, group in zip(x.split(sizes), layout.groups, strict=True)]
    mask, padded_index = _padded_batch(layout)
    flat = x.new_zeros((mask.numel(), x.shape[-1])).index_copy(0, padded_index, x)
    sizes = [sequences for sequences, _ in other.groups]
    return list(zip(flat.unflatten(0, mask.shape).split(sizes), mask.split(sizes), strict=True))


def repack(batches: list[Tensor], layout: Packed) -> Tensor:
    """The inverse of ``unpack_groups``.

    Args:
        batches: (sequences, L, D) for each group.
        layout: of the result.

    Returns:
        (T, D).
    """
    x = torch.cat([batch.flatten(0, 1) for batch in batches])
    return x if layout.groups else x.index_select(0, _padded_batch(layout)[1])


def _padded_batch(layout: Packed) -> tuple[Tensor, Tensor]:
    if layout.mask is None or layout.padded_index is None:
        raise ValueError("layout: has no groups, expected mask and padded_index of the padded batch")
    return layout.mask, layout.padded_index
