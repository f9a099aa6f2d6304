"""Data of a run: sources, tokenizer, transforms and loaders, as its configuration names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sclkern.data import PairSource, open_pairs
from sclkern.data.buckets import Buckets
from sclkern.data.dataset import PairDataset
from sclkern.data.digest import digest
from sclkern.data.loader import PairLoader
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.errors import UserError
from sclkern.training.config import PretrainConfig

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes:
        train_source: pairs to train on.
        val_source: held-out pairs.
        tokenizer: tokenizer whose vocabulary and special ids are the model's.
        val_transform: image transform of validation and retrieval.
        train_loader: shuffled batches of ``train_source``.
        val_loader: batches of ``val_source`` in its order.
        caption_lengths: tokens of about a thousand training captions.
        identity: what a resumed run must find again: numbers of pairs and digests.
    """

    train_source: PairSource
    val_source: PairSource
    tokenizer: CaptionTokenizer
    val_transform: Transform
    train_loader: PairLoader
    val_loader: PairLoader
    caption_lengths: list[int]
    identity: dict[str, Any]


def open_data(config: PretrainConfig, device: torch.device) -> TrainingData:
    """Open everything that ``config.data`` names.

    Args:
        config: configuration of the run.
        device: device that trains; on a GPU batches are padded to few sizes.

    Returns:
        The data.

    Raises:
        UserError: data, tokenizer or a transform cannot be used, or do not fit the model or the batch size.
    """
    data = config.data
    train_source = open_pairs(data.root, data.train_tables, data.train_split, format=data.format)
    val_source = open_pairs(data.root, data.val_tables, data.val_split, format=data.format)
    tokenizer = CaptionTokenizer.from_pretrained(data.tokenizer)
    check_tokenizer(config, tokenizer)
    transform, val_transform = (
        build_transform(name, config.model.image_size) for name in (data.transform, data.val_transform)
    )
    lengths = _caption_lengths(train_source, tokenizer, config.model.max_text_len)
    train_buckets = val_buckets = None
    train_batch, val_batch = config.run.batch_size, min(config.run.batch_size, val_source.num_pairs)
    if device.type == "cuda":
        # A GPU needs few shapes: each is compiled or captured once. A CPU would compute every token of the padding.
        val_lengths = _caption_lengths(val_source, tokenizer, config.model.max_text_len)
        train_buckets = Buckets.from_lengths(lengths, train_batch, config.model.max_text_len)
        val_buckets = Buckets.from_lengths(val_lengths, val_batch, config.model.max_text_len)
    if config.objectives.in_batch_negatives:
        if train_batch < 2:
            raise UserError(
                f"run.batch_size: got {train_batch}, expected 2 or more, because a negative image is another row's; or "
                "use objectives.itm_negatives=dataset"
            )
        if val_batch < 2:
            raise UserError(
                "data.val_tables: got 1 pair, expected 2 or more, because a negative image is another row's; hold out "
                "more pairs"
            )
    train_loader = _loader(config, train_source, tokenizer, transform, train_batch, train_buckets, shuffle=True)
    val_loader = _loader(config, val_source, tokenizer, val_transform, val_batch, val_buckets, shuffle=False)
    identity = {
        "training data": _identity_of(train_source),
        "held-out data": _identity_of(val_source),
        "tokenizer": _tokenizer_digest(tokenizer, train_source, config.model.max_text_len),
    }
    return TrainingData(train_source, val_source, tokenizer, val_transform, train_loader, val_loader, lengths, identity)


def data_difference(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """Find what would make a resumed run one over other data.

    Args:
        saved: ``TrainingData.identity`` of the run.
        current: the same of the data that it is resumed with.

    Returns:
        The difference in one line; None if there is none.
    """
    for name in ("training data", "held-out data"):
        before, now = saved[name], current[name]
        if any(before[key] != now[key] for key in ("pairs", "images")):
            return (
                f"the {name} were {before['pairs']} pairs of {before['images']} images and are now {now['pairs']} "
                f"pairs of {now['images']} images"
            )
        if before["digest"] != now["digest"]:
            return f"the {name} have other captions than at the start, or in another order"
    if saved["tokenizer"] != current["tokenizer"]:
        return "the tokenizer gives other ids than at the start"
    return None


def _identity_of(source: PairSource) -> dict[str, Any]:
    # Readers may count with numpy, whose numbers and texts no checkpoint could be read with.
    return {"pairs": int(source.num_pairs), "images": int(source.num_images), "digest": str(digest(source))}


def _tokenizer_digest(tokenizer: CaptionTokenizer, source: PairSource, max_text_len: int) -> str:
    """Digest of the vocabulary, and of the ids of some captions, which depend on the rest of a tokenizer."""
    hashed = hashlib.blake2b(json.dumps(sorted(tokenizer.tokenizer.get_vocab().items())).encode(), digest_size=16)
    ids, _ = tokenizer([source.caption(pair) for pair in _sample(source)], max_text_len)
    hashed.update(json.dumps(ids.tolist()).encode())
    return hashed.hexdigest()


def _sample(source: PairSource) -> range:
    """About a thousand pairs, spread evenly."""
    return range(0, source.num_pairs, max(1, source.num_pairs // 1000))


def check_tokenizer(config: PretrainConfig, tokenizer: CaptionTokenizer) -> None:
    """Raise a ``UserError`` unless vocabulary and special ids are those of the model."""
    for name in ("vocab_size", "pad_id", "mask_id", "bos_id", "eos_id"):
        expected, value = getattr(config.model, name), getattr(tokenizer, name)
        if expected != value:
            raise UserError(
                f"model.{name}: got {expected}, the tokenizer {config.data.tokenizer!r} has {value}; "
                f"set model.{name}={value} or use the model's tokenizer"
            )


def _loader(
    config: PretrainConfig,
    source: PairSource,
    tokenizer: CaptionTokenizer,
    transform: Transform,
    batch_size: int,
    buckets: Buckets | None,
    *,
    shuffle: bool,
) -> PairLoader:
    dataset = PairDataset(
        source,
        tokenizer,
        transform,
        max_text_len=config.model.max_text_len,
        min_size=config.model.patch_size,
        seed=config.run.seed,
        false_image=config.objectives.dataset_negatives,
    )
    return PairLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
        # The published masks are drawn over the padded caption.
        pad_to_max=config.objectives.mlm_mask == "published",
        buckets=buckets,
    )


def _caption_lengths(source: PairSource, tokenizer: CaptionTokenizer, max_text_len: int) -> list[int]:
    """Tokens of about a thousand captions of a source."""
    _, mask = tokenizer([source.caption(pair) for pair in _sample(source)], max_text_len)
    return mask.sum(1).tolist()
