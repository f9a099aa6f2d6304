"""Samples of a source: an image, decoded and transformed, with a caption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from sclkern.data.images import Picture
from sclkern.data.order import data_seed
from sclkern.data.source import PairSource, has_clips, image_ids
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import apply_transform
from sclkern.data.undecodable import MAX_IN_A_ROW, none_decodable, read_clip, read_picture

# A picture, or the frames of a clip.
Decoded = Picture | list[Image.Image]


class SampleIndex(NamedTuple):
    """Index of a ``PairDataset``.

    Attributes:
        epoch: of the pass over the data, which changes the augmentation.
        pair: of the source.
        false_image: whether a negative image is wanted, too.
    """

    epoch: int
    pair: int
    false_image: bool = False


class PairDataset(Dataset[dict[str, Any]]):
    """Decoded and transformed samples; each depends on (``seed``, epoch, pair) alone.

    Indices are ``SampleIndex``. A sample is a dict with ``image`` (3, S, S), ``caption`` (str), ``pair`` (int),
    ``image_id`` (int, of ``sclkern.data.image_ids``), ``undecodable`` (dict of image names and reasons, see below) and,
    where ``false_image`` of the index is true, ``false_image`` (3, S, S): an image of the source of another picture.

    An image that cannot be read or decoded, or is smaller than a patch, is skipped: the next pair of another image
    takes its place, and the name of the skipped image goes into ``undecodable``, with the reason.

    Args:
        source: The pairs.
        tokenizer: Tokenizes the captions of a batch.
        transform: Maps a PIL image (RGB) to a tensor (3, S, S), uint8 or normalised float32; random only through
            torch's default generator. If it has a method ``decode``, that of ``ImageTransform``, it gets what that
            makes of the encoded file.
        max_text_len: Longest row of token ids, special tokens included.
        min_size: Least height and width of an image in pixels: the side of a patch.
        seed: Seed of all random draws, not negative.
        choose_frames: For a source of clips: maps the number of frames of a clip to the ascending indices of those that
            are read, random only as ``transform``. ``image`` is then (F, 3, S, S), every frame augmented alike.

    Raises:
        UserError: at access, none of many images can be decoded.
    """

    def __init__(
        self,
        source: PairSource,
        tokenizer: CaptionTokenizer,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        max_text_len: int,
        min_size: int,
        seed: int,
        choose_frames: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.transform = transform
        self._decode = getattr(transform, "decode", None)
        self.max_text_len = max_text_len
        self.min_size = min_size
        self.seed = seed
        self.choose_frames = choose_frames

    def __getitem__(self, index: SampleIndex) -> dict[str, Any]:
        epoch, pair, false_image = index
        source = self.source
        undecodable: dict[int, str] = {}
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would also reset the generators of the GPUs, which are not forked.
            torch.default_generator.manual_seed(data_seed(self.seed, epoch, pair))
            following = (int(source.pair_image[(pair + step) % source.num_pairs]) for step in range(source.num_pairs))
            step, decoded = self._first_decodable(following, undecodable)
            pair = (pair + step) % source.num_pairs
            image = int(source.pair_image[pair])
            picture = int(image_ids(source, image))
            sample = {
                "image": apply_transform(self.transform, decoded),
                "caption": source.caption(pair),
                "pair": pair,
                "image_id": picture,
            }
            if false_image:
                count = source.num_images - 1
                drawn = int(torch.randint(count, ()))
                others = ((image + 1 + (drawn + step) % count) % source.num_images for step in range(count))
                different = (other for other in others if int(image_ids(source, other)) != picture)
                _, decoded = self._first_decodable(different, undecodable)
                sample["false_image"] = apply_transform(self.transform, decoded)
        sample["undecodable"] = {source.image_name(image): reason for image, reason in undecodable.items()}
        return sample

    def _read(self, image: int) -> Decoded:
        if self.choose_frames is not None and has_clips(self.source):
            return read_clip(self.source, image, self.min_size, self.choose_frames)
        return read_picture(self.source, image, self.min_size, self._decode)

    def _first_decodable(self, images: Iterable[int], undecodable: dict[int, str]) -> tuple[int, Decoded]:
        """Position and content of the first of these images that can be decoded; adds the others to ``undecodable``."""
        for position, image in enumerate(images):
            if image in undecodable:
                continue
            try:
                return position, self._read(image)
            except ValueError as error:
                undecodable[image] = str(error)
                if len(undecodable) >= MAX_IN_A_ROW:
                    break
        raise none_decodable(self.source, undecodable)
