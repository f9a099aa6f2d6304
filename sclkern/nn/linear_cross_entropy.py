"""``LinearCrossEntropy``: a linear layer over a vocabulary and the cross-entropy of its logits."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.ops.dispatch import BACKENDS
from sclkern.ops.linear_cross_entropy import REDUCTIONS


class LinearCrossEntropy(nn.Linear):
    """``torch.nn.Linear`` to V classes whose forward is the cross-entropy of its logits, which are never all in memory.

    The ``state_dict`` is that of ``torch.nn.Linear``. ``weight`` may be tied to an embedding:
    ``head.weight = embedding.weight``.

    Args:
        in_features: D, channels of the hidden states.
        out_features: V, size of the vocabulary.
        bias: whether the logits have a bias.
        ignore_index: label of rows that are left out of the loss.
        reduction: "mean", "sum" or "none".
        backend: "auto", "triton" or "eager".
        **options: ``device`` and ``dtype``, as in torch.

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
        reduction: Literal["mean", "sum", "none"] = "mean",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        for name, option, known in (("reduction", reduction, REDUCTIONS), ("backend", backend, BACKENDS)):
            if option not in known:
                raise ValueError(f"{name}: got {option!r}, expected one of {', '.join(known)}")
        super().__init__(in_features, out_features, bias, **options)
        self.ignore_index, self.reduction, self.backend = ignore_index, reduction, backend

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        return_hits: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the loss of ``hidden`` for ``labels``.

        Args:
            hidden: (..., D).
            labels: (...) int64, 0 to V - 1 or ``ignore_index``.
            return_hits: also return the number of rows, ignored ones left out, whose label is the arg max.

        Returns:
            The loss, a scalar, or (...) with ``reduction="none"``; with ``return_hits`` also an int64 scalar.

        Raises:
            TypeError: as in ``sclkern.ops.linear_cross_entropy``.
            ValueError: as in ``sclkern.ops.linear_cross_entropy``.
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
        """The linear layer alone: (..., D) to (..., V)."""
        return F.linear(hidden, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
