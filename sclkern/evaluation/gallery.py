"""What retrieval ranks: images and texts, each encoded once, in batches that ranks deal out to one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from sclkern.data import PairSource
from sclkern.data.source import has_clips
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import apply_transform, normalize_images
from sclkern.data.undecodable import UndecodableImages, read_clip, read_picture
from sclkern.distributed import gather_parts, merge
from sclkern.errors import UserError
from sclkern.evaluation.matching import EncodedTexts
from sclkern.evaluation.room import Room
from sclkern.models import SCLNetwork, VisionFeatures
from sclkern.models.captions import first_token, tokens_first

K = TypeVar("K")
V = TypeVar("V")
Transform = Callable[[Image.Image], Tensor]
ChooseFrames = Callable[[int], Sequence[int]]
# Rows of a product of features, the same on every rank: another size rounds in other places.
_TILE = 1024


@dataclass(frozen=True)
class Batches:
    """Work in batches, which ranks deal out to one another whole: so each batch gives the same numbers for any number
    of ranks.

    Attributes:
        between: called before each batch.
        rank: of this process.
        ranks: number of processes.
    """

    between: Callable[[], object]
    rank: int = 0
    ranks: int = 1

    def own(self, count: int) -> Iterator[int]:
        """Numbers of this rank's batches of ``count``."""
        for number in range(self.rank, count, self.ranks):
            self.between()
            yield number

    def joined(self, own: dict[int, Tensor]) -> Tensor:
        """Rows of the batches of all ranks, in order, from those of this rank by number."""
        return torch.cat([own[number] for number in sorted(own)]) if self.ranks == 1 else gather_parts(own)

    def merged(self, own: dict[K, V]) -> dict[K, V]:
        """What all ranks have found."""
        return own if self.ranks == 1 else merge(own)


@dataclass(frozen=True)
class EncodedImages:
    """Images of all ranks, and the tokens of this rank's.

    Attributes:
        indices: (N,) of the source, of the images that can be decoded.
        batches: rows [start, stop) of each batch, by its number.
        features: (N, C) float32, projected and normalised; None without the head of the contrast.
        num_frames: F.
        store: (rows, F + F * P, D) tokens of this rank's images; None where none are kept.
        places: rows of ``store`` of each batch of this rank.
    """

    indices: np.ndarray
    batches: dict[int, tuple[int, int]]
    features: Tensor | None
    num_frames: int
    store: Tensor | None
    places: dict[int, slice]

    def of_batch(self, number: int, device: torch.device) -> VisionFeatures:
        """Tokens of one of this rank's batches, on a device."""
        if self.store is None:
            raise RuntimeError("the tokens of images were not kept")
        return VisionFeatures(self.store[self.places[number]].to(device), self.num_frames)


def encode_images(
    model: SCLNetwork,
    source: PairSource,
    transform: Transform,
    images: Sequence[int],
    batch_size: int,
    batches: Batches,
    undecodable: UndecodableImages,
    room: Room,
    *,
    keep_tokens: bool,
    choose_frames: ChooseFrames | None = None,
) -> EncodedImages:
    """Encode images or clips.

    Args:
        model: in eval mode.
        source: of the images.
        transform: as in ``evaluate_retrieval``.
        images: image indices.
        batch_size: images at a time.
        batches: of this process.
        undecodable: counts those that are left out.
        room: for tokens.
        keep_tokens: whether tokens are kept, for the fusion encoder.
        choose_frames: of clips; None takes their middle frames.

    Returns:
        The images.

    Raises:
        UserError: too many images are undecodable, or all.
    """
    device = next(model.parameters()).device
    found: dict[int, list[int]] = {}
    left_out: dict[str, str] = {}
    features: dict[int, Tensor] = {}
    places: dict[int, slice] = {}
    store, stored, frames = None, 0, 1
    numbers = math.ceil(len(images) / batch_size)
    most = batch_size * len(range(batches.rank, numbers, batches.ranks))
    for number in batches.own(numbers):
        pixels = []
        for image in images[number * batch_size : (number + 1) * batch_size]:
            batches.between()
            try:
                pixels.append(_read(model, source, image, transform, choose_frames))
            except ValueError as error:
                left_out[source.image_name(image)] = str(error)
                continue
            found.setdefault(number, []).append(image)
        if not pixels:
            continue
        encoded = model.encode_image(normalize_images(torch.stack(pixels).to(device)))
        frames = encoded.num_frames
        if "itc" in model.config.heads:
            features[number] = _projected(model.project_image, encoded.cls, model)
        if keep_tokens:
            if store is None:
                store = room.tensor((min(most, len(images)), *encoded.tokens.shape[1:]), encoded.tokens.dtype)
            places[number] = slice(stored, stored + len(pixels))
            store[places[number]].copy_(encoded.tokens)
            stored += len(pixels)
    found = dict(sorted(batches.merged(found).items()))
    undecodable.add(batches.merged(left_out))
    if not found:
        raise UserError(
            f"none of {len(images)} images to retrieve from can be decoded, expected one or more; see the log"
        )
    stops = np.cumsum([len(of_batch) for of_batch in found.values()]).tolist()
    return EncodedImages(
        np.concatenate([*found.values()]),
        {number: (stop - len(found[number]), stop) for number, stop in zip(found, stops, strict=True)},
        batches.joined(features) if "itc" in model.config.heads else None,
        frames,
        store,
        places,
    )


