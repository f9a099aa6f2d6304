"""``select_patches``, ``select_tokens`` and ``mask_text``: the masks of a step, one launch each, never a wait."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sclkern import reference
from sclkern.ops import _checks
from sclkern.ops._registration import choose, kernels, public_op, register
from sclkern.ops.dispatch import Choice, may_read, select_backend
from sclkern.random import seed_tensor
from sclkern.reference import MaskedText
from sclkern.reference.masking import kept_patches

# The kernels hold whole rows in registers; see sclkern.kernels.masking.
MAX_PATCHES, MAX_TOKENS = 4096, 1024
KINDS = ("mlm", "completion")


@public_op
def select_patches(
    num_patches: int,
    keep_ratio: float,
    batch: int,
    *,
    seed: int | Tensor,
    row_ids: Tensor | None = None,
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
        row_ids: (B,) int64 on ``device``, 0 to 2**32 - 1: a sample draws by its id in place of its index,
            so that it keeps its mask in another batch and at another place; None are the indices.
        device: where the draw happens; "cuda" without a number is the device of a seed tensor.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        (B, K) int64 on ``device``, ascending, K = int(P * keep_ratio) and at least 1: what ``embed_patches`` takes as
        ``keep``.

    Raises:
        TypeError: an argument has the wrong type. ValueError: out of range, wrong device or unknown backend.
    """
    arguments = num_patches, keep_ratio, batch, seed, row_ids, device, backend
    path = choose("select_patches", check_select_patches, plan_select_patches, *arguments)
    device = _device(seed, device)
    if path == "eager":
        return reference.select_patches(num_patches, keep_ratio, batch, seed=seed, row_ids=row_ids, device=device)
    row_ids = None if row_ids is None else row_ids.contiguous()
    return _select_patches_op(seed_tensor(seed, device), num_patches, float(keep_ratio), batch, row_ids)


