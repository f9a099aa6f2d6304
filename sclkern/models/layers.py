"""Building blocks of the three encoders: norms, feed-forward, blocks.

``layout`` says how the tokens lie (``sclkern.models.layouts``): (B, L, W) or packed (T, W), W the width. A list
``probabilities`` receives those of every attention, see ``Attention.forward``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from sclkern import ops
from sclkern.models.attention import Attention
from sclkern.models.casting import weights_cast_once
from sclkern.models.execution import Execution
from sclkern.models.layouts import DropoutKeys, Layout, Rows, Section
from sclkern.models.norms import LayerNorm
from sclkern.nn.linear_gelu import linear_gelu
from sclkern.ops.dispatch import autocast
from sclkern.random import seeds_again

ACTIVATIONS: dict[str, Literal["none", "quick"]] = {"quick_gelu": "quick", "gelu": "none"}


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
    if not torch.compiler.is_compiling():
        options["context_fn"] = seeds_again
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, **options)


class Stream(NamedTuple):
    """Tokens of a post-norm stream, which autocast leaves in float32.

    Attributes:
        tokens: what the next branch is added to.
        read: the same in the dtype in which matrix products read them.
    """

    tokens: Tensor
    read: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> Stream:
        """Tokens that no block has made."""
        return cls(tokens, autocast(tokens))

    def take(self, part: Rows | Section) -> Stream:
        """Some of the tokens."""
        tokens = part.take(self.tokens)
        return Stream(tokens, tokens if self.read is self.tokens else part.take(self.read))


def dropped_sum(
    x: Tensor, residual: Tensor, dropout_p: float, backend: str, *, seed: Tensor, dropout_ids: Tensor
) -> Tensor:
    """``residual + dropout(x)`` by the keys of dropout, where no norm of ours follows.

    Args:
        x: (..., W).
        residual: like x.
        dropout_p: dropout probability.
        backend: of the op.
        seed: (1,) int64.
        dropout_ids: (...) int64, of the rows.

    Returns:
        Like x.
    """
    # The op writes a norm beside the sum, which nothing reads; it draws the mask in the same launch.
    unit = x.new_ones(x.shape[-1])
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "dropout_ids": dropout_ids, "return_sum": True}
    _, total = ops.dropout_add_layer_norm(x, residual, unit, unit, **options, backend=backend)
    return cast(Tensor, total)


class ResidualNorm(LayerNorm):
    """LayerNorm of a residual stream and the update of its last branch: ``norm(stream + dropout(update))``.

    The sum and the norm are one op, unless the norm is torch's or apex's.

    Args:
        width: channels of the tokens.
        eps: added to the variance.
        dropout: dropout probability of the update.
        execution: how it runs; shared with the network.
    """

    def __init__(self, width: int, eps: float = 1e-5, dropout: float = 0.0, execution: Execution | None = None) -> None:
        super().__init__(width, eps, execution)
        self.dropout = dropout
        self.dropout_number = 0

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

    def with_copy(self, stream: Tensor, update: Tensor, keys: DropoutKeys | None = None) -> Stream:
        """As ``forward``; also returns the norm in the dtype of the update, which is that of matrix products.

        Args:
            stream: (..., W).
            update: like stream.
            keys: of dropout, with an id for each row; None draws by the index of the row.

        Returns:
            Both.
        """
        if self.execution.layer_norm != "sclkern":
            return Stream.of(self._add(stream, update, keys, return_sum=False))
        return Stream(*self._add(stream, update, keys, return_copy=True))

    def _add(self, stream: Tensor, update: Tensor, keys: DropoutKeys | None = None, **returned: Any) -> Any:
        dropout_p = self.dropout if self.training else 0.0
        keyed: dict[str, Any] = {}
        if keys is not None and dropout_p > 0:
            keyed = {"seed": keys.seeds[self.dropout_number], "dropout_ids": keys.tokens}
        if self.execution.layer_norm != "sclkern":
            if keyed:
                total = dropped_sum(update, stream, dropout_p, self.execution.op_backend, **keyed)
            else:
                total = stream + F.dropout(update, dropout_p)
            return (super().forward(total), total) if returned["return_sum"] else super().forward(total)
        return ops.dropout_add_layer_norm(
            update,
            stream,
            self.weight,
            self.bias,
            dropout_p=dropout_p,
            eps=self.eps,
            **keyed,
            **returned,
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

    @weights_cast_once
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

    @weights_cast_once
    def attend(
        self, x: Stream, layout: Layout, rows: Rows | None = None, probabilities: list[Tensor] | None = None
    ) -> Stream:
        """Run self-attention, the first sub-layer, which reads no context.

        Args:
            x: as in ``forward``.
            layout: as in ``forward``.
            rows: as in ``forward``.
            probabilities: as in ``forward``.

        Returns:
            As ``forward``.
        """
        if rows is None:
            update = self.attention(x.read, layout, probabilities=probabilities)
        else:
            queries = x.take(rows)
            update = self.attention(queries.read, rows.layout, x.read, layout, probabilities=probabilities)
            x, layout = queries, rows.layout
        return self.attention_norm.with_copy(x.tokens, update, layout.keys)

    @weights_cast_once
    def forward(
        self,
        x: Stream,
        layout: Layout,
        context: Tensor | None = None,
        context_layout: Layout | None = None,
        *,
        rows: Rows | None = None,
        attended: Stream | None = None,
        probabilities: list[Tensor] | None = None,
    ) -> Stream:
        """Run the block.

        Args:
            x: tokens in ``layout``.
            layout: of x.
            context: the tokens that cross-attention attends to; given exactly when the block has ``cross``.
            context_layout: of context.
            rows: the tokens of x whose output is computed; None = all. Self-attention attends to all of x either way.
            attended: of ``attend`` without ``rows``, where the caller has it already; None computes it.
            probabilities: see above.

        Returns:
            Like x, or the outputs of ``rows``.
        """
        if attended is None:
            x = self.attend(x, layout, rows, probabilities)
        else:
            x = attended if rows is None else attended.take(rows)
        layout = layout if rows is None else rows.layout
        if context is not None:
            update = self.cross_attention(x.read, layout, context, context_layout, probabilities=probabilities)
            x = self.cross_attention_norm.with_copy(x.tokens, update, layout.keys)
        return self.mlp_norm.with_copy(x.tokens, self.mlp(x.read), layout.keys)
