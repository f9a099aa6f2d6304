"""Masks of patches and tokens, one program a sample, equal to those of ``sclkern.reference.masking`` to the bit.

B samples, P patches, L tokens. Random words are Philox-4x32-10 with the counter of ``sclkern.random.random_words``,
held as int64 so that every comparison is signed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import LaunchConfig, resolve, select
from sclkern.kernels.launch import launch, static_entry
from sclkern.random import STREAM_COMPLETION, STREAM_MLM, STREAM_PATCHES, STREAM_TOKENS

# The widest rows; a program holds one in registers.
MAX_PATCHES, MAX_TOKENS = 4096, 1024
# Draws against a row at a time.
DRAWS = tl.constexpr(16)


@triton.jit
def draw(seed_ptr, ids_ptr, row, column, STREAM: tl.constexpr):
    """Three words on [0, 2**32) for each column (int32) of a row; with ids of the rows, by those."""
    zero = column * 0
    if ids_ptr is not None:
        row = tl.load(ids_ptr + row).to(tl.int32)
    key, action, token, _ = tl.philox(tl.load(seed_ptr), column, zero + row, zero + STREAM, zero)
    return key.to(tl.int64), action.to(tl.int64), token.to(tl.int64)


@triton.jit
def smallest(words, eligible, count):
    """(columns,) bool: the ``count`` eligible columns with the smallest words, of equal ones the first.

    The count-th smallest word is built from its highest bit down, which takes 32 sums where ranks take a comparison of
    every pair.
    """
    threshold = tl.sum(words, 0) * 0
    bit = threshold + 0x80000000
    for _ in range(32):
        candidate = threshold + bit
        fewer = tl.sum((eligible & (words < candidate)).to(tl.int32), 0) < count
        threshold = tl.where(fewer, candidate, threshold)
        bit = bit >> 1
    below_threshold = eligible & (words < threshold)
    equal = (eligible & (words == threshold)).to(tl.int32)
    before = tl.cumsum(equal, 0) - equal
    left = count - tl.sum(below_threshold.to(tl.int32), 0)
    return below_threshold | ((equal != 0) & (before < left))


@triton.jit(do_not_specialize=["patches", "count"])
def select_patches_kernel(
    seed_ptr,  # (1,) int64
    row_ids_ptr,  # (B,) int64, or None
    out_ptr,  # (B, count) int64
    patches,
    count,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    words, _, _ = draw(seed_ptr, row_ids_ptr, row, column, STREAM)
    chosen = smallest(words, column < patches, count)
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out_ptr + row.to(tl.int64) * count + rank, column.to(tl.int64), mask=chosen)


@triton.jit(do_not_specialize=["patches", "count"])
def select_tokens_kernel(
    seed_ptr,  # (1,) int64
    row_ids_ptr,  # (B,) int64, or None
    out_ptr,  # (B, P) bool
    patches,
    count,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    words, _, _ = draw(seed_ptr, row_ids_ptr, row, column, STREAM)
    chosen = smallest(words, column < patches, count)
    tl.store(out_ptr + row.to(tl.int64) * patches + column, chosen, mask=column < patches)


# The count of tokens must be that of Python's float64 product, so ratio is not the float32 that Triton would take.
@triton.jit(do_not_specialize=["width", "ids_row_stride", "mask_id", "vocab_size", "draws"])
def mask_text_kernel(
    ids_ptr,  # (B, L) int64
    lengths_ptr,  # (B,) int64
    seed_ptr,  # (1,) int64
    row_ids_ptr,  # (B,) int64, or None
    out_ptr,  # (B, L) int64
    selected_ptr,  # (B, L) bool
    width,
    ids_row_stride,
    mask_id,
    vocab_size,
    draws,  # of the padded width, for the published "mlm"
    ratio: tl.float64,
    COMPLETION: tl.constexpr,
    PUBLISHED: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    token_count = tl.maximum(tl.load(lengths_ptr + row) - 2, 0)
    is_token = inside & (column >= 1) & (column <= token_count)
    ids = tl.load(ids_ptr + row.to(tl.int64) * ids_row_stride + column, mask=inside, other=0)
    key, action, token = draw(seed_ptr, row_ids_ptr, row, column, STREAM)
    expected = token_count.to(tl.float64) * ratio
    if COMPLETION:
        count = expected.to(tl.int64) + 1
        if PUBLISHED:
            hits = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, width, DRAWS):
                index = start + tl.arange(0, DRAWS)
                drawn, _, _ = draw(seed_ptr, row_ids_ptr, row, index, STREAM)
                drawn = tl.minimum(((drawn * token_count) >> 32) + 1, width - 1)
                drawn = tl.where((index < count) & (index < width), drawn, -1)
                hits += tl.sum((column[:, None] == drawn[None, :]).to(tl.int32), 1)
            selected = is_token & (hits > 0)
        else:
            selected = smallest(key, is_token, count)
        replaced = tl.zeros((BLOCK,), tl.int64) + mask_id
    else:
        if PUBLISHED:
            selected = smallest(key, inside, draws) & is_token
        else:
            selected = smallest(key, is_token, tl.maximum((expected + 0.5).to(tl.int64), 1))
        chance = (action >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24
        replaced = tl.where(chance < 0.9, (token * vocab_size) >> 32, ids)
        replaced = tl.where(chance < 0.8, mask_id, replaced)
    offset = row.to(tl.int64) * width + column
    tl.store(out_ptr + offset, tl.where(selected, replaced, ids), mask=inside)
    tl.store(selected_ptr + offset, selected, mask=inside)


def select_patches(
    seed: Tensor,
    patches: int,
    count: int,
    batch: int,
    row_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """(B, count) int64, ascending; ``seed`` (1,) int64; ``count`` up to ``patches``, which is up to ``MAX_PATCHES``."""
    out = torch.empty((batch, count), dtype=torch.int64, device=seed.device)
    if out.numel():
        (chosen,) = resolve(config, ("select_patches_kernel",), seed, columns=patches)
        launch(
            select_patches_kernel,
            (batch,),
            chosen,
            seed_ptr=seed,
            row_ids_ptr=row_ids,
            out_ptr=out,
            patches=patches,
            count=count,
            STREAM=STREAM_PATCHES,
        )
    return out


def select_tokens(
    seed: Tensor,
    patches: int,
    count: int,
    batch: int,
    row_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """(B, P) bool with ``count`` True in each row; ``seed`` (1,) int64; at most ``MAX_PATCHES`` patches."""
    out = torch.empty((batch, patches), dtype=torch.bool, device=seed.device)
    if out.numel():
        (chosen,) = resolve(config, ("select_tokens_kernel",), seed, columns=patches)
        launch(
            select_tokens_kernel,
            (batch,),
            chosen,
            seed_ptr=seed,
            row_ids_ptr=row_ids,
            out_ptr=out,
            patches=patches,
            count=count,
            STREAM=STREAM_TOKENS,
        )
    return out


def mask_text(
    ids: Tensor,
    lengths: Tensor,
    seed: Tensor,
    completion: bool,
    ratio: float,
    mask_id: int,
    vocab_size: int,
    published: bool,
    row_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        ids: (B, L) int64 with contiguous rows, L up to ``MAX_TOKENS``.
        lengths: (B,) int64, contiguous.
        seed: (1,) int64.
        completion: mask for completion, otherwise for MLM.
        ratio: of the tokens that are selected.
        mask_id: id of the mask token.
        vocab_size: random replacements are below it.
        published: as the published code draws.
        row_ids: (B,) int64, contiguous, in place of the indices of the rows; None are the indices.
        config: launch configuration, None for the selected one.

    Returns:
        The ids that the model reads (B, L) int64 and the selected positions (B, L) bool.
    """
    rows, width = ids.shape
    out = torch.empty((rows, width), dtype=torch.int64, device=ids.device)
    selected = torch.empty((rows, width), dtype=torch.bool, device=ids.device)
    if out.numel():
        (chosen,) = resolve(config, ("mask_text_kernel",), ids, columns=width)
        launch(
            mask_text_kernel,
            (rows,),
            chosen,
            # The product and the sum that rounds it are two roundings, as in the reference: one would change counts.
            False,
            ids_ptr=ids,
            lengths_ptr=lengths,
            seed_ptr=seed,
            row_ids_ptr=row_ids,
            out_ptr=out,
            selected_ptr=selected,
            width=width,
            ids_row_stride=ids.stride(0),
            mask_id=mask_id,
            vocab_size=vocab_size,
            draws=max(1, round(width * ratio)),
            ratio=ratio,
            COMPLETION=completion,
            PUBLISHED=published,
            STREAM=STREAM_COMPLETION if completion else STREAM_MLM,
        )
    return out, selected


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile: 324 patches and captions of 50 tokens, with the ids that training gives; and the
    widest that the kernels take."""
    entries = []
    for op, kernel, out, stream, columns in (
        ("select_patches", select_patches_kernel, "*i64", STREAM_PATCHES, 324),
        ("select_patches", select_patches_kernel, "*i64", STREAM_PATCHES, MAX_PATCHES),
        ("select_tokens", select_tokens_kernel, "*i1", STREAM_TOKENS, 324),
    ):
        (config,) = select(op, "forward", torch.int64, arch, columns=columns)
        signature = {"seed_ptr": "*i64", "row_ids_ptr": "*i64", "out_ptr": out}
        entries.append(static_entry(kernel, config, signature, STREAM=stream, **_without_ids(columns, MAX_PATCHES)))
    signature = dict.fromkeys(("ids_ptr", "lengths_ptr", "seed_ptr", "row_ids_ptr", "out_ptr"), "*i64")
    signature |= {"selected_ptr": "*i1", "ratio": "fp64"}
    for completion, published, columns in (
        (False, False, 50),
        (True, False, 50),
        (False, True, 50),
        (True, True, 50),
        (True, True, MAX_TOKENS),
    ):
        (config,) = select("mask_text", "forward", torch.int64, arch, columns=columns)
        stream = STREAM_COMPLETION if completion else STREAM_MLM
        constants: dict[str, Any] = {"COMPLETION": completion, "PUBLISHED": published, "STREAM": stream}
        constants |= _without_ids(columns, MAX_TOKENS)
        entries.append(static_entry(mask_text_kernel, config, signature, **constants))
    return entries


def _without_ids(columns: int, widest: int) -> dict[str, None]:
    return {"row_ids_ptr": None} if columns == widest else {}