@public_op
def select_tokens(
    num_patches: int,
    ratio: float,
    batch: int,
    *,
    seed: int | Tensor,
    row_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Draw the patches whose embedding becomes the mask token, uniformly without replacement.

    Args:
        num_patches: P, at least 1. More than 4096 take the eager path.
        ratio: share of the patches, in [0, 1].
        batch: B, 0 or more.
        seed: as in ``select_patches``.
        row_ids: as in ``select_patches``.
        device: as in ``select_patches``.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        (B, P) bool on ``device``, int(P * ratio) True in each row: what ``embed_patches`` takes as ``replace``.

    Raises:
        TypeError: an argument has the wrong type. ValueError: out of range, wrong device or unknown backend.
    """
    arguments = num_patches, ratio, batch, seed, row_ids, device, backend
    path = choose("select_tokens", check_select_tokens, plan_select_tokens, *arguments)
    device = _device(seed, device)
    if path == "eager":
        return reference.select_tokens(num_patches, ratio, batch, seed=seed, row_ids=row_ids, device=device)
    row_ids = None if row_ids is None else row_ids.contiguous()
    return _select_tokens_op(seed_tensor(seed, device), num_patches, float(ratio), batch, row_ids)


@public_op
def mask_text(
    ids: Tensor,
    lengths: Tensor,
    *,
    kind: Literal["mlm", "completion"],
    ratio: float,
    mask_id: int,
    vocab_size: int,
    seed: int | Tensor,
    row_ids: Tensor | None = None,
    published: bool = False,
    backend: str = "auto",
) -> MaskedText:
    """Draw and apply a text mask; ``sclkern.reference.mask_text`` defines the kinds.

    Args:
        ids: (B, L) int64, any strides. More than 1024 columns take the eager path.
        lengths: (B,) int64, tokens of each caption with ``<s>`` and ``</s>``, 0 to L. Checked on a CPU (but not in
            code that is being compiled), and on a GPU under ``SCLKERN_DEBUG=1``.
        kind: "mlm" selects max(1, round(ratio * n)) of the n tokens between ``<s>`` and ``</s>``, of which 80 % become
            ``<mask>``, 10 % a random token and 10 % stay; "completion" selects int(n * ratio) + 1, which all become
            ``<mask>``.
        ratio: in [0, 1], of the tokens between ``<s>`` and ``</s>``.
        mask_id: id of ``<mask>``, in [0, vocab_size).
        vocab_size: at least 1 and below 2**31; random tokens are below it.
        seed: int, or int64 tensor of one element on the device of ids, never read back.
        row_ids: (B,) int64 on the device of ids, as in ``select_patches``.
        published: draw as the published code does: "mlm" of all padded positions, so that a caption may get no target;
            "completion" with replacement.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        ``ids`` (B, L) int64 that the model reads and ``selected`` (B, L) bool, the positions to predict or complete.

    Raises:
        TypeError: an argument has the wrong type. ValueError: wrong shape, device or range, or unknown kind or backend.
    """
    numbers = kind, ratio, mask_id, vocab_size, seed, row_ids, published, backend
    if choose("mask_text", check_mask_text, plan_mask_text, ids, lengths, *numbers) == "eager":
        options: dict[str, Any] = {"mask_id": mask_id, "vocab_size": vocab_size, "seed": seed, "row_ids": row_ids}
        return reference.mask_text(ids, lengths, kind=kind, ratio=ratio, published=published, **options)
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    seed, row_ids = seed_tensor(seed, ids.device), None if row_ids is None else row_ids.contiguous()
    words = seed, kind == "completion", float(ratio), mask_id, vocab_size, published, row_ids
    return MaskedText(*_mask_text_op(ids, lengths.contiguous(), *words))


def plan_select_patches(
    num_patches: int | None, *_: object, seed: int | Tensor | None = None, device: torch.device | str = "cpu",
    backend: str = "auto", **__: object,
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    unsupported = _too_wide(num_patches, MAX_PATCHES, "patches")
    return select_backend(device=_device(seed, device), backend=backend, unsupported=unsupported)


plan_select_tokens = plan_select_patches


def plan_mask_text(ids: Tensor | None, *, backend: str = "auto", **_: Any) -> Choice:
    """The path of these arguments; see ``sclkern.ops.explain``."""
    if ids is None:
        return select_backend(backend=backend)
    unsupported = _too_wide(ids.shape[1], MAX_TOKENS, "tokens")
    return select_backend(device=ids.device, backend=backend, unsupported=unsupported)


def _too_wide(width: int | None, limit: int, unit: str) -> tuple[str, ...]:
    if width is None or width <= limit:
        return ()
    return (f"rows of {width} {unit}, the kernel holds at most {limit} in registers",)


def _device(seed: int | Tensor | None, device: torch.device | str) -> torch.device:
    return seed.device if isinstance(seed, Tensor) else torch.device(device)


def check_select_patches(
    num_patches: int, keep_ratio: float, batch: int, seed: int | Tensor, row_ids: Tensor | None,
    device: torch.device | str,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.probability("keep_ratio", keep_ratio)
    check_select_tokens(num_patches, keep_ratio, batch, seed, row_ids, device)


def check_select_tokens(
    num_patches: int, ratio: float, batch: int, seed: int | Tensor, row_ids: Tensor | None,
    device: torch.device | str,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.integer("num_patches", num_patches, 1)
    _checks.probability("ratio", ratio)
    _checks.integer("batch", batch, 0)
    _checks.seed(seed, torch.device(device), optional=False)
    _check_row_ids(batch, row_ids, _device(seed, device))


def check_mask_text(
    ids: Tensor, lengths: Tensor, kind: str, ratio: float, mask_id: int, vocab_size: int, seed: int | Tensor,
    row_ids: Tensor | None, published: bool,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.dtype(torch.int64, ids=ids, lengths=lengths)
    _checks.rank("(B, L)", (2,), ids=ids)
    _checks.shape("(B,)", ids.shape[:1], lengths=lengths)
    _checks.same_device("ids", ids, lengths=lengths)
    _checks.choice("kind", kind, KINDS)
    _checks.probability("ratio", ratio)
    _checks.integer("vocab_size", vocab_size, 1, 2**31 - 1)
    _checks.integer("mask_id", mask_id, 0, vocab_size - 1)
    _checks.seed(seed, ids.device, optional=False)
    _check_row_ids(ids.shape[0], row_ids, ids.device)
    _checks.boolean("published", published)
    if may_read(lengths) and lengths.numel():
        lowest, highest = (int(bound) for bound in lengths.aminmax())
        if lowest < 0 or highest > ids.shape[1]:
            raise ValueError(f"lengths: got {lowest} to {highest}, expected 0 to L = {ids.shape[1]}")


def _check_row_ids(rows: int, row_ids: Tensor | None, device: torch.device) -> None:
    if row_ids is not None:
        _checks.dtype(torch.int64, row_ids=row_ids)
        _checks.shape("(B,)", (rows,), row_ids=row_ids)
        if row_ids.device.type != device.type or device.index not in (None, row_ids.device.index):
            raise ValueError(f"row_ids: got device {row_ids.device}, expected {device}")


def _select_patches(seed: Tensor, num_patches: int, keep_ratio: float, batch: int, row_ids: Tensor | None) -> Tensor:
    return kernels.masking.select_patches(seed, num_patches, kept_patches(num_patches, keep_ratio), batch, row_ids)


def _select_tokens(seed: Tensor, num_patches: int, ratio: float, batch: int, row_ids: Tensor | None) -> Tensor:
    return kernels.masking.select_tokens(seed, num_patches, int(num_patches * ratio), batch, row_ids)


def _mask_text(
    ids: Tensor, lengths: Tensor, seed: Tensor, completion: bool, ratio: float, mask_id: int, vocab_size: int,
    published: bool, row_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return kernels.masking.mask_text(ids, lengths, seed, completion, ratio, mask_id, vocab_size, published, row_ids)


def _fake_patches(seed: Tensor, num_patches: int, keep_ratio: float, batch: int, **_: object) -> Tensor:
    return seed.new_empty((batch, kept_patches(num_patches, keep_ratio)))


def _fake_tokens(seed: Tensor, num_patches: int, batch: int, **_: object) -> Tensor:
    return seed.new_empty((batch, num_patches), dtype=torch.bool)


def _fake_text(ids: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape), ids.new_empty(ids.shape, dtype=torch.bool)


_select_patches_op = register("select_patches", _select_patches, _fake_patches)
_select_tokens_op = register("select_tokens", _select_tokens, _fake_tokens)
_mask_text_op = register("mask_text", _mask_text, _fake_text)
