"""Heads on the fused features (published code: heads.py and the classifiers of scl_module.py)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sclkern.models.execution import Execution
from sclkern.models.fusion import LAYER_NORM_EPS
from sclkern.models.norms import LayerNorm


class Pooler(nn.Module):
    """Linear and tanh on the mean of the CLS features of all frames.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, cls: Tensor) -> Tensor:
        """(B, F, D), one CLS a frame or one of the text, to (B, D)."""
        return self.dense(cls.mean(1)).tanh()


class MLMHead(nn.Module):
    """BERT's prediction head; its decoder is not tied to the token embedding.

    Args:
        width: D.
        vocab_size: V.
        execution: how the norm runs; shared with the network.
    """

    def __init__(self, width: int, vocab_size: int, execution: Execution | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = LayerNorm(width, LAYER_NORM_EPS, execution)
        self.decoder = nn.Linear(width, vocab_size)

    def transform(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D): the input of the decoder."""
        return self.norm(F.gelu(self.dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to logits (..., V)."""
        return self.decoder(self.transform(x))


class MLP(nn.Sequential):
    """Linear, LayerNorm, GELU, linear: the projections of the contrast and the classifiers of VQA and NLVR2.

    Args:
        width_in: input channels.
        hidden: channels between the two products.
        width_out: output channels.
        execution: how the norm runs; shared with the network.
    """

    def __init__(self, width_in: int, hidden: int, width_out: int, execution: Execution | None = None) -> None:
        norm = LayerNorm(hidden, execution=execution)
        super().__init__(nn.Linear(width_in, hidden), norm, nn.GELU(), nn.Linear(hidden, width_out))
