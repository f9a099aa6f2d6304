"""``completion_loss`` on a CPU without the kernels: row blocks of similarities, with explicit gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

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
    learnable: bool, normalize: bool, eps: float, offset: int, rows: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op ``sclkern::completion_loss`` (see its launcher), in float32 or the wider dtype of the temperature."""
    shape, precise = recovered.shape[:2], temperature.dtype
    window, sides, masks = slice(offset, offset + rows), (recovered, complete), _masks(valid, complete.shape[1])
    rnorms, positive = [torch.ones(x.shape[:2], dtype=precise) for x in sides], torch.empty(shape, dtype=precise)
    for rnorm, features, mask in zip(rnorms, sides, masks, strict=True):
        if normalize:
            torch.linalg.vector_norm(features, dim=-1, dtype=precise, out=rnorm).clamp_(min=eps).reciprocal_()
        if mask is not None:
            rnorm.masked_fill_(~mask, 0.0)
    lse = torch.full((2 if both else 1, shape[0], rows), _EXCLUDED, dtype=precise)
    # Relative to the maximum so far, which for columns rises from one row block to the next.
    total, spread = torch.zeros_like(lse), torch.zeros_like(lse)
    own = slice(shape[1])
    for group in range(shape[0]):
        x, y = (_normalised(f, m, group, r, own) for f, m, r in zip(sides, masks, rnorms, strict=True))
        positive[group] = (x * y).sum(-1) / temperature
    plain = normalize and _plain(temperature)
    if plain:
        lse.zero_()
    for first, dims in _passes(len(lse), shape[1], rows):
        for group, block, _, _, similarity in _tiles(sides, temperature, masks, same, rnorms, first, window):
            exponentials = similarity.exp() if plain else None
            for dim in dims:
                reduced = slice(block.start - offset, block.stop - offset) if dim else slice(None)
                direction = first if dim else 1 - first
                highest, sums, spreads = (t[direction, group, reduced] for t in (lse, total, spread))
                # Columns that belong to no row have no loss.
                anchored = similarity if dim else similarity[:, own]
                if exponentials is not None:
                    weight = exponentials if dim else exponentials[:, own]
                else:
                    raised = torch.maximum(highest, anchored.amax(dim))
                    shrink, weight = torch.exp(highest - raised), torch.exp(anchored - raised.unsqueeze(dim))
                    highest.copy_(raised)
                    sums.mul_(shrink)
                    spreads.mul_(shrink)
                sums += weight.sum(dim)
                if learnable:
                    anchor = positive[group, block if dim else window].unsqueeze(dim)
                    spreads += (weight * (anchored - anchor)).sum(dim)
    # Of a row without negatives the logarithm is infinite.
    lse += total.log().clamp_min_(_EXCLUDED)
    losses = F.softplus(lse - positive[:, window]).sum(0)
    spread = spread / total.clamp_min_(torch.finfo(precise).tiny) if learnable else spread[:0].clone()
    return losses, positive, lse, spread, *rnorms


