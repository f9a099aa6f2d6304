"""Batches of (picture, caption) pairs that depend on seed, epoch and position alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sclkern.data.arrow import PairTable
from sclkern.data.buckets import Buckets
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import decode_image
from sclkern.errors import UserError

Batch = dict[str, Any]

# A sample meets so many broken pictures one after the other only where a whole file is broken.
_BROKEN_IN_A_ROW = 100

_log = logging.getLogger("sclkern.data")


class PairDataset(Dataset[dict[str, Any]]):
    """Decoded and transformed samples; each depends on (``seed``, epoch, pair) alone.

    Indices are tuples (epoch, pair). A sample is a dict with ``image`` (3, S, S) float32, ``caption`` (str),
    ``pair`` (int), ``undecodable`` (list of names of pictures, see below) and, with ``false_image``, the key
    ``false_image`` (3, S, S) float32: another picture of the table, never the same one.

    A picture that cannot be decoded is skipped: the next pair of another picture takes its place, and the
    name of the bad one goes into ``undecodable``.

    Args:
        table: The pairs.
        tokenizer: Tokenizes the captions of a batch.
        transform: From a PIL picture (RGB) to a float32 tensor (3, S, S), random only through torch's default
            generator.
        max_text_len: Longest row of ids, special tokens included.
        min_size: Least height and width of a picture in pixels: the side of a patch.
        seed: Seed of all random draws, not negative.
        false_image: Also give another picture (a negative for image-text matching).

    Raises:
        UserError: A false image is asked of a table with one picture; at access, a picture is smaller than
            ``min_size``, or none of many can be decoded.
    """

    def __init__(
        self,
        table: PairTable,
        tokenizer: CaptionTokenizer,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        max_text_len: int,
        min_size: int,
        seed: int,
        false_image: bool = False,
    ) -> None:
        if false_image and table.num_images < 2:
            raise UserError("the table has 1 picture, expected 2 or more for false images; use more data")
        self.table = table
        self.tokenizer = tokenizer
        self.transform = transform
        self.max_text_len = max_text_len
        self.min_size = min_size
        self.seed = seed
        self.false_image = false_image

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, pair = index
        table = self.table
        undecodable: dict[int, None] = {}
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would also reset the generators of the GPUs, which are not forked.
            torch.default_generator.manual_seed(_mix(self.seed, epoch, pair))
            following = (int(table.pair_image[(pair + step) % table.num_pairs]) for step in range(table.num_pairs))
            step, picture = self._first_decodable(following, undecodable)
            pair = (pair + step) % table.num_pairs
            sample = {"image": self.transform(picture), "caption": table.caption(pair), "pair": pair}
            if self.false_image:
                image = int(table.pair_image[pair])
                count = table.num_images - 1
                drawn = int(torch.randint(count, ()))
                others = ((image + 1 + (drawn + step) % count) % table.num_images for step in range(count))
                _, picture = self._first_decodable(others, undecodable)
                sample["false_image"] = self.transform(picture)
        sample["undecodable"] = [table.image_name(image) for image in undecodable]
        return sample

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[dict[str, Any]] | UserError:
        """The samples of a batch. A user's mistake is returned, as DataLoader would bury its one line."""
        try:
            return [self[index] for index in indices]
        except UserError as error:
            return error

    def _first_decodable(self, images: Iterable[int], undecodable: dict[int, None]) -> tuple[int, Image.Image]:
        reason = ""
        for step, image in enumerate(images):
            if image in undecodable:
                continue
            try:
                picture = decode_image(self.table.image_bytes(image))
            except ValueError as error:
                reason = reason or " ".join(str(error).split())
                undecodable[image] = None
                if len(undecodable) >= _BROKEN_IN_A_ROW:
                    break
                continue
            if min(picture.size) < self.min_size:
                raise UserError(
                    f"{self.table.image_name(image)}: the picture is {picture.width} x {picture.height} "
                    f"pixels, smaller than a patch ({self.min_size}); remove or enlarge it"
                )
            return step, picture
        raise UserError(
            f"{len(undecodable)} pictures in a row cannot be decoded, the first is "
            f"{self.table.image_name(next(iter(undecodable)))} ({reason}), expected JPEG, PNG or another "
            "format of Pillow; write the table again"
        )


