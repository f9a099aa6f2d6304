"""``LinearCrossEntropy``: a linear layer over a vocabulary with the loss that follows it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.ops.dispatch import BACKENDS
from sclkern.ops.linear_cross_entropy import REDUCTIONS


class LinearCrossEntropy(nn.Linear):
    """``torch.nn.Linear`` to V classes whose forward is the cross-entropy of its logits, never all in memory.

    The ``state_dict`` is that of ``torch.nn.Linear``. ``weight`` may be tied to an embedding:
    ``head.weight = embedding.weight``.

    Args:
        in_features: D. out_features: V.
        ignore_index: label of the rows that take no part.
        reduction: "mean", "sum" or "none".
        backend: "auto", "triton" or "eager".

    Raises:
        ValueError: unknown ``reduction`` or ``backend``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        **options,
    ) -> None:
        for name, option, known in (("reduction", reduction, REDUCTIONS), ("backend", backend, BACKENDS)):
            if option not in known:
                raise ValueError(f"{name}: got {option!r}, expected one of {', '.join(known)}")
        super().__init__(in_features, out_features, bias, **options)
        self.ignore_index, self.reduction, self.backend = ignore_index, reduction, backend

    def forward(self, hidden: Tensor, labels: Tensor, *, return_hits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            hidden: (..., D). labels: (...) int64, 0 to V - 1 or ``ignore_index``.
            return_hits: return also how many of the other rows have their label as arg max.

        Returns:
            The loss, a scalar, or (...) with ``reduction="none"``; with ``return_hits`` also an int64 scalar.

        Raises:
            As ``sclkern.ops.linear_cross_entropy``.
        """
        return ops.linear_cross_entropy(
            hidden,
            self.weight,
            self.bias,
            labels,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            return_hits=return_hits,
            backend=self.backend,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        return F.linear(hidden, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
