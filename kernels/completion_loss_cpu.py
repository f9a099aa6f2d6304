"""``completion_loss`` on a CPU without the kernels: row blocks of similarities, with explicit gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities of a tile.
TILE = 2**22
# As in the kernels: far below any similarity, yet sums of it stay finite.
_EXCLUDED = -1e30
# Cosines over a temperature of at least 1/40 have exponentials, and sums and inverses of them, that are normal numbers
# of float32: no maximum need be taken off, and both directions share one exponential.
_PLAIN_EXPONENTIALS = 40.0


@torch.autocast("cpu", enabled=False)
def forward(
    recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, same: Tensor | None, both: bool,
    learnable: bool, eps: float, offset: int, rows: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op ``sclkern::completion_loss`` (see its launcher), in float32 or the wider dtype of the temperature."""
    shape, precise = recovered.shape[:2], temperature.dtype
    window = slice(offset, offset + rows)
    rnorm, positive = torch.empty((2, *shape), dtype=precise), torch.empty(shape, dtype=precise)
    for side, features in zip(rnorm, (recovered, complete), strict=True):
        torch.linalg.vector_norm(features, dim=-1, dtype=precise, out=side).clamp_(min=eps).reciprocal_()
    if valid is not None:
        rnorm.masked_fill_(~valid, 0.0)
    lse = torch.full((2 if both else 1, shape[0], rows), _EXCLUDED, dtype=precise)
    # Relative to the maximum so far, which for columns rises from one row block to the next.
    total, spread = torch.zeros_like(lse), torch.zeros_like(lse)
    sides = (recovered, complete)
    for group in range(shape[0]):
        x, y = (_normalised(f, valid, group, r) for f, r in zip(sides, rnorm, strict=True))
        positive[group] = (x * y).sum(-1) / temperature
    plain = _plain(temperature)
    if plain:
        lse.zero_()
    for first, dims in _passes(len(lse), shape[1], rows):
        for group, block, _, _, similarity in _tiles(sides, temperature, valid, same, rnorm, first, window):
            exponentials = similarity.exp() if plain else None
            for dim in dims:
                reduced = slice(block.start - offset, block.stop - offset) if dim else slice(None)
                direction = first if dim else 1 - first
                highest, sums, spreads = (t[direction, group, reduced] for t in (lse, total, spread))
                if exponentials is not None:
                    weight = exponentials
                else:
                    raised = torch.maximum(highest, similarity.amax(dim))
                    shrink, weight = torch.exp(highest - raised), torch.exp(similarity - raised.unsqueeze(dim))
                    highest.copy_(raised)
                    sums.mul_(shrink)
                    spreads.mul_(shrink)
                sums += weight.sum(dim)
                if learnable:
                    anchor = positive[group, block if dim else window].unsqueeze(dim)
                    spreads += (weight * (similarity - anchor)).sum(dim)
    # Of a row without negatives the logarithm is infinite.
    lse += total.log().clamp_min_(_EXCLUDED)
    losses = F.softplus(lse - positive[:, window]).sum(0)
    spread = spread / total.clamp_min_(torch.finfo(precise).tiny) if learnable else spread[:0].clone()
    return losses, positive, lse, spread, rnorm


