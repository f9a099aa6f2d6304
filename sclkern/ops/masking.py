"""``select_patches``, ``select_tokens`` and ``mask_text``: the masks of a step, one launch each, never a wait."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sclkern import reference as definition
from sclkern.ops.dispatch import choose, interpreted, may_read
from sclkern.random import seed_tensor
from sclkern.reference import MaskedText
from sclkern.reference.masking import kept_patches

# The kernels hold whole rows in registers; see sclkern.kernels.masking.
MAX_PATCHES, MAX_TOKENS = 4096, 1024


def select_patches(
    num_patches: int,
    keep_ratio: float,
    batch: int,
    *,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Draw the kept patches of each sample, uniformly without replacement; a clip keeps the same in every frame.

    The draw is a function of (seed, sample, patch): the same on every device and backend
    (``sclkern.reference.select_patches``).

    Args:
        num_patches: P, at least 1. More than 4096 take the eager path.
        keep_ratio: in [0, 1].
        batch: B, 0 or more.
        seed: int, or int64 tensor of one element on ``device``, which is never read back: a captured CUDA graph can be
            replayed with another.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``).

    Returns:
        (B, K) int64 on ``device``, ascending, K = int(P * keep_ratio) and at least 1: what ``embed_patches`` takes as
        ``keep``.

    Raises:
        TypeError: an argument has the wrong type. ValueError: out of range, wrong device or unknown backend.
    """
    device = _check_selection(num_patches, "keep_ratio", keep_ratio, batch, seed, device)
    if _choose(device, num_patches, backend) == "eager":
        return definition.select_patches(num_patches, keep_ratio, batch, seed=seed, device=device)
    return torch.ops.sclkern.select_patches(seed_tensor(seed, device), num_patches, float(keep_ratio), batch)


