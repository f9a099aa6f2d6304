"""What the launchers of ``linear_cross_entropy`` compute, on a CPU without the kernels, with the same arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def statistics(
    logits: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, losses: Tensor, lse: Tensor,
    margin: Tensor, hits: Tensor, columns: int,
) -> None:  # fmt: skip
    logits[:, columns:] = 0.0
    logits = _with_bias(logits, bias, lse.dtype, columns)
    used = labels != ignore_index
    known = (labels >= 0) & (labels < columns)
    label = labels.clamp(0, columns - 1)[:, None]
    positive = logits.gather(1, label)[:, 0]
    hits.copy_((logits.argmax(1) == labels) & used)
    others = logits.scatter_(1, label, -torch.inf).logsumexp(1)
    values = F.softplus(others - positive), torch.logaddexp(others, positive), others - positive
    for out, value in zip((losses, lse, margin), values, strict=True):
        out.copy_(value.masked_fill_(~known, torch.nan).masked_fill_(~used, 0.0))


def reduce(
    losses: Tensor, hits: Tensor, labels: Tensor, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count = (labels != ignore_index).sum().clamp_min(1).to(losses.dtype)
    return losses.sum() / (count if mean else 1), count, hits.sum()


def gradient(
    grad: Tensor, count: Tensor | None, logits: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor,
    margin: Tensor, ignore_index: int, first_column: int, grad_logits: Tensor, grad_bias: Tensor | None, columns: int,
) -> None:  # fmt: skip
    share = _with_bias(logits, bias, lse.dtype, columns).sub_(lse[:, None]).exp_()
    label = labels - first_column
    rows = ((label >= 0) & (label < columns)).nonzero()[:, 0]
    share[rows, label[rows]] = -torch.sigmoid(margin[rows])
    share *= (grad if count is None else grad / count).expand(len(share))[:, None]
    share.masked_fill_((labels == ignore_index)[:, None], 0.0)
    grad_logits[:, :columns] = share
    if grad_bias is not None:
        grad_bias.copy_(share.sum(0))


def _with_bias(logits: Tensor, bias: Tensor | None, dtype: torch.dtype, columns: int) -> Tensor:
    logits = logits[:, :columns].to(dtype, copy=True)
    return logits if bias is None else logits.add_(bias[:columns])
