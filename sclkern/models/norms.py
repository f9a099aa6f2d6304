"""The LayerNorm of the network, by ``Execution.layer_norm``."""

from __future__ import annotations

from torch import Tensor, nn

from sclkern.libraries import apex
from sclkern.models.execution import Execution


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last dimension, or apex's.

    Args:
        width: channels of the tokens.
        eps: added to the variance.
        execution: how it runs; shared with the network.
    """

    def __init__(self, width: int, eps: float = 1e-5, execution: Execution | None = None) -> None:
        super().__init__(width, eps=eps)
        self.execution = execution or Execution()

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) to (..., W)."""
        if self.execution.layer_norm == "apex":
            return apex.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)
