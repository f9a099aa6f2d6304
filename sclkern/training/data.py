"""Data of a run: sources, tokenizer, transforms and loaders, as its configuration names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sclkern.data import PairSource, open_pairs
from sclkern.data.buckets import Buckets
from sclkern.data.dataset import PairDataset
from sclkern.data.digest import digest
from sclkern.data.loader import Negatives, PairLoader
from sclkern.data.source import has_clips
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.distributed import merge
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
        train_loader: this rank's shuffled batches of ``train_source``.
        val_loader: this rank's batches of ``val_source``, in its order.
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


def open_data(config: PretrainConfig, device: torch.device, *, rank: int = 0, world_size: int = 1) -> TrainingData:
    """Open everything that ``config.data`` names.

    Args:
        config: configuration of the run.
        device: device that trains; on a GPU batches are padded to few sizes.
        rank: index of this process.
        world_size: number of processes that train.

    Returns:
        The data.

    Raises:
        UserError: data, tokenizer or a transform cannot be used, or do not fit the model or the batch size; or the
            processes have other data than one another.
    """
    data = config.data
    train_source = open_pairs(data.root, data.train_tables, data.train_split, format=data.format)
    val_source = open_pairs(data.root, data.val_tables, data.val_split, format=data.format)
    for name, source in (("train_tables", train_source), ("val_tables", val_source)):
        if has_clips(source):
            raise UserError(
                f"data.{name}: got clips, expected images, because pre-training does not take clips yet; convert one "
                "frame of each to an image"
            )
    _check_batch(config, world_size, train_source, val_source)
    tokenizer = CaptionTokenizer.from_pretrained(data.tokenizer)
    check_tokenizer(config, tokenizer)
    lengths = _caption_lengths(train_source, tokenizer, config.model.max_text_len)
    transform, val_transform = (
        build_transform(name, config.model.image_size, normalize=data.normalize == "host", decoding=data.decoding)
        for name in (data.transform, data.val_transform)
    )
    train_buckets = val_buckets = None
    train_batch, val_batch = config.run.batch_size, min(config.run.batch_size, val_source.num_pairs)
    if device.type == "cuda":
        # A GPU needs few shapes: each is compiled or captured once. A CPU would compute every token of the padding.
        val_lengths = _caption_lengths(val_source, tokenizer, config.model.max_text_len)
        train_buckets = Buckets.from_lengths(lengths, train_batch, config.model.max_text_len)
        val_buckets = Buckets.from_lengths(val_lengths, val_batch, config.model.max_text_len)

    def loader(source: PairSource, transform: Transform, **options: Any) -> PairLoader:
        return PairLoader(
            PairDataset(
                source,
                tokenizer,
                transform,
                max_text_len=config.model.max_text_len,
                min_size=config.model.patch_size,
                seed=config.run.seed,
            ),
            seed=config.run.seed,
            num_workers=data.num_workers,
            rank=rank,
            world_size=world_size,
            negatives=_negatives(config),
            # The published masks are drawn over the padded caption.
            pad_to_max=config.objectives.mlm_mask == "published",
            **options,
        )

    identity = {
        "training data": _identity_of(train_source),
        "held-out data": _identity_of(val_source),
        "tokenizer": _tokenizer_digest(tokenizer, train_source, config.model.max_text_len),
    }
    if world_size > 1:
        _check_same(merge({rank: identity}))
    return TrainingData(
        train_source=train_source,
        val_source=val_source,
        tokenizer=tokenizer,
        val_transform=val_transform,
        train_loader=loader(
            train_source,
            transform,
            batch_size=train_batch,
            accumulation=config.run.accumulation,
            buckets=train_buckets,
            shuffle=True,
        ),
        val_loader=loader(val_source, val_transform, batch_size=val_batch, buckets=val_buckets, shuffle=False),
        caption_lengths=lengths,
        identity=identity,
    )


def _negatives(config: PretrainConfig) -> Negatives | None:
    objectives = config.objectives
    if objectives.dataset_negatives:
        return "dataset"
    return "in_batch" if objectives.in_batch_negatives and not objectives.hard_negatives else None


def _check_same(identities: Mapping[int, dict[str, Any]]) -> None:
    """Raise a ``UserError`` on every rank if one has other data than the first; such as an old copy on one machine."""
    first, *others = sorted(identities)
    for rank in others:
        different = [name for name, value in identities[rank].items() if value != identities[first][name]]
        if different:
            raise UserError(
                f"data: rank {rank} has another {' and '.join(different)} than rank {first}, expected the same on "
                "every machine; copy the files again"
            )


def _check_batch(config: PretrainConfig, world_size: int, train: PairSource, val: PairSource) -> None:
    """Raise a ``UserError`` if a contrast would see a pair twice, or a negative image is no other row's."""
    run, rows = config.run, config.run.batch_size * world_size
    if max(rows, run.contrastive_batch or 0) > train.num_pairs:
        many = f" on {world_size} processes, {rows} pairs together" if world_size > 1 else ""
        name, got, remedy = "run.batch_size", f"{run.batch_size}{many}", "make it smaller and raise run.accumulation"
        if rows <= train.num_pairs:
            name, got, remedy = "run.contrastive_batch", f"{run.contrastive_batch}", "make run.accumulation smaller"
        raise UserError(
            f"{name}: got {got}, expected at most the {train.num_pairs} pairs of the training data, because no "
            f"contrast may see a pair twice; {remedy}, or use more data"
        )
    if not config.objectives.in_batch_negatives:
        return
    if run.batch_size < 2:
        raise UserError(
            f"run.batch_size: got {run.batch_size}, expected 2 or more, because a negative image is another row's; or "
            "use objectives.itm_negatives=dataset"
        )
    if val.num_pairs < 2:
        raise UserError(
            "data.val_tables: got 1 pair, expected 2 or more, because a negative image is another row's; hold out "
            "more pairs"
        )


def caption_widths(config: PretrainConfig) -> tuple[int, ...]:
    """Lengths that ``open_data`` pads the captions of a run to on a GPU, those of training and of held-out batches.

    Args:
        config: configuration of the run.

    Returns:
        Tokens, ascending; where the data cannot be read here a multiple of 16, one of 8, and the longest.
    """
    data, longest = config.data, config.model.max_text_len
    if config.objectives.mlm_mask == "published":
        return (longest,)
    widths: set[int] = set()
    try:
        tokenizer = CaptionTokenizer.from_pretrained(data.tokenizer)
        for tables, split in ((data.train_tables, data.train_split), (data.val_tables, data.val_split)):
            source = open_pairs(data.root, tables, split, format=data.format)
            rows = min(config.run.batch_size, source.num_pairs)
            widths |= set(Buckets.from_lengths(_caption_lengths(source, tokenizer, longest), rows, longest).widths)
    except UserError:
        widths = {min(width, longest) for width in (16, 24, longest)}
    return tuple(sorted(widths))


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


def _caption_lengths(source: PairSource, tokenizer: CaptionTokenizer, max_text_len: int) -> list[int]:
    """Tokens of about a thousand captions of a source."""
    _, mask = tokenizer([source.caption(pair) for pair in _sample(source)], max_text_len)
    return mask.sum(1).tolist()
