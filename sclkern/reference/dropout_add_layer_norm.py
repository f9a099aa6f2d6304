"""``dropout_add_layer_norm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.random import STREAM_FEATURES, philox, seed_tensor


def feature_dropout_threshold(dropout_p: float) -> int:
    """The 16-bit draw from which an element is kept: smaller draws drop it."""
    return round(dropout_p * 2**16)


def feature_dropout_scale(dropout_p: float) -> float:
    """The factor of kept elements."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def feature_dropout_keep(rows: int | Tensor, columns: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The dropout mask of features, True = keep: a function of (seed, row, column) alone.

    One Philox-4x32 call of 7 rounds serves 8 neighbouring columns. Column c = 8 g + 2 w + h of row r takes the low
    (h = 0) or high (h = 1) 16 bits of word w of the counter (g, low half of r, ``STREAM_FEATURES``, high half of r),
    and is kept where that number is at least ``feature_dropout_threshold(dropout_p)``.

    Args:
        rows: number of rows, for the rows 0, 1, ..., or the ids that stand for them, (R,) int64 on the device of seed;
            every id has a mask of its own.
        columns: number of columns.
        dropout_p: dropout probability.
        seed: int64 tensor of one element; the mask is on its device.

    Returns:
        (rows, columns) bool.
    """
    ids = rows if isinstance(rows, Tensor) else torch.arange(rows, dtype=torch.int64, device=seed.device)
    row = ids[:, None]
    group = torch.arange((columns + 7) // 8, dtype=torch.int64, device=seed.device)
    last = row >> 32 if isinstance(rows, Tensor) else None
    words = torch.stack(philox(seed.reshape(()), (row << 32) | group, STREAM_FEATURES, rounds=7, last=last), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)
    return halves[:, :columns] >= feature_dropout_threshold(dropout_p)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
    return_sum: bool = False,
    return_copy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of residual + dropout(x + x_bias) over the last dimension.

    Args:
        x: (..., D).
        residual: (..., D).
        weight: (D,).
        bias: (D,).
        x_bias: (D,), or None.
        dropout_p: dropout probability; the mask is that of ``feature_dropout_keep``, whose rows are all leading
            dimensions as one. With 0 no random number is drawn.
        eps: added to the variance.
        seed: int or int64 tensor of one element; None is torch's own dropout, or with ``dropout_ids`` a seed that is
            drawn.
        dropout_ids: (...) int64, of the rows in that mask; None are their indices.
        return_sum: return the sum as well.
        return_copy: return the norm in the dtype of x as well.

    Returns:
        (..., D) in the wider dtype of x and residual. With ``return_sum`` that in the dtype of x, and the sum
        (..., D) in the wider dtype. With ``return_copy`` the norm in the wider dtype, and in that of x.
    """
    dtype = x.dtype
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if dropout_p > 0 and seed is None and dropout_ids is None:
        x = F.dropout(x, dropout_p)
    elif dropout_p > 0:
        seed = seed_tensor(seed, x.device)
        rows = x.shape[:-1].numel() if dropout_ids is None else dropout_ids.flatten()
        keep = feature_dropout_keep(rows, x.shape[-1], dropout_p, seed).reshape(x.shape)
        x = torch.where(keep, x * feature_dropout_scale(dropout_p), 0.0)
    return norm_of_sum(residual + x, dtype, weight, bias, eps=eps, return_sum=return_sum, return_copy=return_copy)


def norm_of_sum(
    total: Tensor, dtype: torch.dtype, weight: Tensor, bias: Tensor, *, eps: float, return_sum: bool, return_copy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """What ``dropout_add_layer_norm`` returns for a sum (..., D) and the dtype of x."""
    out = F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)
    # Autocast widens a layer norm; the op's dtype is that of its tensors.
    if return_sum:
        return out.to(dtype), total
    out = out.to(total.dtype)
    return (out, out.to(dtype)) if return_copy else out
