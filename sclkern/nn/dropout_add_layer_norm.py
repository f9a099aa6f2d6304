"""``DropoutAddLayerNorm``: the end of a post-norm residual branch."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from sclkern import ops


class DropoutAddLayerNorm(nn.LayerNorm):
    """LayerNorm of ``residual + dropout(x + x_bias)``; on a GPU one kernel that stores neither mask nor sum.

    The ``state_dict`` is that of ``torch.nn.LayerNorm``.

    Args:
        normalized_shape: D, the last dimension.
        dropout: dropout probability of x in training.
        eps: added to the variance.
        backend: "auto", "triton" or "eager".
        **options: ``device`` and ``dtype``, as in torch.

    Raises:
        ValueError: ``dropout`` is not in [0, 1], or ``options`` leave out weight or bias.
    """

    def __init__(
        self,
        normalized_shape: int,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: got {dropout}, expected 0 to 1")
        super().__init__(normalized_shape, eps=eps, **options)
        if len(self.normalized_shape) != 1 or self.weight is None or self.bias is None:
            raise ValueError("normalized_shape: expected one dimension, with weight and bias")
        self.dropout, self.backend = dropout, backend

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, x_bias: Tensor | None = None, *, dropout_ids: Tensor | None = None
    ) -> Tensor:
        """Normalize ``residual + dropout(x + x_bias)``.

        Args:
            x: (..., D), the output of the branch.
            residual: like x.
            x_bias: (D,), the bias of the projection that computed x.
            dropout_ids: (...) int64, which key the dropout mask in place of the rows' indices.

        Returns:
            (..., D).
        """
        out = ops.dropout_add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            x_bias=x_bias,
            dropout_p=self.dropout if self.training else 0.0,
            eps=self.eps,
            dropout_ids=dropout_ids,
            backend=self.backend,
        )
        return cast(Tensor, out)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"
