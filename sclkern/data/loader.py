"""Batches of (image, caption) pairs that depend on seed, epoch and position alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain, count
from typing import Any

import torch
from torch.utils.data import DataLoader

from sclkern.data.buckets import Buckets
from sclkern.data.dataset import PairDataset, data_seed
from sclkern.data.workers import ignore_signals, iterate
from sclkern.errors import UserError

Batch = dict[str, Any]


class PairLoader:
    """Batches of a ``PairDataset``, the same for any number of workers and after a resumption.

    A batch is a dict with ``image`` (B, 3, S, S) float32, ``text_ids`` (B, L) int64, ``text_mask`` (B, L)
    bool, ``text_tokens`` (int: the tokens of all captions, rounded up with ``buckets``), ``pair`` (B,) int64,
    ``undecodable`` (dict of image names and reasons) and, if the dataset gives it, ``false_image`` (B, 3, S, S)
    float32. The tensors are in host memory, pinned where there is a GPU.

    An epoch's order depends on (``seed``, epoch) alone and is dealt out to the ranks one pair at a time.
    With ``drop_last`` every rank has the same number of whole batches; without it the ranks share all
    pairs, and may differ by one pair, hence by one batch.

    Args:
        dataset: The samples.
        batch_size: B, pairs per batch and rank.
        shuffle: Whether each epoch has a new random order; else the order of the source.
        seed: Seed of the order, not negative.
        num_workers: Processes that decode; 0 decodes in this one.
        rank: Index of this process.
        world_size: Number of processes.
        drop_last: Whether to leave out the pairs that do not fill a batch on every rank.
        pad_to_max: Whether L is the dataset's ``max_text_len``; else L is the longest row of the batch.
        buckets: Sizes that L and ``text_tokens`` are rounded up to.

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
        if drop_last and (needed := batch_size * world_size) > dataset.source.num_pairs:
            raise UserError(
                f"a batch of {batch_size} pairs on {world_size} rank(s) needs {needed} pairs, "
                f"the data have {dataset.source.num_pairs}; make the batch smaller or use more data"
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
        pairs = self.dataset.source.num_pairs
        if self.drop_last:
            return pairs // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, pairs, self.world_size)) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch]:
        """Iterate over an epoch without a change to torch's global generators.

        Args:
            epoch: Number of the epoch.
            start: First batch to give; the batches before it are not decoded.

        Returns:
            The batches.

        Raises:
            UserError: ``start`` is past the end of the epoch; while iterating, the dataset's errors.
            WorkerError: while iterating, a worker has died.
        """
        self._check_start(epoch, start)
        return self._load(self._indices(epoch, start))

    def endless(self, epoch: int, start: int = 0) -> Generator[Batch]:
        """Iterate over an epoch and all that follow, without end.

        Workers continue from one epoch to the next, so a run that reads a small table many times does not wait for new
        processes and their first batches each time.

        Args:
            epoch: Number of the first epoch.
            start: First batch of the first epoch to give.

        Returns:
            The batches.

        Raises:
            UserError: As ``epoch``.
        """
        self._check_start(epoch, start)
        following = (self._indices(later) for later in count(epoch + 1))
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

    def _load(self, indices: Iterator[list[tuple[int, int]]]) -> Generator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=indices,
            collate_fn=self._collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            worker_init_fn=ignore_signals,
        )
        with closing(iterate(loader)) as batches:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch

    def _order(self, epoch: int) -> torch.Tensor:
        pairs = self.dataset.source.num_pairs
        if self.shuffle:
            order = torch.randperm(pairs, generator=torch.Generator().manual_seed(data_seed(self.seed, epoch)))
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
            "undecodable": {name: why for sample in samples for name, why in sample["undecodable"].items()},
        }
        if self.dataset.false_image:
            batch["false_image"] = torch.stack([sample["false_image"] for sample in samples])
        return batch