def _read(
    model: SCLNetwork, source: PairSource, image: int, transform: Transform, choose_frames: ChooseFrames | None
) -> Tensor:
    if choose_frames is None or not has_clips(source):
        decode = getattr(transform, "decode", None)
        return apply_transform(transform, read_picture(source, image, model.config.patch_size, decode))
    return apply_transform(transform, read_clip(source, image, model.config.patch_size, choose_frames))


def _projected(project: Callable[[Tensor], Tensor], cls: Tensor, model: SCLNetwork) -> Tensor:
    """What the contrast compares, in float32 whatever the precision."""
    with torch.autocast(cls.device.type, enabled=False):
        return normalize(project(cls.to(model.modality.weight.dtype)).float(), dim=-1)


def encode_texts(
    model: SCLNetwork, tokenizer: CaptionTokenizer, captions: Sequence[str], batch_size: int, batches: Batches
) -> tuple[EncodedTexts, Tensor | None]:
    """Encode captions, in batches of similar length.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        captions: C texts.
        batch_size: captions at a time.
        batches: of this process.

    Returns:
        Their tokens, shortest text first, which ``starts`` says in the order of ``captions``; and (C, projection_dim)
        float32, projected and normalised, None without the head of the contrast.
    """
    device = next(model.parameters()).device
    ids, mask = tokens_first(*(x.to(device) for x in _with_bool_mask(*tokenizer(captions, model.config.max_text_len))))
    lengths = mask.sum(1).cpu().numpy()
    order = np.argsort(lengths, kind="stable")
    tokens: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}
    for number in batches.own(math.ceil(len(captions) / batch_size)):
        rows = order[number * batch_size : (number + 1) * batch_size]
        longest, chosen = int(lengths[rows[-1]]), torch.from_numpy(rows).to(device)
        own_mask = mask[chosen, :longest]
        encoded = model.encode_text(ids[chosen, :longest], own_mask)
        tokens[number] = encoded[own_mask]
        if "itc" in model.config.heads:
            features[number] = _projected(model.text_projection, first_token(encoded, own_mask), model)
    ends = np.cumsum(lengths[order])
    starts, stops = np.empty_like(ends), np.empty_like(ends)
    starts[order], stops[order] = ends - lengths[order], ends
    projected = None
    if "itc" in model.config.heads:
        projected = batches.joined(features)[torch.from_numpy(np.argsort(order, kind="stable")).to(device)]
    return EncodedTexts(batches.joined(tokens), starts, stops - starts), projected


def _with_bool_mask(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return ids, mask.bool()


def similarities(image: Tensor, text: Tensor, room: Room) -> Tensor:
    """Cosine of all pairs, in tiles.

    Args:
        image: (N, C) normalised.
        text: (M, C) normalised.
        room: for the result.

    Returns:
        (N, M) float32.
    """
    # Every rank computes all of it, because it is little work; the products have the same sizes everywhere.
    out = room.tensor((len(image), len(text)), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        for first in range(0, len(image), _TILE):
            out[first : first + _TILE].copy_(image[first : first + _TILE] @ text.T)
    return out


class Relevance:
    """Which texts are right answers to which images.

    Args:
        image: (R,) rows of images.
        text: (R,) rows of texts, each pair once.
        images: N.
        texts: C.
    """

    def __init__(self, image: np.ndarray, text: np.ndarray, images: int, texts: int) -> None:
        self.sizes = images, texts
        self._sides = []
        for queries, answers, count in ((image, text, images), (text, image, texts)):
            order = np.argsort(queries, kind="stable")
            ends = np.cumsum(np.bincount(queries, minlength=count))
            self._sides.append((queries[order], answers[order], np.concatenate([[0], ends])))

    def counts(self, by_image: bool) -> np.ndarray:
        """Right answers of each query."""
        return np.diff(self._sides[0 if by_image else 1][2])

    def tile(self, rows: slice, by_image: bool, device: torch.device) -> Tensor:
        """Right answers of some queries among all candidates.

        Args:
            rows: [start, stop) of the queries.
            by_image: whether images are the queries.
            device: of the result.

        Returns:
            (queries, candidates) bool.
        """
        queries, answers, starts = self._sides[0 if by_image else 1]
        part = slice(starts[rows.start], starts[rows.stop])
        found = torch.zeros((rows.stop - rows.start, self.sizes[1 if by_image else 0]), dtype=torch.bool)
        found[torch.from_numpy(queries[part] - rows.start), torch.from_numpy(answers[part])] = True
        return found.to(device)
