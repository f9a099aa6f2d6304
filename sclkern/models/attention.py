"""Multi-head attention on padded and on packed tokens."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops, reference
from sclkern.libraries import flash
from sclkern.models.config import HEAD_DIM
from sclkern.models.execution import Absorb, Execution
from sclkern.models.layouts import Layout, Packed, Padded, merge_groups, repack, unpack_groups
from sclkern.ops.attention import neighbours
from sclkern.ops.cross_attention import plan_form
from sclkern.ops.dispatch import autocast_all, autocast_like
from sclkern.reference.attention import attention_dropout

log = logging.getLogger("sclkern.models")
_reported: set[torch.dtype] = set()


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
        self.dropout_number = 0
        self.execution = execution or Execution()

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _keyed(self, layout: Layout) -> dict[str, Tensor]:
        """What dropout draws by, where the layout of the queries says so."""
        return {} if layout.keys is None else layout.keys.of(self.dropout_number, self._dropout_p)

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
            probabilities: receives the (B, H, Lq, Lk) probabilities before dropout, with their graph. Attention then
                takes the eager path, and tokens must be padded.

        Returns:
            Like x.

        Raises:
            ValueError: a context without its layout, or probabilities of packed tokens.
        """
        width = x.shape[-1]
        if context is None:
            query, key, value = split(self.in_proj(x), 3)
            context_layout = layout
        elif context_layout is None:
            raise ValueError("context_layout: got None for a context, expected its Padded or Packed")
        elif (
            probabilities is None
            and isinstance(layout, Packed)
            and isinstance(context_layout, Packed)
            and self._absorbs(x, layout, context_layout)
        ):
            return self._absorbed(x, layout, context, context_layout)
        else:
            # One split, whose gradient is one tensor: two slices would each fill another of the whole.
            query_weight, context_weight = self.in_proj.weight.split((width, 2 * width))
            query_bias, context_bias = self.in_proj.bias.split((width, 2 * width))
            query = F.linear(x, query_weight, query_bias)
            query = query.unflatten(-1, (-1, HEAD_DIM))
            key, value = split(F.linear(context, context_weight, context_bias), 2)
        dropout: dict[str, Any] = {"dropout_p": self._dropout_p, **self._keyed(layout)}
        if probabilities is None:
            out = attend(query, key, value, layout, context_layout, **dropout, backend=self.execution.backend)
        elif isinstance(context_layout, Padded):
            out = attend_and_record(query, key, value, context_layout, probabilities, **dropout)
        else:
            raise ValueError("probabilities: attention of packed tokens cannot record them, expected padded tokens")
        return self.out_proj(out.flatten(-2))

    def _absorbs(self, x: Tensor, layout: Packed, context_layout: Packed) -> bool:
        """Whether cross-attention folds projections into its shorter side.

        If it does, each group of sequences is a call on padded tokens; otherwise all groups are one packed call.
        """
        execution = self.execution
        options: dict[str, Any] = {
            "dropout_p": self._dropout_p,
            "absorb": execution.absorb,
            "backend": execution.backend,
        }
        return absorbed_form(layout.max_seqlen, context_layout.max_seqlen, x, **options) != "never"

    def _absorbed(self, x: Tensor, layout: Packed, context: Tensor, context_layout: Packed) -> Tensor:
        """The whole sub-layer, a call for each group."""
        layout, context_layout = merge_groups(layout, context_layout)
        queries = unpack_groups(x, layout, context_layout)
        contexts = unpack_groups(context, context_layout, layout)
        keyed = [self._keyed(layout)] * len(queries)
        if keyed[0]:
            ids = keyed[0]["dropout_ids"].split([len(tokens) for tokens, _ in queries])
            keyed = [{**options, "dropout_ids": part} for options, part in zip(keyed, ids, strict=True)]
        outputs = [
            self._cross_attention(tokens, keys, mask, **options) if tokens.shape[1] else tokens
            for (tokens, _), (keys, mask), options in zip(queries, contexts, keyed, strict=True)
        ]
        return repack(outputs, layout)

    def _cross_attention(self, x: Tensor, context: Tensor, key_padding_mask: Tensor | None, **keyed: Any) -> Tensor:
        return ops.cross_attention(
            x,
            context,
            self.in_proj.weight,
            self.in_proj.bias,
            self.out_proj.weight,
            self.out_proj.bias,
            num_heads=x.shape[-1] // HEAD_DIM,
            key_padding_mask=key_padding_mask,
            dropout_p=self._dropout_p,
            **keyed,
            backend=self.execution.op_backend,
        )


