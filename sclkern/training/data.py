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

from sclkern.data import PairSource
from sclkern.data.buckets import Buckets
from sclkern.data.dataset import PairDataset
from sclkern.data.digest import digest
from sclkern.data.frames import FrameSampling
from sclkern.data.loader import Negatives, PairLoader
from sclkern.data.mixture import Kind, KindSchedule, MixedLoader, kind_of
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.distributed import merge
from sclkern.errors import UserError
from sclkern.training.config import PretrainConfig
from sclkern.training.sources import Mixed, check_frames, open_sources

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes:
        train_sources: pairs to train on, of images and of clips.
        val_sources: held-out pairs, of images and of clips.
        tokenizer: tokenizer whose vocabulary and special ids are the model's.
        val_transform: image transform of validation and retrieval.
        train_loader: this rank's batches of ``train_sources``, shuffled.
        val_loaders: this rank's batches of each of ``val_sources``, in its order.
        caption_lengths: tokens of about a thousand training captions.
        identity: what a resumed run must find again: numbers of pairs and digests.
    """

    train_sources: dict[Kind, PairSource]
    val_sources: dict[Kind, PairSource]
    tokenizer: CaptionTokenizer
    val_transform: Transform
    train_loader: PairLoader | MixedLoader
    val_loaders: dict[Kind, PairLoader]
    caption_lengths: list[int]
    identity: dict[str, Any]

    @property
    def num_train_images(self) -> int:
        """Images and clips to train on."""
        return sum(source.num_images for source in self.train_sources.values())

    @property
    def train_source(self) -> PairSource:
        """The images to train on, or the clips where there are no images."""
        return next(iter(self.train_sources.values()))

    @property
    def val_source(self) -> PairSource:
        """The held-out images, or the clips where there are no images."""
        return next(iter(self.val_sources.values()))

    @property
    def val_loader(self) -> PairLoader:
        """This rank's batches of ``val_source``."""
        return next(iter(self.val_loaders.values()))

    @property
    def shares(self) -> dict[Kind, float]:
        """Share of the steps that each kind has."""
        loader = self.train_loader
        return loader.schedule.shares if isinstance(loader, MixedLoader) else dict.fromkeys(self.train_sources, 1.0)

    def frame_shares(self, config: PretrainConfig) -> dict[int, float]:
        """Share of the steps whose samples have so many frames, images one."""
        return {config.data.num_frames if kind == "clips" else 1: share for kind, share in self.shares.items()}


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
    data, length = config.data, config.model.max_text_len
    train, val = open_sources(data, training=True), open_sources(data, training=False)
    for held_out in val.values():
        for mixed in train.values():
            _check_batch(config, world_size, mixed, held_out.source)
    check_frames(config, {**train, **val})
    tokenizer = CaptionTokenizer.from_pretrained(data.tokenizer)
    check_tokenizer(config, tokenizer)
    # A GPU needs few shapes: each is compiled or captured once. A CPU would compute every token of the padding.
    bucketed = device.type == "cuda"
    transform, val_transform = (
        build_transform(name, config.model.image_size, normalize=data.normalize == "host", decoding=data.decoding)
        for name in (data.transform, data.val_transform)
    )
    lengths = {kind: _caption_lengths(mixed.source, tokenizer, length) for kind, mixed in train.items()}

    def loader(source: PairSource, transform: Transform, lengths: list[int], rows: int, **options: Any) -> PairLoader:
        clips = kind_of(source) == "clips"
        method = data.frame_sampling if options["shuffle"] else data.val_frame_sampling
        return PairLoader(
            PairDataset(
                source,
                tokenizer,
                transform,
                max_text_len=length,
                min_size=config.model.patch_size,
                seed=config.run.seed,
                choose_frames=FrameSampling(data.num_frames, method) if clips else None,
            ),
            batch_size=rows,
            seed=config.run.seed,
            num_workers=data.num_workers,
            rank=rank,
            world_size=world_size,
            negatives=_negatives(config),
            # The published masks are drawn over the padded caption.
            pad_to_max=config.objectives.mlm_mask == "published",
            buckets=Buckets.from_lengths(lengths, rows, length) if bucketed else None,
            **options,
        )

    train_sources = {kind: mixed.source for kind, mixed in train.items()}
    val_sources = {kind: mixed.source for kind, mixed in val.items()}
    identity = {
        "training data": _identity_of(train_sources),
        "held-out data": _identity_of(val_sources),
        "tokenizer": _tokenizer_digest(tokenizer, next(iter(train_sources.values())), length),
    }
    if world_size > 1:
        _check_same(merge({rank: identity}))
    train_loaders = {
        kind: loader(
            mixed.source,
            transform,
            lengths[kind],
            config.run.batch_size,
            accumulation=config.run.accumulation,
            shuffle=True,
            weighted=mixed.weighted,
        )
        for kind, mixed in train.items()
    }
    train_loader: PairLoader | MixedLoader = next(iter(train_loaders.values()))
    if len(train) > 1:
        schedule = KindSchedule({kind: mixed.weight for kind, mixed in train.items()}, config.run.seed)
        train_loader = MixedLoader(train_loaders, schedule)
    val_loaders = {
        kind: loader(
            source,
            val_transform,
            _caption_lengths(source, tokenizer, length) if bucketed else [],
            min(config.run.batch_size, source.num_pairs),
            shuffle=False,
        )
        for kind, source in val_sources.items()
    }
    return TrainingData(
        train_sources=train_sources,
        val_sources=val_sources,
        tokenizer=tokenizer,
        val_transform=val_transform,
        train_loader=train_loader,
        val_loaders=val_loaders,
        caption_lengths=[length for of_kind in lengths.values() for length in of_kind],
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


def _check_batch(config: PretrainConfig, world_size: int, mixed: Mixed, val: PairSource) -> None:
    """Raise a ``UserError`` if a contrast would see a pair twice, or a negative image is no other row's."""
    run, rows, train = config.run, config.run.batch_size * world_size, mixed.source
    for pairs, weight in mixed.weighted or ():
        share = weight / mixed.weight * max(rows, run.contrastive_batch or 0)
        if share > pairs:
            raise UserError(
                f"data.sources: got weight {weight:g} for a source of {pairs} pairs, of which a contrast would see "
                f"{share:.0f}, and some of them twice; make its weight or the batch smaller, or use more data"
            )
    if max(rows, run.contrastive_batch or 0) > train.num_pairs:
        many = f" on {world_size} processes, {rows} pairs together" if world_size > 1 else ""
        name, got, remedy = "run.batch_size", f"{run.batch_size}{many}", "make it smaller and raise run.accumulation"
        if rows <= train.num_pairs:
            name, got, remedy = "run.contrastive_batch", f"{run.contrastive_batch}", "make run.accumulation smaller"
        many_pairs = f"{train.num_pairs} clip-caption" if kind_of(train) == "clips" else f"{train.num_pairs}"
        raise UserError(
            f"{name}: got {got}, expected at most the {many_pairs} pairs of the training data, because no "
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
        for training in (True, False):
            for mixed in open_sources(data, training=training).values():
                rows = min(config.run.batch_size, mixed.source.num_pairs)
                lengths = _caption_lengths(mixed.source, tokenizer, longest)
                widths |= set(Buckets.from_lengths(lengths, rows, longest).widths)
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


def _identity_of(sources: Mapping[Kind, PairSource]) -> dict[str, Any]:
    # Readers may count with numpy, whose numbers and texts no checkpoint could be read with.
    pairs, images = (sum(int(getattr(one, name)) for one in sources.values()) for name in ("num_pairs", "num_images"))
    return {"pairs": pairs, "images": images, "digest": " ".join(str(digest(one)) for one in sources.values())}


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
