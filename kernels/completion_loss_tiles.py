"""What the forward and the backward of the completion loss share: tiles of similarities and their sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import LaunchConfig
from sclkern.kernels.launch import static_entry

# Not minus infinity, whose differences are NaN; far below any similarity, and a sum of many is still finite.
EXCLUDED = tl.constexpr(-1e30)


@triton.jit
def rows_taking_part(valid_ptr, row, inside):
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    return inside


@triton.jit
def negatives(same_ptr, x, y, x_in, y_in, counts):
    """``counts`` (X, Y) without the pairs of rows x and y of one id; every group has the same ids."""
    if same_ptr is not None:
        x_id = tl.load(same_ptr + x, mask=x_in, other=0)
        y_id = tl.load(same_ptr + y, mask=y_in, other=0)
        counts = counts & (x_id[:, None] != y_id[None, :])
    return counts


@triton.jit
def tile(ptr, inside, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of the rows from ptr on; rows outside are zeros, whatever they hold.

    The caller's pointer carries the 64-bit offset: within a tile 32 bits suffice, and take half the registers.
    """
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)


@triton.jit
def dots(x_ptr, y_ptr, x_in, y_in, WIDTH: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, K: tl.constexpr):
    """(X, Y) float32: dot products of the rows from x_ptr on with those from y_ptr on."""
    products = tl.zeros((X, Y), tl.float32)
    for start in range(0, WIDTH, K):
        x = tile(x_ptr, x_in, start, WIDTH, X, K)
        y = tile(y_ptr, y_in, start, WIDTH, Y, K)
        products = tl.dot(x, tl.trans(y), products, input_precision="ieee")
    return products


def columns_valid(valid: Tensor | None, columns: int) -> Tensor | None:
    """(G, M) bool: which columns take part, those of valid (G, N) rows and all that belong to no row."""
    further = 0 if valid is None else columns - valid.shape[1]
    return F.pad(valid, (0, further), value=True) if valid is not None and further else valid


def bytes_of(valid: Tensor | None) -> Tensor | None:
    """A mask as kernels read it."""
    return None if valid is None else valid.view(torch.uint8)


_FLOATS = (
    "temperature_ptr", "recovered_rnorm_ptr", "complete_rnorm_ptr", "x_rnorm_ptr", "y_rnorm_ptr", "positive_ptr",
    "maximum_ptr", "total_ptr", "spread_ptr", "column_maximum_ptr", "column_total_ptr", "column_spread_ptr",
    "previous_ptr", "lse_ptr", "mean_spread_ptr", "losses_ptr", "grad_ptr", "weight_ptr", "x_weight_ptr",
    "y_weight_ptr", "x_lse_ptr", "y_lse_ptr", "scale_ptr", "push_ptr",
)  # fmt: skip


def entry(kernel: Any, config: LaunchConfig, features: str, same: bool = False, **constants: Any) -> dict[str, Any]:
    """What the static checks compile, at the model's width, with ids of pairs that are no negatives or without."""
    names = ("recovered_ptr", "complete_ptr", "x_ptr", "y_ptr", "weights_ptr", "grad_x_ptr")
    signature = {name: "*fp32" for name in _FLOATS} | {"eps": "fp32"}
    signature |= dict.fromkeys(("valid_ptr", "x_valid_ptr", "y_valid_ptr"), "*u8")
    signature |= {"same_ptr": "*i64"} if same else {}
    signature |= {name: f"*{features}" for name in names}
    constants |= {"WIDTH": 768} if "WIDTH" in kernel.arg_names else {}
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    found = static_entry(kernel, config, signature, **constants)
    return found | {"features": f"{features},same"} if same else found
