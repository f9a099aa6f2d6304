"""Captions as they are given: checked, and with their tokens before their padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sclkern.models.config import SCLConfig
from sclkern.ops.dispatch import may_read


class Captions(NamedTuple):
    """What is known of captions.

    Attributes:
        mask: (B, L) bool, True = a token.
        in_order: whether padding is known to stand after the tokens of each caption.
        tokens: their number; None if values were not read.
    """

    mask: Tensor
    in_order: bool
    tokens: int | None


def check_captions(ids: Tensor, mask: Tensor, config: SCLConfig, names: tuple[str, str] = ("ids", "mask")) -> Captions:
    """Raise for captions that the network cannot take, before any work is done.

    Values are read where that does not wait for a device (``may_read``).

    Args:
        ids: (B, L) int64.
        mask: (B, L) bool, or 1 and 0: a token, or padding.
        config: of the network.
        names: of both, for messages.

    Returns:
        What is known of the captions.

    Raises:
        TypeError: no tensors, or of another dtype.
        ValueError: of another shape or device, longer than ``max_text_len``; where values are read: ids outside the
            vocabulary, a mask of other numbers than 1 and 0, a caption without a token.
    """
    check_text_shapes(ids, mask, config, names)
    mask = check_mask(mask, ids.shape, names[1])
    if not may_read(ids):
        return Captions(mask, False, None)
    rows, columns = ids.shape
    if not rows or not columns:
        return Captions(mask, True, 0)
    # numpy takes a fraction of torch's time for tensors of this size.
    numbers, tokens = ids.cpu().numpy(), mask.cpu().numpy()
    if numbers.view(np.uint64).max() >= config.vocab_size:  # negative ids are above all others
        wrong = numbers[(numbers < 0) | (numbers >= config.vocab_size)][0]
        raise ValueError(
            f"{names[0]}: got {wrong}, expected 0 to {config.vocab_size - 1} (vocab_size - 1), in padding too, "
            f"whose id is pad_id {config.pad_id}"
        )
    starts_with_tokens = np.count_nonzero(tokens[:, 0]) == rows
    if not starts_with_tokens and not (some := tokens.any(1)).all():
        raise ValueError(
            f"{names[1]}: got no token in caption {int((~some).argmax())}, expected True or 1 at one or more in each; "
            f"an empty text is <s> </s>, ids {config.bos_id} and {config.eos_id}"
        )
    in_order = starts_with_tokens and not np.count_nonzero(tokens[:, 1:] > tokens[:, :-1])
    return Captions(mask, in_order, int(np.count_nonzero(tokens)))


def check_text_shapes(ids: Any, mask: Any, config: SCLConfig, names: tuple[str, str]) -> None:
    """The part of ``check_captions`` that reads no values.

    Args:
        ids: what came.
        mask: what came.
        config: of the network.
        names: of both, for messages.

    Raises:
        TypeError: no tensors, or ids of another dtype.
        ValueError: another shape or device, or longer than ``max_text_len``.
    """
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor)):
        name, value = (names[1], mask) if isinstance(ids, Tensor) else (names[0], ids)
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor (B, L)")
    if ids.dtype != torch.int64:
        raise TypeError(f"{names[0]}: got {ids.dtype}, expected torch.int64; give {names[0]}.long()")
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"{names[0]}, {names[1]}: got shapes {tuple(ids.shape)} and {tuple(mask.shape)}, expected both (B, L)"
        )
    if ids.device != mask.device:
        raise ValueError(f"{names[1]}: got device {mask.device}, expected that of {names[0]}, {ids.device}")
    rows, length = ids.shape
    if not length and rows:
        raise ValueError(f"{names[0]}: got shape {tuple(ids.shape)}, expected one token or more in each caption")
    if length > config.max_text_len:
        raise ValueError(
            f"{names[0]}: got {length} tokens, expected at most max_text_len {config.max_text_len}; cut captions"
        )


def check_mask(mask: Tensor, shape: tuple[int, ...], name: str = "text_mask") -> Tensor:
    """A mask of tokens as bool.

    Args:
        mask: bool, or 1 and 0.
        shape: what it must have.
        name: of the mask, for messages.

    Returns:
        Bool; all False if it has other numbers than 1 and 0 that cannot be read: nothing tells what they mean.

    Raises:
        ValueError: another shape; or, if values are read, other numbers.
    """
    if mask.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected (B, L) = {tuple(shape)}")
    if mask.dtype == torch.bool:
        return mask
    token = mask == 1
    known = token | (mask == 0)
    if not may_read(mask):
        return token & known.all()
    if not known.all():
        raise ValueError(
            f"{name}: got the value {mask[~known][0].item()}, expected 1 for a token and 0 for padding; of an additive "
            "mask, give mask == 0"
        )
    return token


def tokens_first(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of each caption behind its tokens, wherever it stands.

    Args:
        ids: (B, L).
        mask: (B, L) bool.

    Returns:
        Both, with the tokens of each caption in their order.
    """
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def first_token(features: Tensor, mask: Tensor | None) -> Tensor:
    """The CLS of each caption: its first token, wherever padding stands.

    Args:
        features: (B, L, D).
        mask: (B, L) bool; None if each caption begins at the first position.

    Returns:
        (B, D).
    """
    if mask is None:
        return features[:, 0]
    return features[torch.arange(len(features), device=features.device), mask.to(torch.uint8).argmax(1)]
