"""``select_patches``, ``select_tokens`` and ``mask_text``."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sclkern.random import (
    STREAM_COMPLETION,
    STREAM_MLM,
    STREAM_PATCHES,
    STREAM_TOKENS,
    below,
    random_words,
    smallest,
    uniform,
)


def kept_patches(num_patches: int, keep_ratio: float) -> int:
    """K, the patches that ``select_patches`` keeps: the share rounded down, and at least 1."""
    return max(1, int(num_patches * keep_ratio))


def select_patches(
    num_patches: int,
    keep_ratio: float,
    batch: int,
    *,
    seed: int | Tensor,
    row_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the kept patches of each sample, uniformly without replacement.

    Args:
        num_patches: P, at least 1.
        keep_ratio: share of the patches, in [0, 1].
        batch: B.
        seed: int, or int64 tensor of one element on ``device``.
        row_ids: (B,) int64 on ``device``, 0 to 2**32 - 1: a sample draws by its id in place of its index, so that it
            keeps its mask in another batch; None are the indices.
        device: where the draw happens.

    Returns:
        (B, K) int64, ascending, with K = int(num_patches * keep_ratio) and at least 1.
    """
    words = random_words((batch, num_patches), seed=seed, stream=STREAM_PATCHES, device=device, row_ids=row_ids)[0]
    return words.argsort(dim=1, stable=True)[:, : kept_patches(num_patches, keep_ratio)].sort(dim=1).values


def select_tokens(
    num_patches: int,
    ratio: float,
    batch: int,
    *,
    seed: int | Tensor,
    row_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the patches whose embedding is replaced by the mask token.

    Args:
        num_patches: P, at least 1.
        ratio: share of the patches, in [0, 1].
        batch: B.
        seed: int, or int64 tensor of one element on ``device``.
        row_ids: (B,) int64 on ``device``, 0 to 2**32 - 1: a sample draws by its id in place of its index, so that it
            keeps its mask in another batch; None are the indices.
        device: where the draw happens.

    Returns:
        (B, P) bool, int(P * ratio) True in each row.
    """
    words = random_words((batch, num_patches), seed=seed, stream=STREAM_TOKENS, device=device, row_ids=row_ids)[0]
    return smallest(words, torch.ones_like(words, dtype=torch.bool), int(num_patches * ratio))


class MaskedText(NamedTuple):
    """Caption with masked positions.

    Attributes:
        ids: (B, L) int64, the tokens the model reads.
        selected: (B, L) bool, the positions to predict or complete.
    """

    ids: Tensor
    selected: Tensor


def mask_text(
    ids: Tensor,
    lengths: Tensor,
    *,
    kind: Literal["mlm", "completion"],
    ratio: float,
    mask_id: int,
    vocab_size: int,
    seed: int | Tensor,
    row_ids: Tensor | None = None,
    published: bool = False,
) -> MaskedText:
    """Draw and apply a text mask. Only the n = length - 2 positions between ``<s>`` and ``</s>`` are ever selected.

    Args:
        ids: (B, L) int64.
        lengths: (B,) int64, tokens of each caption with ``<s>`` and ``</s>``.
        kind: "mlm" selects max(1, round(ratio * n)) distinct positions, of which 80 % become ``<mask>``, 10 % a random
            token and 10 % stay; "completion" selects int(n * ratio) + 1 distinct positions, all of which become
            ``<mask>``.
        ratio: in [0, 1].
        mask_id: id of ``<mask>``.
        vocab_size: random tokens are below it.
        seed: int, or int64 tensor of one element on the device of ids.
        row_ids: (B,) int64 on the device of ids, as in ``select_patches``.
        published: draw as the published code does: "mlm" picks round(ratio * L) of all L padded positions and forgets
            those that are not between ``<s>`` and ``</s>``, so that a caption may get no target; "completion" draws
            with replacement.

    Returns:
        The ids that the model reads and the selected positions.
    """
    rows, width = ids.shape
    tokens = (lengths - 2).clamp_min(0)[:, None]
    column = torch.arange(width, device=ids.device)
    eligible = (column >= 1) & (column <= tokens)
    stream = STREAM_MLM if kind == "mlm" else STREAM_COMPLETION
    key, action, token, _ = random_words((rows, width), seed=seed, stream=stream, device=ids.device, row_ids=row_ids)
    if kind == "completion":
        # The same float64 product and truncation as Python's int(n * ratio).
        count = (tokens.double() * ratio).long() + 1
        if published:
            drawn = below(key, tokens) + 1
            selected = torch.zeros_like(eligible, dtype=torch.int64)
            selected.scatter_add_(1, drawn.clamp_max(width - 1), (column < count).long())
            selected = (selected > 0) & eligible
        else:
            selected = smallest(key, eligible, count)
        return MaskedText(torch.where(selected, mask_id, ids), selected)
    if published:
        selected = smallest(key, torch.ones_like(eligible), max(1, round(width * ratio))) & eligible
    else:
        selected = smallest(key, eligible, (tokens.double() * ratio + 0.5).long().clamp_min(1))
    chance = uniform(action)
    replaced = torch.where(chance < 0.9, below(token, vocab_size), ids)
    replaced = torch.where(chance < 0.8, mask_id, replaced)
    return MaskedText(torch.where(selected, replaced, ids), selected)
