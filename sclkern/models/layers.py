"""Building blocks of the three encoders.

``layout`` says how the tokens lie (``sclkern.models.layouts``): (B, L, W) or packed (T, W), W the width.
``probabilities`` is a list that, when given, makes every attention take the eager path and append its (B, H, Lq, Lk)
probabilities, with their graph, before dropout; tokens must be padded then.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from sclkern import ops
from sclkern.models.config import HEAD_WIDTH
from sclkern.models.execution import Execution
from sclkern.models.layouts import Layout, Packed, Padded, Rows, attend, attend_and_record, repack, unpack_groups
from sclkern.nn.linear_gelu import linear_gelu
from sclkern.ops.cross_attention import plan

ACTIVATIONS: dict[str, Literal["none", "quick"]] = {"quick_gelu": "quick", "gelu": "none"}


class Attention(nn.Module):
    """Multi-head attention whose query, key and value projections are stacked in one matrix, in that order.

    As self-attention one product projects all three; as cross-attention the query rows act on ``x`` and the key and
    value rows on ``context``.

    Args:
        width: channels of the tokens.
        dropout: dropout probability of the attention probabilities.
        execution: how it runs; shared with the network.
    """

    def __init__(self, width: int, dropout: float = 0.0, execution: Execution | None = None) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = dropout
        self.execution = execution or Execution()

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        context: Tensor | None = None,
        context_layout: Layout | None = None,
        *,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend from ``x`` to ``context``.

        Args:
            x: query tokens.
            layout: of x.
            context: key and value tokens; None is self-attention.
            context_layout: of context.
            probabilities: see above.

        Returns:
            Like x.
        """
        width = x.shape[-1]
        if context is None or context_layout is None:
            query, key, value = self.in_proj(x).chunk(3, -1)
            context_layout = layout
        elif (
            probabilities is None
            and isinstance(layout, Packed)
            and isinstance(context_layout, Packed)
            and self._absorbs(x, layout, context_layout)
        ):
            return self._absorbed(x, layout, context, context_layout)
        else:
            weight, bias = self.in_proj.weight, self.in_proj.bias
            query = F.linear(x, weight[:width], bias[:width])
            key, value = F.linear(context, weight[width:], bias[width:]).chunk(2, -1)
        query, key, value = (t.unflatten(-1, (-1, HEAD_WIDTH)) for t in (query, key, value))
        dropout_p = self._dropout_p
        if probabilities is None:
            backend = self.execution.backend
            out = attend(query, key, value, layout, context_layout, dropout_p=dropout_p, backend=backend)
        elif isinstance(context_layout, Padded):
            out = attend_and_record(query, key, value, context_layout, probabilities, dropout_p=dropout_p)
        else:
            raise ValueError("probabilities: attention of packed tokens cannot record them, expected padded tokens")
        return self.out_proj(out.flatten(-2))

    def _absorbs(self, x: Tensor, layout: Packed, context_layout: Packed) -> bool:
        """Whether cross-attention folds projections into its shorter side.

        If it does, each group of sequences is a call on padded tokens; otherwise all groups are one packed call.
        """
        if self.execution.absorb == "never" or self.execution.backend == "sdpa":
            return False
        width = x.shape[-1]
        # Of the shapes that the op would see; it asks for nothing else.
        longest = (x.new_empty((0, each.max_seqlen, width)) for each in (layout, context_layout))
        form, _, _ = plan(
            *longest,
            num_heads=width // HEAD_WIDTH,
            dropout_p=self._dropout_p,
            scale=HEAD_WIDTH**-0.5,
            absorb=self.execution.absorb,
            backend=self.execution.backend,
        )
        return form != "never"

    def _absorbed(self, x: Tensor, layout: Packed, context: Tensor, context_layout: Packed) -> Tensor:
        """The whole sub-layer, a call for each group."""
        queries = unpack_groups(x, layout, context_layout)
        contexts = unpack_groups(context, context_layout, layout)
        outputs = [
            self._cross_attention(tokens, keys, mask) if tokens.numel() else tokens
            for (tokens, _), (keys, mask) in zip(queries, contexts, strict=True)
        ]
        return repack(outputs, layout)

    def _cross_attention(self, x: Tensor, context: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        return ops.cross_attention(
            x,
            context,
            self.in_proj.weight,
            self.in_proj.bias,
            self.out_proj.weight,
            self.out_proj.bias,
            num_heads=x.shape[-1] // HEAD_WIDTH,
            key_padding_mask=key_padding_mask,
            dropout_p=self._dropout_p,
            absorb=self.execution.absorb,
            backend=self.execution.op_backend,
        )


class FeedForward(nn.Module):
    """Linear, activation, linear.

    Args:
        width: channels of the tokens.
        mlp_ratio: hidden channels / width.
        activation: "gelu" or "quick_gelu".
        execution: how it runs; shared with the network.
    """

    def __init__(
        self, width: int, mlp_ratio: int, activation: str = "gelu", execution: Execution | None = None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)
        self.approximate = ACTIVATIONS[activation]
        self.execution = execution or Execution()

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) to (..., W)."""
        backend = self.execution.op_backend
        return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias, self.approximate, backend))


def run_block(block: nn.Module, *inputs: Any, checkpoint: bool, **options: Any) -> Any:
    """Run a block.

    Args:
        block: the module.
        *inputs: its arguments.
        checkpoint: keep only the inputs for the backward pass, which runs the block again. Has no effect without
            gradients or where probabilities are recorded.
        **options: its keyword arguments.

    Returns:
        What the block returns.
    """
    if not (checkpoint and torch.is_grad_enabled()) or options.get("probabilities") is not None:
        return block(*inputs, **options)
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, **options)


class ResidualNorm(nn.LayerNorm):
    """LayerNorm of a residual stream and the update of its last branch: ``norm(stream + dropout(update))``.

    The sum and the norm are one op.

    Args:
        width: channels of the tokens.
        eps: added to the variance.
        dropout: dropout probability of the update.
        execution: how it runs; shared with the network.
    """

    def __init__(self, width: int, eps: float = 1e-5, dropout: float = 0.0, execution: Execution | None = None) -> None:
        super().__init__(width, eps=eps)
        self.dropout = dropout
        self.execution = execution or Execution()

    def forward(self, stream: Tensor, update: Tensor | None = None) -> Tensor:
        """Normalise the sum.

        Args:
            stream: (..., W).
            update: like stream; None adds nothing.

        Returns:
            Like stream.
        """
        if update is None:
            return super().forward(stream)
        return self._add(stream, update, return_sum=False)

    def with_sum(self, stream: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """As ``forward``; also returns the sum, which is the stream after this branch."""
        if update is None:
            return super().forward(stream), stream
        return self._add(stream, update, return_sum=True)

    def _add(self, stream: Tensor, update: Tensor, *, return_sum: bool) -> Any:
        return ops.dropout_add_layer_norm(
            update,
            stream,
            self.weight,
            self.bias,
            dropout_p=self.dropout if self.training else 0.0,
            eps=self.eps,
            return_sum=return_sum,
            backend=self.execution.op_backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


class PreNormBlock(nn.Module):
    """CLIP's residual block: x + f(norm(x)), without dropout.

    The update of the last branch is returned beside the stream: the next norm, which belongs to another block, adds the
    two in the same op.

    Args:
        width: channels of the tokens.
        mlp_ratio: hidden channels of the feed-forward / width.
        activation: "gelu" or "quick_gelu".
        execution: how it runs; shared with the network.
    """

    def __init__(self, width: int, mlp_ratio: int, activation: str, execution: Execution | None = None) -> None:
        super().__init__()
        execution = execution or Execution()
        self.attention_norm = ResidualNorm(width, execution=execution)
        self.attention = Attention(width, execution=execution)
        self.mlp_norm = ResidualNorm(width, execution=execution)
        self.mlp = FeedForward(width, mlp_ratio, activation, execution)

    def forward(
        self, stream: Tensor, update: Tensor | None, layout: Layout, probabilities: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the block on ``stream + update``.

        Args:
            stream: tokens in ``layout``.
            update: like stream; None adds nothing.
            layout: of both.
            probabilities: see above.

        Returns:
            The stream and the update of the feed-forward, for the next block, each like stream.
        """
        normal, stream = self.attention_norm.with_sum(stream, update)
        update = self.attention(normal, layout, probabilities=probabilities)
        normal, stream = self.mlp_norm.with_sum(stream, update)
        return stream, self.mlp(normal)