@torch.autocast("cpu", enabled=False)
def backward(
    recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, same: Tensor | None,
    weight: Tensor, lse: Tensor, rnorm: Tensor, eps: float, offset: int, rows: int, *needed: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients (G, rows, D) of the window of both sides, empty where not needed; weight and lse (directions, G, N)
    as in the kernels."""
    groups, length, width = recovered.shape
    window, features = slice(offset, offset + rows), (recovered, complete)
    gradients = [torch.zeros((groups, rows, width) if need else 0, dtype=rnorm.dtype) for need in needed]
    plain = _plain(temperature)
    for first, dims in _passes(2, length, rows):
        targets = [(dim, first if dim else 1 - first) for dim in dims]
        targets = [(dim, target) for dim, target in targets if needed[target]]
        if not targets:
            continue
        for group, block, x, y, similarity in _tiles(features, temperature, valid, same, rnorm, first, window):
            at = [(d, group, block, None) if d == first else (d, group) for d in range(len(lse))]
            shares = [(lse[index], weight[index]) for index in at]
            if plain:
                # A row without negatives, of lowest log-sum-exp, has weight 0.
                factors = [w * torch.exp(-s.clamp_min(-2 * _PLAIN_EXPONENTIALS)) for s, w in shares]
                gradient = similarity.exp_().mul_(sum(factors))
            else:
                gradient = functools.reduce(torch.add, [torch.exp(similarity - s) * w for s, w in shares])
            gradient.diagonal(block.start).copy_(-weight[:, group, block].sum(0))
            for dim, target in targets:
                if dim:
                    gradients[target][group, block.start - offset : block.stop - offset] = gradient @ y
                else:
                    gradients[target][group] += gradient.T @ x[block]
    for side, push in enumerate(gradients):
        if not needed[side]:
            continue
        scale = rnorm[side, :, window]
        for group in range(groups):
            x = _normalised(features[side], valid, group, rnorm[side], window)
            # A norm below eps was replaced by eps, a constant: nothing to project away.
            clamped = (scale[group] >= torch.tensor(eps, dtype=scale.dtype).reciprocal())[:, None]
            push[group] -= ((push[group] * x).sum(-1, keepdim=True) * x).masked_fill_(clamped, 0.0)
        push *= (scale / temperature)[..., None]
        if valid is not None:
            push.masked_fill_(~valid[:, window, None], 0.0)
    return [g.to(f.dtype) for g, f in zip(gradients, features, strict=True)]


def _passes(directions: int, length: int, rows: int) -> list[tuple[int, tuple[int, ...]]]:
    """The side that each pass takes row blocks of, and the dimensions of a tile that it reduces. Where the window is
    everything, one pass serves both directions."""
    whole: list[tuple[int, tuple[int, ...]]] = [(0, (1, 0)[:directions])]
    window: list[tuple[int, tuple[int, ...]]] = [(0, (1,)), (1, (1,))]
    return whole if rows == length else window[:directions]


def _tiles(
    features: tuple[Tensor, Tensor], temperature: Tensor, valid: Tensor | None, same: Tensor | None, rnorm: Tensor,
    first: int, window: slice,
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Row blocks of the window, group by group: group, rows, both sides normalised, and the similarities, of which the
    diagonal, invalid rows and pairs of one id are excluded."""
    groups, length, _ = features[0].shape
    step = max(1, min(1024, TILE // max(length, 1)))
    inverse = temperature.reciprocal().item()
    for group in range(groups):
        x, y = (_normalised(features[side], valid, group, rnorm[side]) for side in (first, 1 - first))
        for start in range(window.start, window.stop, step):
            rows = slice(start, min(start + step, window.stop))
            # What is added times 0 is not read.
            similarity = torch.addmm(x.new_empty(()), x[rows], y.T, beta=0, alpha=inverse)
            similarity.diagonal(start).fill_(_EXCLUDED)
            if valid is not None:
                similarity.masked_fill_(~(valid[group, rows, None] & valid[group]), _EXCLUDED)
            if same is not None:
                similarity.masked_fill_(same[rows, None] == same, _EXCLUDED)
            yield group, rows, x, y, similarity


def _plain(temperature: Tensor) -> bool:
    return temperature.item() * _PLAIN_EXPONENTIALS >= 1


def _normalised(features: Tensor, valid: Tensor | None, group: int, rnorm: Tensor, rows: slice = slice(None)) -> Tensor:
    features = features[group, rows].to(rnorm.dtype)
    if valid is not None:
        features = features.masked_fill(~valid[group, rows, None], 0.0)
    return features * rnorm[group, rows, None]