@torch.autocast("cpu", enabled=False)
def backward(
    grad: Tensor, recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, same: Tensor | None,
    positive: Tensor, lse: Tensor, rnorms: tuple[Tensor, Tensor], normalize: bool, eps: float,
    windows: Sequence[Sequence[tuple[int, int]]],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``completion_loss_backward`` of the kernels."""
    features, masks = (recovered, complete), _masks(valid, complete.shape[1])
    (groups, length, width), columns = recovered.shape, complete.shape[1]
    weight = grad * torch.sigmoid(lse - positive)
    if valid is not None:
        weight.masked_fill_(~valid, 0.0)
    # Columns that belong to no row have no loss, and so high a log-sum-exp that no share is left.
    padding = 0, columns - length
    anchors = [
        (lse[0], weight[0]),
        *((F.pad(s, padding, value=-_EXCLUDED), F.pad(w, padding)) for s, w in zip(lse[1:], weight[1:], strict=True)),
    ]
    sizes = [sum(rows for _, rows in of_side) for of_side in windows]
    gradients = [
        torch.zeros((groups, n, width) if of_side else 0, dtype=lse.dtype)
        for n, of_side in zip(sizes, windows, strict=True)
    ]
    plain = normalize and _plain(temperature)
    for first, window, targets in _backward_passes(windows, length, columns):
        for group, block, x, y, similarity in _tiles(features, temperature, masks, same, rnorms, first, window):
            at = [(group, block, None) if d == first else (group,) for d in range(len(lse))]
            shares = [(s[index], w[index]) for index, (s, w) in zip(at, anchors, strict=True)]
            if plain:
                # A row without negatives, of lowest log-sum-exp, has weight 0.
                factors = [w * torch.exp(-s.clamp_min(-2 * _PLAIN_EXPONENTIALS)) for s, w in shares]
                gradient = similarity.exp_().mul_(sum(factors))
            else:
                gradient = functools.reduce(torch.add, [torch.exp(similarity - s) * w for s, w in shares])
            if block.start < length:
                gradient.diagonal(block.start).copy_(-weight[:, group, block].sum(0))
            for dim, target, out in targets:
                if dim:
                    gradients[target][group, block.start - out : block.stop - out] = gradient @ y
                else:
                    gradients[target][group] += gradient.T @ x[block]
    for side, of_side in enumerate(windows):
        place = 0
        for offset, rows in of_side:
            push, window = gradients[side][:, place : place + rows], slice(offset, offset + rows)
            scale, mask, place = rnorms[side][:, window], masks[side], place + rows
            for group in range(groups if normalize else 0):
                x = _normalised(features[side], mask, group, rnorms[side], window)
                # A norm below eps was replaced by eps, a constant: nothing to project away.
                clamped = (scale[group] >= torch.tensor(eps, dtype=scale.dtype).reciprocal())[:, None]
                push[group] -= ((push[group] * x).sum(-1, keepdim=True) * x).masked_fill_(clamped, 0.0)
            push *= (scale / temperature)[..., None]
            if mask is not None:
                push.masked_fill_(~mask[:, window, None], 0.0)
    return weight, [g.to(f.dtype) for g, f in zip(gradients, features, strict=True)]


def _masks(valid: Tensor | None, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """Which rows (G, N) take part, and which columns (G, M): those of valid rows and all that belong to no row."""
    return valid, None if valid is None else F.pad(valid, (0, columns - valid.shape[1]), value=True)


def _passes(directions: int, length: int, rows: int) -> list[tuple[int, tuple[int, ...]]]:
    """The side that each pass takes row blocks of, and the dimensions of a tile that it reduces. Where the window is
    everything, one pass serves both directions."""
    whole: list[tuple[int, tuple[int, ...]]] = [(0, (1, 0)[:directions])]
    window: list[tuple[int, tuple[int, ...]]] = [(0, (1,)), (1, (1,))]
    return whole if rows == length else window[:directions]


def _backward_passes(
    windows: Sequence[Sequence[tuple[int, int]]], *lengths: int
) -> list[tuple[int, slice, list[tuple[int, int, int]]]]:
    """The side that each pass takes row blocks of, their window, and what it computes: the dimension of a tile that it
    reduces, the side whose gradient that is, and what a row's number exceeds its place there by."""
    if all(list(of_side) in ([], [(0, length)]) for of_side, length in zip(windows, lengths, strict=True)):
        targets = [(1 - side, side, 0) for side in (0, 1) if windows[side]]
        return [(0, slice(lengths[0]), targets)] if targets else []
    passes = []
    for side, of_side in enumerate(windows):
        place = 0
        for offset, rows in of_side:
            passes.append((side, slice(offset, offset + rows), [(1, side, offset - place)]))
            place += rows
    return passes


def _tiles(
    features: tuple[Tensor, Tensor], temperature: Tensor, masks: tuple[Tensor | None, Tensor | None],
    same: Tensor | None, rnorms: Sequence[Tensor], first: int, window: slice,
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Row blocks of the window, group by group: group, rows, both sides normalised, and the similarities, of which the
    diagonal, invalid rows and pairs of one id are excluded."""
    groups, length = features[0].shape[0], features[1 - first].shape[1]
    step = max(1, min(1024, TILE // max(length, 1)))
    inverse = temperature.reciprocal().item()
    for group in range(groups):
        x, y = (_normalised(features[side], masks[side], group, rnorms[side]) for side in (first, 1 - first))
        for start in range(window.start or 0, window.stop, step):
            rows = slice(start, min(start + step, window.stop))
            # What is added times 0 is not read.
            similarity = torch.addmm(x.new_empty(()), x[rows], y.T, beta=0, alpha=inverse)
            similarity.diagonal(start).fill_(_EXCLUDED)
            x_mask, y_mask = masks[first], masks[1 - first]
            if x_mask is not None and y_mask is not None:
                similarity.masked_fill_(~(x_mask[group, rows, None] & y_mask[group]), _EXCLUDED)
            if same is not None:
                similarity.masked_fill_(same[rows, None] == same[:length], _EXCLUDED)
            yield group, rows, x, y, similarity


def _plain(temperature: Tensor) -> bool:
    return temperature.item() * _PLAIN_EXPONENTIALS >= 1


def _normalised(features: Tensor, mask: Tensor | None, group: int, rnorm: Tensor, rows: slice = slice(None)) -> Tensor:
    features = features[group, rows].to(rnorm.dtype)
    if mask is not None:
        features = features.masked_fill(~mask[group, rows, None], 0.0)
    return features * rnorm[group, rows, None]