class PostNormBlock(nn.Module):
    """BERT's block: norm(x + dropout(f(x))), with cross-attention between self-attention and feed-forward on request.

    Args:
        width: channels of the tokens.
        mlp_ratio: hidden channels of the feed-forward / width.
        dropout: dropout probability, of attention probabilities and of every branch.
        eps: of the norms.
        cross: whether the block has cross-attention.
        execution: how it runs; shared with the network.
    """

    def __init__(
        self,
        width: int,
        mlp_ratio: int,
        dropout: float,
        eps: float,
        *,
        cross: bool = False,
        execution: Execution | None = None,
    ) -> None:
        super().__init__()
        execution = execution or Execution()
        self.attention = Attention(width, dropout, execution)
        self.attention_norm = ResidualNorm(width, eps, dropout, execution)
        if cross:
            self.cross_attention = Attention(width, dropout, execution)
            self.cross_attention_norm = ResidualNorm(width, eps, dropout, execution)
        self.mlp = FeedForward(width, mlp_ratio, execution=execution)
        self.mlp_norm = ResidualNorm(width, eps, dropout, execution)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        context: Tensor | None = None,
        context_layout: Layout | None = None,
        *,
        rows: Rows | None = None,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: tokens in ``layout``.
            layout: of x.
            context: the tokens that cross-attention attends to; given exactly when the block has ``cross``.
            context_layout: of context.
            rows: the tokens of x whose output is computed; None = all. Self-attention attends to all of x either way.
            probabilities: see above.

        Returns:
            Like x, or the outputs of ``rows``.
        """
        if rows is None:
            update = self.attention(x, layout, probabilities=probabilities)
        else:
            queries = rows.take(x)
            update = self.attention(queries, rows.layout, x, layout, probabilities=probabilities)
            x, layout = queries, rows.layout
        x = self.attention_norm(x, update)
        if context is not None:
            update = self.cross_attention(x, layout, context, context_layout, probabilities=probabilities)
            x = self.cross_attention_norm(x, update)
        return self.mlp_norm(x, self.mlp(x))
