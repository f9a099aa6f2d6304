"""The eager definition of every op in plain PyTorch: the only statement of what is right.

It runs in any floating dtype (float64 for the truth of a test), supports double backward, and is the CPU path.

Dimensions: B batch, L length (Lq of queries, Lk of keys), H heads, D channels of a head or width of a feature,
F frames, P patches of a frame, K kept patches, N rows of a contrast, G groups of rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.random import below, philox, random_words, smallest, uniform

# Streams of the counter generator: one for each purpose, so that no two draws of a step share numbers.
STREAM_PATCHES, STREAM_TOKENS, STREAM_MLM, STREAM_COMPLETION, STREAM_ITM = range(5)

STREAM_ATTENTION = 6


def attention_probabilities(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, softmax_scale: float | None = None
) -> Tensor:
    """Softmax of scaled scores.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D).
        mask: bool, broadcastable to (B, H, Lq, Lk); True = attend. A query with no valid key gets zeros.
        softmax_scale: default 1 / sqrt(D).

    Returns:
        (B, H, Lq, Lk) in the dtype of ``query``.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query * scale, key)
    if mask is None:
        return scores.softmax(-1)
    # A finite fill: a row without a valid key then has finite gradients, and is zeroed afterwards.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~mask, 0.0)


def attention_log_sum_exp(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, softmax_scale: float | None = None
) -> Tensor:
    """Natural log-sum-exp of the scores of ``attention_probabilities``, without a gradient.

    Returns:
        (B, H, Lq) float32, float64 for float64; -inf for a query with no valid key.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", query.to(dtype) * scale, key.to(dtype))
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).logsumexp(-1)


def attention_dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """What a 16-bit draw must reach to keep its probability, and the factor of those kept.

    The probability of dropping is rounded to a multiple of 1 / 65536, and the factor is that of the rounded one.
    """
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def attention_dropout_mask(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    dropout_p: float,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which probabilities dropout keeps; each depends on (seed, b * H + h, query, key) alone, not on a length.

    One call of Philox with 7 rounds serves eight neighbouring keys by the 16-bit halves of its four words, the low half
    first.

    Args:
        queries: at most 65536. keys: at most 524288; the counter has no room for more.

    Returns:
        (B, H, Lq, Lk) bool, True = keep.
    """
    if queries > 2**16 or keys > 2**19:
        raise ValueError(f"dropout: got {queries} queries and {keys} keys, expected at most 65536 and 524288")
    places = [torch.arange(size, device=device) for size in (batch * heads, queries, (keys + 7) // 8)]
    counter = (places[0][:, None, None] << 32) | (places[1][:, None] << 16) | places[2]
    words = torch.stack(philox(seed, counter, STREAM_ATTENTION, rounds=7), -1)
    draws = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(2)[..., :keys]
    return (draws >= attention_dropout_threshold(dropout_p)[0]).view(batch, heads, queries, keys)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with key padding and dropout on the probabilities.

    Args:
        query: (B, Lq, H, D). key, value: (B, Lk, H, D).
        key_padding_mask: (B, Lk) bool, True = attend. What the other keys and values hold is never read, NaN too.
        dropout_p: probability of dropping a probability.
        seed: of the mask of ``attention_dropout_mask``; None is torch's own dropout.

    Returns:
        (B, Lq, H, D).
    """
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None, None, :]
        # A probability of zero is not enough: 0 * NaN is NaN, forward and backward.
        padding = ~key_padding_mask[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    probabilities = attention_probabilities(query, key, mask=mask, softmax_scale=softmax_scale)
    if seed is None or dropout_p == 0:
        probabilities = F.dropout(probabilities, dropout_p)
    else:
        keep = attention_dropout_mask(*probabilities.shape, dropout_p=dropout_p, seed=seed, device=query.device)
        probabilities = probabilities.masked_fill(~keep, 0.0) * attention_dropout_threshold(dropout_p)[1]
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value)


def frame_attention_mask(num_frames: int, tokens_per_frame: int, device: torch.device | str) -> Tensor:
    """Who attends to whom in ``frame_attention``: (F * (1 + P), F * (1 + P)) bool, True = attend."""
    frame = torch.arange(num_frames, device=device).repeat_interleave(tokens_per_frame)
    is_cls = torch.arange(num_frames * tokens_per_frame, device=device) % tokens_per_frame == 0
    return (frame[:, None] == frame[None, :]) | is_cls[:, None]


def frame_attention(
    query: Tensor, key: Tensor, value: Tensor, num_frames: int, *, softmax_scale: float | None = None
) -> Tensor:
    """Attention of the flexible vision encoder: a frame's CLS attends to every token of every frame, a patch only to
    the tokens of its own frame. With one frame it is plain attention (reference: clip_model_video.py:47-63).

    Args:
        query, key, value: (B, F * (1 + P), H, D), frame by frame, CLS first in each frame.
        num_frames: F.

    Returns:
        (B, F * (1 + P), H, D).
    """
    if num_frames == 1:
        return attention(query, key, value, softmax_scale=softmax_scale)
    batch, length, heads, width = query.shape
    framed = [x.reshape(batch * num_frames, -1, heads, width) for x in (query, key, value)]
    patches = attention(framed[0][:, 1:], framed[1], framed[2], softmax_scale=softmax_scale)
    cls = attention(query[:, :: length // num_frames], key, value, softmax_scale=softmax_scale)
    out = torch.cat([cls.reshape(batch * num_frames, 1, heads, width), patches], dim=1)
    return out.reshape(batch, length, heads, width)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: Literal["none", "tanh", "quick"] = "none") -> Tensor:
    """GELU of x (..., D) + bias (D,) in the dtype of x: exact, by tanh, or x * sigmoid(1.702 x), CLIP's."""
    x = x + bias.to(x.dtype)
    return x * torch.sigmoid(1.702 * x) if approximate == "quick" else F.gelu(x, approximate=approximate)


# The stream of dropout on features, apart from the draws of a step above.
STREAM_FEATURES = 16


def feature_dropout_seed(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """An int64 tensor of one element on ``device``: the seed, or one drawn from torch's generator of that device."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    # Filled on the device, because a copy waits.
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def feature_dropout_threshold(dropout_p: float) -> int:
    """Of the 65536 values of a 16-bit number, how many drop an element."""
    return round(dropout_p * 2**16)


def feature_dropout_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def feature_dropout_keep(rows: int, columns: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Which elements dropout keeps: (rows, columns) bool, a function of (seed, row, column) alone.

    One Philox-4x32 call of 7 rounds serves 8 neighbouring columns. Column c = 8 g + 2 w + h of row r takes the low
    (h = 0) or high (h = 1) 16 bits of word w of the counter r << 32 | g in stream ``STREAM_FEATURES``, and is kept
    where that number is at least ``feature_dropout_threshold(dropout_p)``.

    Args:
        seed: int64 tensor of one element; the mask is on its device.
    """
    row = torch.arange(rows, dtype=torch.int64, device=seed.device)
    group = torch.arange((columns + 7) // 8, dtype=torch.int64, device=seed.device)
    words = torch.stack(philox(seed.reshape(()), (row[:, None] << 32) | group, STREAM_FEATURES, rounds=7), dim=-1)
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
) -> Tensor:
    """LayerNorm of residual + dropout(x + x_bias) over the last dimension.

    Args:
        x, residual: (..., D). weight, bias, x_bias: (D,).
        dropout_p: probability of dropping an element; the mask is that of ``feature_dropout_keep``, whose rows are
            all leading dimensions as one. With 0 no random number is drawn.
        seed: int or int64 tensor of one element; None draws one from torch's generator.

    Returns:
        (..., D) in the wider dtype of x and residual.
    """
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if dropout_p > 0:
        seed = feature_dropout_seed(seed, x.device)
        keep = feature_dropout_keep(x.shape[:-1].numel(), x.shape[-1], dropout_p, seed).reshape(x.shape)
        x = torch.where(keep, x * feature_dropout_scale(dropout_p), 0.0)
    total = residual + x
    out = F.layer_norm(total, x.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)
    # Autocast widens a layer norm; the op's dtype is that of its tensors.
    return out.to(total.dtype)


def completion_loss(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float | Tensor,
    directions: Literal["both", "recovered_to_complete"] = "both",
    reduction: Literal["mean", "sum", "none"] = "mean",
    valid: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    r"""Cosine InfoNCE: each recovered feature must find its own complete feature among those of the batch.

    With s_ij = cos(r_i, c_j) / temperature:  L = mean_i [-log softmax_j(s_ij)]_(j=i), plus the same over columns when
    ``directions`` is "both" (summed, not averaged; reference: NormSoftmaxLoss of the published objectives.py).

    Each term is computed as softplus(logsumexp_(j != i) s_ij - s_ii): the gradient of a confident positive then comes
    from the sum over the other pairs and not from softmax - 1, which cancels.

    Args:
        recovered, complete: (N, D), or (G, N, D) for G separate contrasts whose losses are averaged.
        temperature: float or 0-d tensor (learnable).
        reduction: "mean" over the valid rows of a group and then over groups, "sum" over all, or
            "none": (N,) or (G, N).
        valid: (N,) or (G, N) bool; the other rows take no part, neither as anchors nor as negatives, whatever they
            hold.
        eps: smallest norm of a feature.

    Returns:
        Scalar, or the losses of the rows; 0 with zero gradient when no row is valid or a row has no negatives.
    """
    if valid is not None:
        # Not 0, whose norm has no second derivative.
        unused = ~valid[..., None]
        recovered, complete = recovered.masked_fill(unused, 1.0), complete.masked_fill(unused, 1.0)
    recovered = recovered / recovered.norm(dim=-1, keepdim=True).clamp_min(eps)
    complete = complete / complete.norm(dim=-1, keepdim=True).clamp_min(eps)
    # Autocast would round similarities of 33 (cosine 1 at temperature 0.03) to bfloat16's steps of 0.25.
    with torch.autocast(recovered.device.type, enabled=False):
        similarity = recovered @ complete.mT / temperature
    size = similarity.shape[-1]
    excluded = torch.eye(size, dtype=torch.bool, device=similarity.device)
    if valid is not None:
        excluded = excluded | ~(valid[..., :, None] & valid[..., None, :])
    positive = similarity.diagonal(dim1=-2, dim2=-1)
    # Half the lowest number: minus infinity would make the gradient of a row without negatives NaN.
    others = similarity.masked_fill(excluded, torch.finfo(similarity.dtype).min / 2)
    losses = F.softplus(others.logsumexp(-1) - positive)
    if directions == "both":
        losses = losses + F.softplus(others.logsumexp(-2) - positive)
    return reduce_rows(losses, valid, reduction)


def reduce_rows(losses: Tensor, valid: Tensor | None, reduction: Literal["mean", "sum", "none"]) -> Tensor:
    """Losses (N,) or (G, N) of rows, by the reductions of ``completion_loss``; rows that are not valid count as 0."""
    if valid is not None:
        losses = torch.where(valid, losses, 0.0)
    if reduction != "mean":
        return losses.sum() if reduction == "sum" else losses
    if valid is None:
        return losses.mean()
    return (losses.sum(-1) / valid.sum(-1).clamp_min(1)).mean()


def embed_patches(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    cls: Tensor,
    *,
    temporal: Tensor | None = None,
    keep: Tensor | None = None,
    replace: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """Patchify frames, embed only the kept patches, add positions, and put a CLS token before each frame.

    Args:
        images: (B, F, 3, S, S).
        weight: (D, 3, p, p), the convolution whose stride is its size.
        position: (1 + P, D), row 0 for the CLS. cls: (D,).
        temporal: (frames at most, D), added to every token of its frame, CLS included.
        keep: (B, K) int64, the same patches in every frame (a tube); the others are never embedded.
        replace: (B, P) bool, patches whose embedding is ``mask_token`` (D,), in every frame.

    Returns:
        (B, F * (1 + K), D), frame by frame.
    """
    batch, frames, channels, height, width = images.shape
    size = weight.shape[-1]
    patches = images.reshape(batch, frames, channels, height // size, size, width // size, size)
    patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, frames, -1, channels * size * size)
    positions = position[1:].expand(batch, 1, -1, -1)
    if keep is not None:
        index = keep[:, None, :, None]
        patches = patches.gather(2, index.expand(-1, frames, -1, patches.shape[-1]))
        positions = positions.gather(2, index.expand(-1, 1, -1, position.shape[-1]))
        replace = None if replace is None else replace.gather(1, keep)
    tokens = patches.to(weight.dtype) @ weight.flatten(1).T
    if replace is not None:
        tokens = torch.where(replace[:, None, :, None], mask_token.to(tokens.dtype), tokens)
    tokens = tokens + positions
    first = (cls + position[0]).expand(batch, frames, 1, -1)
    tokens = torch.cat([first, tokens], dim=2)
    if temporal is not None:
        tokens = tokens + temporal[:frames, None, :]
    return tokens.flatten(1, 2)


def select_patches(
    num_patches: int, keep_ratio: float, batch: int, *, seed: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the kept patches of each sample, uniformly without replacement.

    Returns:
        (B, K) int64, ascending, with K = int(num_patches * keep_ratio) and at least 1.
    """
    words = random_words((batch, num_patches), seed=seed, stream=STREAM_PATCHES, device=device)[0]
    count = max(1, int(num_patches * keep_ratio))
    return words.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def select_tokens(
    num_patches: int, ratio: float, batch: int, *, seed: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the patches whose embedding is replaced by the mask token: (B, P) bool, int(P * ratio) True in each row."""
    words = random_words((batch, num_patches), seed=seed, stream=STREAM_TOKENS, device=device)[0]
    return smallest(words, torch.ones_like(words, dtype=torch.bool), int(num_patches * ratio))


class MaskedText(NamedTuple):
    """Caption with masked positions.

    Attributes:
        ids: (B, L) int64, the tokens the model reads.
        selected: (B, L) bool, the positions to predict or complete.
    """

    ids: Tensor
    selected: Tensor


def mask_text(
    ids: Tensor,
    lengths: Tensor,
    *,
    kind: Literal["mlm", "completion"],
    ratio: float,
    mask_id: int,
    vocab_size: int,
    seed: int | Tensor,
    reference: bool = False,
) -> MaskedText:
    """Draw and apply a text mask. Only positions 1 to length - 2 (no ``<s>``, ``</s>``, padding) are ever selected.

    "mlm": max(1, round(ratio * n)) of the n words, distinct; 80 % become ``<mask>``, 10 % a random token, 10 % stay.
    "completion": int(n * ratio) + 1 of the n words, distinct, all become ``<mask>``.
    ``reference=True`` draws as the published code does: "mlm" picks round(ratio * L) of all L padded positions and
    forgets those that are not words, so a caption may get no target; "completion" draws with replacement.

    Args:
        ids: (B, L) int64. lengths: (B,) int64, tokens of each caption with ``<s>`` and ``</s>``.
    """
    rows, width = ids.shape
    words = (lengths - 2).clamp_min(0)[:, None]
    column = torch.arange(width, device=ids.device)
    is_word = (column >= 1) & (column <= words)
    stream = STREAM_MLM if kind == "mlm" else STREAM_COMPLETION
    key, action, token, _ = random_words((rows, width), seed=seed, stream=stream, device=ids.device)
    if kind == "completion":
        # The same float64 product and truncation as Python's int(n * ratio).
        count = (words.double() * ratio).long() + 1
        if reference:
            drawn = below(key, words) + 1
            selected = torch.zeros_like(is_word, dtype=torch.int64)
            selected.scatter_add_(1, drawn.clamp_max(width - 1), (column < count).long())
            selected = (selected > 0) & is_word
        else:
            selected = smallest(key, is_word, count)
        return MaskedText(torch.where(selected, mask_id, ids), selected)
    if reference:
        selected = smallest(key, torch.ones_like(is_word), max(1, round(width * ratio))) & is_word
    else:
        selected = smallest(key, is_word, (words.double() * ratio + 0.5).long().clamp_min(1))
    chance = uniform(action)
    replaced = torch.where(chance < 0.9, below(token, vocab_size), ids)
    replaced = torch.where(chance < 0.8, mask_id, replaced)
    return MaskedText(torch.where(selected, replaced, ids), selected)