class PairLoader:
    """Batches of a :class:`PairDataset`, the same for any number of workers and after a resumption.

    A batch is a dict with ``image`` (B, 3, S, S) float32, ``text_ids`` (B, L) int64, ``text_mask`` (B, L)
    bool, ``text_tokens`` (int: room for the tokens of the captions, exact without ``buckets``), ``pair`` (B,) int64,
    ``undecodable`` (list of str) and, if the dataset gives it, ``false_image`` (B, 3, S, S) float32. They are in host
    memory, pinned where there is a GPU.

    An epoch's order depends on (``seed``, epoch) alone and is dealt out to the ranks one pair at a time.
    With ``drop_last`` every rank has the same number of whole batches; without it the ranks share out all
    pairs, and may differ by one pair, hence by one batch.

    Args:
        dataset: The samples.
        batch_size: B, pairs per batch and rank.
        shuffle: A new random order each epoch, or the order of the table.
        seed: Seed of the order, not negative.
        num_workers: Processes that decode; 0 decodes in this one.
        rank, world_size: This process and the number of them.
        drop_last: Leave out the pairs that do not fill a batch on every rank.
        pad_to_max: L is the dataset's ``max_text_len``; else the longest row of the batch.
        buckets: L and ``text_tokens`` are rounded up to one of these sizes each.

    Raises:
        UserError: With ``drop_last``, the data do not fill one batch on every rank.
        ValueError: ``batch_size`` or ``world_size`` is not positive, or ``rank`` is not below ``world_size``.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        pad_to_max: bool = False,
        buckets: Buckets | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank}, world_size {world_size}: "
                "expected batch_size >= 1 and 0 <= rank < world_size"
            )
        if drop_last and (needed := batch_size * world_size) > dataset.table.num_pairs:
            raise UserError(
                f"a batch of {batch_size} pairs on {world_size} rank(s) needs {needed} pairs, "
                f"the data have {dataset.table.num_pairs}; make the batch smaller or use more data"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.pad_to_max = pad_to_max
        self.buckets = buckets

    def __len__(self) -> int:
        """Batches per epoch of this rank."""
        pairs = self.dataset.table.num_pairs
        if self.drop_last:
            return pairs // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, pairs, self.world_size)) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on; those before it are not decoded.

        The state of torch's global generators is left as it is.

        Raises:
            UserError: ``start`` is past the end of the epoch; while iterating, the dataset's errors.
        """
        self._check_start(epoch, start)
        return self._load(self._indices(epoch, start))

    def endless(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As :meth:`epoch`, then the batches of the epochs that follow, without end.

        Workers go on from one epoch to the next: what reads a small table many times does not wait for new processes
        and their first batches each time.

        Raises:
            UserError: As :meth:`epoch`.
        """
        self._check_start(epoch, start)
        following = (self._indices(each) for each in count(epoch + 1))
        return self._load(chain(self._indices(epoch, start), chain.from_iterable(following)))

    def _check_start(self, epoch: int, start: int) -> None:
        if not 0 <= start <= len(self):
            raise UserError(
                f"epoch {epoch} has {len(self)} batches, it cannot start at batch {start}; "
                "resume with the data, batch size and number of ranks of the first run"
            )

    def _indices(self, epoch: int, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        order = self._order(epoch)
        for first in range(start * self.batch_size, len(order), self.batch_size):
            yield [(epoch, pair) for pair in order[first : first + self.batch_size].tolist()]

    def _load(self, indices: Iterator[list[tuple[int, int]]]) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=indices,
            collate_fn=self._collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _order(self, epoch: int) -> torch.Tensor:
        pairs = self.dataset.table.num_pairs
        if self.shuffle:
            order = torch.randperm(pairs, generator=torch.Generator().manual_seed(_mix(self.seed, epoch)))
        else:
            order = torch.arange(pairs)
        if self.drop_last:
            order = order[: len(self) * self.batch_size * self.world_size]
        return order[self.rank :: self.world_size]

    def _collate(self, samples: list[dict[str, Any]] | UserError) -> Batch | UserError:
        if isinstance(samples, UserError):
            return samples
        length = self.dataset.max_text_len
        captions = [sample["caption"] for sample in samples]
        try:
            ids, mask = self.dataset.tokenizer(captions, length, pad_to=length if self.pad_to_max else None)
        except UserError as error:
            return error
        tokens = int(mask.sum())
        if self.buckets is not None:
            width, tokens = self.buckets.fit(ids.shape[1], tokens)
            ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=self.dataset.tokenizer.pad_id)
            mask = torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
        batch: Batch = {
            "image": torch.stack([sample["image"] for sample in samples]),
            "text_ids": ids,
            "text_mask": mask,
            "text_tokens": tokens,
            "pair": torch.tensor([sample["pair"] for sample in samples]),
            "undecodable": [name for sample in samples for name in sample["undecodable"]],
        }
        if self.dataset.false_image:
            batch["false_image"] = torch.stack([sample["false_image"] for sample in samples])
        return batch


class BadPictures:
    """Counts the distinct pictures that cannot be decoded, and logs each once to ``sclkern.data``.

    Args:
        num_images: Number of pictures of the table.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._names: dict[str, None] = {}

    def __len__(self) -> int:
        """Distinct bad pictures so far."""
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Take the ``undecodable`` names of a batch.

        Raises:
            UserError: More than 1 % of the pictures are bad.
        """
        for name in names:
            if name not in self._names:
                self._names[name] = None
                _log.warning("skipped a picture that cannot be decoded: %s", name)
        if 100 * len(self) > self.num_images:
            raise UserError(
                f"{len(self)} of {self.num_images} pictures cannot be decoded, expected 1 % at most; "
                f"the first is {next(iter(self._names))}; repair them or remove them from the table"
            )

    def state_dict(self) -> dict[str, list[str]]:
        """The names, in the order they were met."""
        return {"names": list(self._names)}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Take over the names of :meth:`state_dict`, without logging them again."""
        self._names = dict.fromkeys(state["names"])


def _mix(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