def absorbed_form(
    num_queries: int, num_keys: int, x: Tensor, *, dropout_p: float, absorb: Absorb = "auto", backend: str = "auto"
) -> str:
    """The form of ``ops.cross_attention`` that cross-attention on packed tokens takes.

    Args:
        num_queries: of the longest sequence.
        num_keys: of the longest sequence.
        x: (..., W), of the dtype and device of the tokens; its other sizes are not read.
        dropout_p: dropout probability.
        absorb: as in ``Execution``.
        backend: one of ``execution.MODEL_BACKENDS``.

    Returns:
        "keys", "queries", or "never", where all sequences are one packed call.
    """
    if absorb == "never" or backend in ("sdpa", "flash"):
        return "never"
    width = x.shape[-1]
    options: dict[str, Any] = {"dropout_p": dropout_p, "softmax_scale": HEAD_DIM**-0.5, "backend": backend}
    planned = plan_form(num_queries, num_keys, width, width // HEAD_DIM, x, **options)
    if planned.form == "queries" and planned.choice.path.startswith("triton") and absorb != "all" and dropout_p > 0:
        return "never"
    return planned.form


class _Split(torch.autograd.Function):
    """``x.unflatten(-1, (parts, -1, HEAD_DIM)).unbind(-3)``, whose backward copies nothing where the gradients lie as
    the parts do: so attention writes them."""

    # With the context, because torch takes the signature of a forward without one in every call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.parts = parts
        return x.unflatten(-1, (parts, -1, HEAD_DIM)).unbind(-3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled() and neighbours(*grads):
            first, size = grads[0], grads[0].shape[-2] * HEAD_DIM * ctx.parts
            return first.as_strided((*first.shape[:-2], size), (*first.stride()[:-2], 1)), None
        return torch.stack(grads, -3).flatten(-3), None


def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split projected tokens into the heads of query, key and value.

    Args:
        x: (..., parts * H * D), what one product projected.
        parts: 3, or 2 for key and value.

    Returns:
        (..., H, D) views for each part.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x.unflatten(-1, (parts, -1, HEAD_DIM)).unbind(-3)
    found: tuple[Tensor, ...] = _Split.apply(x, parts)
    return found


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_layout: Layout,
    key_layout: Layout,
    *,
    dropout_p: float,
    backend: str,
    seed: Tensor | None = None,
    dropout_ids: Tensor | None = None,
) -> Tensor:
    """Attention of the tokens of one layout to those of another, both padded or both packed.

    Args:
        query: (B, Lq, H, D) or (Tq, H, D).
        key: (B, Lk, H, D) or (Tk, H, D).
        value: like key.
        query_layout: of query.
        key_layout: of key and value; the same object as ``query_layout`` for self-attention.
        dropout_p: dropout probability.
        backend: one of ``execution.MODEL_BACKENDS``; "sdpa" is torch's own attention, for padded tokens; "flash" is
            flash-attn, and "auto" for tensors of a dtype that it does not compute. With a seed "sdpa" is "eager", and
            "flash" draws a mask of its own.
        seed: (1,) int64, of the dropout mask; None draws one from torch's generator.
        dropout_ids: (S,) int64, of the sequences; see ``ops.attention``.

    Returns:
        Like query.

    Raises:
        TypeError: one layout is padded, the other packed.
        ValueError: the backend cannot run on these tensors; see the ops.
    """
    if backend == "flash":
        backend = _flash_or_auto(query, dropout_p)
    framed = key_layout.num_frames > 1 and query_layout is key_layout
    if backend == "sdpa" and seed is not None:
        # torch's own attention draws no mask that depends on ids.
        backend = "eager"
    op_backend = "eager" if backend == "sdpa" else backend
    keyed: dict[str, Any] = {} if backend == "flash" else {"seed": seed, "dropout_ids": dropout_ids}
    if isinstance(query_layout, Packed) and isinstance(key_layout, Packed):
        if framed:
            return _framed(query, key, value, key_layout, op_backend)
        empty = 0 in (query_layout.max_seqlen, key_layout.max_seqlen, len(query_layout.cu_seqlens) - 1)
        if backend == "flash" and not empty:
            return _flash_packed(query, key, value, query_layout, key_layout, dropout_p)
        return ops.packed_attention(
            query,
            key,
            value,
            query_layout.cu_seqlens,
            key_layout.cu_seqlens,
            query_layout.max_seqlen,
            key_layout.max_seqlen,
            dropout_p=dropout_p,
            **keyed,
            backend=op_backend,
        )
    if not isinstance(key_layout, Padded):
        raise TypeError(
            f"key_layout: got {type(key_layout).__name__} for a query_layout {type(query_layout).__name__}, expected "
            "both Padded or both Packed"
        )
    if framed:
        return ops.frame_attention(query, key, value, key_layout.num_frames, backend=op_backend)
    mask = key_layout.mask
    if backend == "sdpa":
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        attn_mask = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p).transpose(1, 2)
    options: dict[str, Any] = {"key_padding_mask": mask, "dropout_p": dropout_p, **keyed}
    return cast(Tensor, ops.attention(query, key, value, **options, backend=backend))