def select_tokens(
    num_patches: int,
    ratio: float,
    batch: int,
    *,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Draw the patches whose embedding becomes the mask token, uniformly without replacement.

    Args, errors: those of ``select_patches``, ``ratio`` for ``keep_ratio``.

    Returns:
        (B, P) bool on ``device``, int(P * ratio) True in each row: what ``embed_patches`` takes as ``replace``.
    """
    device = _check_selection(num_patches, "ratio", ratio, batch, seed, device)
    if _choose(device, num_patches, backend) == "eager":
        return definition.select_tokens(num_patches, ratio, batch, seed=seed, device=device)
    return torch.ops.sclkern.select_tokens(seed_tensor(seed, device), num_patches, float(ratio), batch)


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
    backend: str = "auto",
) -> MaskedText:
    """Draw and apply a text mask; ``sclkern.reference.mask_text`` defines the kinds and what ``reference=True`` draws.

    Args:
        ids: (B, L) int64, any strides. More than 1024 columns take the eager path.
        lengths: (B,) int64, tokens of each caption with ``<s>`` and ``</s>``, 0 to L. Checked on a CPU (but not in
            code that is being compiled), and on a GPU under ``SCLKERN_DEBUG=1``.
        ratio: in [0, 1], of the words.
        mask_id: in [0, vocab_size). vocab_size: below 2**31.
        seed: int, or int64 tensor of one element on the device of ids, never read back.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``).

    Returns:
        ``ids`` (B, L) int64 that the model reads and ``selected`` (B, L) bool, the positions to predict or complete.

    Raises:
        TypeError: an argument has the wrong type. ValueError: wrong shape, device or range, or unknown kind or backend.
    """
    check_text(ids, lengths, kind, ratio, mask_id, vocab_size, seed)
    if _choose(ids.device, ids.shape[1], backend, MAX_TOKENS, "tokens") == "eager":
        return definition.mask_text(
            ids,
            lengths,
            kind=kind,
            ratio=ratio,
            mask_id=mask_id,
            vocab_size=vocab_size,
            seed=seed,
            reference=reference,
        )
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    seed = seed_tensor(seed, ids.device)
    read, selected = torch.ops.sclkern.mask_text(
        ids, lengths.contiguous(), seed, kind == "completion", float(ratio), mask_id, vocab_size, bool(reference)
    )
    return MaskedText(read, selected)


def _choose(device: torch.device, width: int, backend: str, limit: int = MAX_PATCHES, unit: str = "patches") -> str:
    unsupported = None if width <= limit else f"rows of {width} {unit}, the kernel holds at most {limit} in registers"
    # No floating tensor takes part: an empty one stands for the device.
    return choose(torch.zeros((0,), device=device), backend=backend, unsupported=unsupported).backend


def _check_selection(
    patches: int, name: str, ratio: float, batch: int, seed: int | Tensor, device: torch.device | str
) -> torch.device:
    _check_integer("num_patches", patches, 1)
    _check_ratio(name, ratio)
    _check_integer("batch", batch, 0)
    device = torch.device(device)
    _check_seed(seed, device)
    return seed.device if isinstance(seed, Tensor) else device


def check_text(
    ids: Tensor, lengths: Tensor, kind: str, ratio: float, mask_id: int, vocab_size: int, seed: int | Tensor
) -> None:
    for name, tensor in (("ids", ids), ("lengths", lengths)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: got {tensor.dtype}, expected torch.int64")
    if ids.ndim != 2:
        raise ValueError(f"ids: got shape {tuple(ids.shape)}, expected (B, L)")
    if lengths.shape != ids.shape[:1]:
        raise ValueError(
            f"lengths: got shape {tuple(lengths.shape)}, expected (B,) for ids of shape (B, L) = {tuple(ids.shape)}"
        )
    if lengths.device != ids.device:
        raise ValueError(f"lengths: got device {lengths.device}, expected that of ids, {ids.device}")
    if kind not in ("mlm", "completion"):
        raise ValueError(f"kind: got {kind!r}, expected 'mlm' or 'completion'")
    _check_ratio("ratio", ratio)
    _check_integer("vocab_size", vocab_size, 1, 2**31 - 1)
    _check_integer("mask_id", mask_id, 0, vocab_size - 1)
    _check_seed(seed, ids.device)
    if may_read(lengths) and lengths.numel():
        lowest, highest = (int(bound) for bound in lengths.aminmax())
        if lowest < 0 or highest > ids.shape[1]:
            raise ValueError(f"lengths: got {lowest} to {highest}, expected 0 to L = {ids.shape[1]}")


def _check_integer(name: str, number: int, lowest: int, highest: int | None = None) -> None:
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name}: got {type(number).__name__}, expected an int")
    if number < lowest or (highest is not None and number > highest):
        expected = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
        raise ValueError(f"{name}: got {number}, expected {expected}")


def _check_ratio(name: str, ratio: float) -> None:
    if not isinstance(ratio, int | float) or isinstance(ratio, bool):
        raise TypeError(f"{name}: got {type(ratio).__name__}, expected a number")
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name}: got {ratio}, expected 0 to 1")


def _check_seed(seed: int | Tensor, device: torch.device) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: got {seed.dtype} of shape {tuple(seed.shape)}, expected int64 of one element")
        # "cuda" without a number is whichever of them the seed is on.
        if seed.device.type != device.type or device.index not in (None, seed.device.index):
            raise ValueError(f"seed: got device {seed.device}, expected {device}")
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {type(seed).__name__}, expected an int or an int64 tensor of one element")


def _select_patches(seed: Tensor, num_patches: int, keep_ratio: float, batch: int) -> Tensor:
    from sclkern.kernels import masking as kernels  # here, because Triton is optional

    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(seed):
        return kernels.select_patches(seed, num_patches, kept_patches(num_patches, keep_ratio), batch)


def _select_tokens(seed: Tensor, num_patches: int, ratio: float, batch: int) -> Tensor:
    from sclkern.kernels import masking as kernels

    with torch.cuda.device_of(seed):
        return kernels.select_tokens(seed, num_patches, int(num_patches * ratio), batch)


def _mask_text(
    ids: Tensor,
    lengths: Tensor,
    seed: Tensor,
    completion: bool,
    ratio: float,
    mask_id: int,
    vocab_size: int,
    reference: bool,
) -> tuple[Tensor, Tensor]:
    from sclkern.kernels import masking as kernels

    with torch.cuda.device_of(ids):
        return kernels.mask_text(ids, lengths, seed, completion, ratio, mask_id, vocab_size, reference)


_patches_op = torch.library.custom_op("sclkern::select_patches", _select_patches, mutates_args=(), device_types="cuda")
_tokens_op = torch.library.custom_op("sclkern::select_tokens", _select_tokens, mutates_args=(), device_types="cuda")
_text_op = torch.library.custom_op("sclkern::mask_text", _mask_text, mutates_args=(), device_types="cuda")


@_patches_op.register_kernel("cpu")
def _(seed, num_patches, keep_ratio, batch):
    if interpreted():
        return _select_patches(seed, num_patches, keep_ratio, batch)
    return definition.select_patches(num_patches, keep_ratio, batch, seed=seed)


@_tokens_op.register_kernel("cpu")
def _(seed, num_patches, ratio, batch):
    if interpreted():
        return _select_tokens(seed, num_patches, ratio, batch)
    return definition.select_tokens(num_patches, ratio, batch, seed=seed)


@_text_op.register_kernel("cpu")
def _(ids, lengths, seed, completion, ratio, mask_id, vocab_size, reference):
    if interpreted():
        return _mask_text(ids, lengths, seed, completion, ratio, mask_id, vocab_size, reference)
    return tuple(
        definition.mask_text(
            ids,
            lengths,
            kind="completion" if completion else "mlm",
            ratio=ratio,
            mask_id=mask_id,
            vocab_size=vocab_size,
            seed=seed,
            reference=reference,
        )
    )


@_patches_op.register_fake
def _(seed, num_patches, keep_ratio, batch):
    return seed.new_empty((batch, kept_patches(num_patches, keep_ratio)))


@_tokens_op.register_fake
def _(seed, num_patches, ratio, batch):
    return seed.new_empty((batch, num_patches), dtype=torch.bool)


@_text_op.register_fake
def _(ids, lengths, seed, completion, ratio, mask_id, vocab_size, reference):
    return ids.new_empty(ids.shape), ids.new_empty(ids.shape, dtype=torch.bool)