def _flash_or_auto(query: Tensor, dropout_p: float) -> str:
    """The backend in place of "flash": a run has it for its steps, and computes retrieval in float32 beside them."""
    dtype = autocast_like(query)[0].dtype
    flash.require(query.device, None, query.shape[-1], dropout_p)
    if dtype in flash.DTYPES:
        return "flash"
    if dtype not in _reported and not torch.compiler.is_compiling():
        _reported.add(dtype)
        log.warning("attention of %s tensors takes the backend auto: flash-attn computes float16 and bfloat16", dtype)
    return "auto"


def _flash_packed(
    query: Tensor, key: Tensor, value: Tensor, query_layout: Packed, key_layout: Packed, dropout_p: float
) -> Tensor:
    """``ops.packed_attention`` by flash-attn, which need not fill what the host knows to be empty."""
    lengths = query_layout.cu_seqlens, key_layout.cu_seqlens, query_layout.max_seqlen, key_layout.max_seqlen
    query_tail, key_tail = not query_layout.fills(query.shape[0]), not key_layout.fills(key.shape[0])
    query, key, value = autocast_all(query, key, value)
    scale = HEAD_DIM**-0.5
    return flash.packed_attention(
        query, key, value, *lengths, dropout_p, scale, query_tail=query_tail, key_tail=key_tail
    )


def _framed(query: Tensor, key: Tensor, value: Tensor, layout: Packed, backend: str) -> Tensor:
    """``ops.frame_attention`` of packed sequences, a call for each group."""
    layout, _ = merge_groups(layout, layout)
    sizes = [sequences * length for sequences, length in layout.groups]
    outputs = []
    for group, q, k, v in zip(layout.groups, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        padded = ops.frame_attention(
            q.unflatten(0, group), k.unflatten(0, group), v.unflatten(0, group), layout.num_frames, backend=backend
        )
        outputs.append(padded.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_and_record(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_layout: Padded,
    probabilities: list[Tensor],
    *,
    dropout_p: float,
    seed: Tensor | None = None,
    dropout_ids: Tensor | None = None,
) -> Tensor:
    """Attention by the eager definition, which records its probabilities.

    Args:
        query: (B, Lq, H, D).
        key: (B, Lk, H, D).
        value: like key.
        key_layout: of key and value.
        probabilities: receives the (B, H, Lq, Lk) probabilities before dropout, with their graph.
        dropout_p: dropout probability.
        seed: as in ``attend``.
        dropout_ids: as in ``attend``.

    Returns:
        Like query.
    """
    mask = None if key_layout.mask is None else key_layout.mask[:, None, None, :]
    if key_layout.num_frames > 1:
        frame_length = key.shape[1] // key_layout.num_frames
        mask = reference.frame_attention_mask(key_layout.num_frames, frame_length, key.device)
    p = reference.attention_probabilities(query, key, mask=mask)
    probabilities.append(p)
    p_dropped = attention_dropout(p, dropout_p, seed, dropout_ids)
    return torch.einsum("bhqk,bkhd->bqhd", p_dropped, value)
