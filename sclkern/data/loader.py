"""Batches of (image, caption) pairs that depend on seed, step and place in the global batch alone."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sclkern.data.batches import Batch, BatchRequest, PairBatches
from sclkern.data.buckets import Buckets
from sclkern.data.dataset import PairDataset, SampleIndex
from sclkern.data.order import Order, PairOrder, WeightedOrder
from sclkern.data.source import PairSource, image_ids
from sclkern.data.workers import ignore_signals, iterate
from sclkern.errors import UserError
from sclkern.random import step_seed
from sclkern.step.masks import false_places, match_labels

Negatives = Literal["in_batch", "dataset"]


class PairLoader:
    """Batches of one rank from a ``PairDataset``, the same for any number of workers and after a resumption.

    A batch is a dict with ``image`` (B, 3, S, S), of the dtype that the dataset's transform gives (uint8 is to be
    normalised by ``normalize_images``), ``text_ids`` (B, L) int64, ``text_mask`` (B, L) bool, ``text_tokens`` (int: the
    tokens of all captions, rounded up with ``buckets``), ``pair`` (B,) int64, ``image_id`` (B,) int64 (equal ones are
    the same picture) and ``undecodable`` (dict of image names and reasons). The tensors are in host memory, pinned
    where there is a GPU.

    The global batch of a step has G = ``world_size * batch_size * accumulation`` pairs, the same ones for all factors
    of G (see ``PairOrder``): row j of micro-batch m of a rank stands at place ``(m * world_size + rank) * batch_size +
    j``. Batches of ``steps`` have ``place`` (B,) int64, too, and for image-text matching

    - ``match_labels`` (B,) int64: 1 where the row keeps its own image, 0 where it gets a negative one;
    - with ``negatives`` "dataset", ``false_image`` (N, 3, S, S): another picture of the source for each label
      0, in the order of the rows;
    - with "in_batch", ``false_place`` (N,) int64: for each label 0, the place in the global batch whose image it gets,
      which is one of another picture. Where the global batch has one picture only, it is the place plus G, and the
      image that of the next pair of the source with another picture.
      Where one of them is not in this batch, also ``false_image`` (N, 3, S, S): the images at these places, augmented
      as they are there.

    Args:
        dataset: The samples.
        batch_size: B, pairs per batch and rank.
        shuffle: Whether each epoch has a new random order; else the order of the source.
        seed: Seed of the order, the labels and the negatives, not negative.
        num_workers: Processes that decode; 0 decodes in this one.
        rank: Index of this process.
        world_size: Number of processes.
        accumulation: Batches per rank and step.
        negatives: Where image-text matching takes negative images from; None where it takes none, or chooses them
            within the batch.
        pad_to_max: Whether L is the dataset's ``max_text_len``; else L is the longest row of the batch.
        buckets: Sizes that L and ``text_tokens`` are rounded up to.
        weighted: Pairs and weight of each source that the pairs are of, one source after another, where they are mixed
            by weight (see ``WeightedOrder``); None is a plain order of all pairs.

    Raises:
        UserError: The data do not fill a batch, or have one image and ``negatives`` is "dataset".
        ValueError: ``batch_size`` or ``accumulation`` is not positive, or ``rank`` is not below ``world_size``.
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
        accumulation: int = 1,
        negatives: Negatives | None = None,
        pad_to_max: bool = False,
        buckets: Buckets | None = None,
        weighted: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        if batch_size < 1 or accumulation < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, accumulation {accumulation}, rank {rank}, world_size {world_size}: expected "
                "batch_size >= 1, accumulation >= 1 and 0 <= rank < world_size"
            )
        if batch_size > dataset.source.num_pairs:
            raise UserError(
                f"a batch of {batch_size} pairs is larger than the data, which have {dataset.source.num_pairs}; make "
                "the batch smaller or use more data"
            )
        if negatives is not None:
            _check_pictures(image_ids(dataset.source))
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.rank = rank
        self.world_size = world_size
        self.accumulation = accumulation
        self.negatives = negatives
        self.pad_to_max = pad_to_max
        self.buckets = buckets
        self.order: Order = self._order_of(self.global_batch)
        if weighted is not None:
            sizes, weights = zip(*weighted, strict=True)
            self.order = WeightedOrder(sizes, weights, self.global_batch, seed=seed)

    @property
    def batches(self) -> PairBatches:
        """The batch of each request."""
        return PairBatches(self.dataset, pad_to_max=self.pad_to_max, buckets=self.buckets)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many pairs come as the data have."""
        return self.order.steps_per_epoch

    @property
    def global_batch(self) -> int:
        """G, pairs of a step over all ranks and micro-batches."""
        return self.world_size * self.batch_size * self.accumulation

    def steps(self, start: int = 0) -> Generator[Batch]:
        """Iterate without end over the batches of this rank, ``accumulation`` for each step.

        Neither this nor ``epoch`` changes torch's global generators. Workers go on from one epoch to the next, so a run
        that reads a small table many times does not wait for new processes and their first batches each time.

        Args:
            start: First step; what comes before it is not decoded.

        Returns:
            The batches.

        Raises:
            UserError: while iterating, the dataset's errors.
            WorkerError: while iterating, a worker has died.
        """
        requests = (self.request_of_step(step, micro) for step in count(start) for micro in range(self.accumulation))
        return load_batches(self.batches, requests, self.num_workers)

    def batches_of_epoch(self) -> range:
        """The whole batches of an epoch that are dealt to this rank, by their number among those of all ranks."""
        return range(self.rank, self.dataset.source.num_pairs // self.batch_size, self.world_size)

    def epoch(self, epoch: int = 0) -> Generator[Batch]:
        """Iterate over this rank's batches of an epoch, which do not depend on who else has one.

        They have no ``place`` and no labels, and with ``negatives`` "dataset" a ``false_image`` for every row.

        Args:
            epoch: Number of the epoch.

        Returns:
            The batches of ``batches_of_epoch``.

        Raises:
            UserError: while iterating, the dataset's errors.
            WorkerError: while iterating, a worker has died.
        """
        order = self._order_of(self.batch_size)
        first, places = epoch * int(order.steps_per_epoch), torch.arange(self.batch_size)
        requests = (
            BatchRequest([SampleIndex(*at, self.negatives == "dataset") for at in order.at(first + batch, places)])
            for batch in self.batches_of_epoch()
        )
        return load_batches(self.batches, requests, self.num_workers)

    def _order_of(self, global_batch: int) -> PairOrder:
        return PairOrder(self.dataset.source.num_pairs, global_batch, seed=self.seed, shuffle=self.shuffle)

    def request_of_step(self, step: int, micro: int, own_step: int | None = None) -> BatchRequest:
        """What this rank's batch of a step is to hold.

        Args:
            step: Number of the step, which its seed follows from.
            micro: Number of the micro-batch.
            own_step: Number among the steps that have pairs of these data; None is ``step``.

        Returns:
            The request.
        """
        own_step = step if own_step is None else own_step
        first = (micro * self.world_size + self.rank) * self.batch_size
        place = torch.arange(first, first + self.batch_size)
        rows = [SampleIndex(*at) for at in self.order.at(own_step, place)]
        if self.negatives is None:
            return BatchRequest(rows, {"place": place.tolist()})
        seed = step_seed(self.seed, step)
        labels = match_labels(seed, place)
        keys = {"place": place.tolist(), "match_labels": labels.tolist()}
        if self.negatives == "dataset":
            wanted = (labels == 0).tolist()
            return BatchRequest(
                [index._replace(false_image=row) for index, row in zip(rows, wanted, strict=True)], keys
            )
        false, indices = self._other_pictures(own_step, place[labels == 0], seed)
        keys["false_place"] = false.tolist()
        if bool(((false >= place[0]) & (false <= place[-1])).all()):
            return BatchRequest(rows, keys)
        return BatchRequest(rows, keys, list(zip(keys["false_place"], indices, strict=True)))

    def _other_pictures(self, step: int, place: torch.Tensor, seed: int) -> tuple[torch.Tensor, list[SampleIndex]]:
        """The place of the false image of each place, and its sample: the first of another picture from the drawn place
        on. What they depend on is the same for every rank."""
        source, own = self.dataset.source, self.order.at(step, place)
        pictures = image_ids(source, source.pair_image[[pair for _, pair in own]])
        false = false_places(seed, place, self.global_batch)
        for _ in range(self.global_batch):
            found = self.order.at(step, false)
            same = torch.from_numpy(image_ids(source, source.pair_image[[pair for _, pair in found]]) == pictures)
            if not same.any():
                return false, [SampleIndex(*at) for at in found]
            false = torch.where(same, (false + 1) % self.global_batch, false)
        indices = [SampleIndex(epoch, _next_picture(source, pair)) for epoch, pair in own]
        return place + self.global_batch, indices


def load_batches(batches: Dataset[Batch | UserError], requests: Iterable[Any], num_workers: int) -> Generator[Batch]:
    """Batches that a data set makes of requests, in their order, for any number of workers.

    Args:
        batches: returns a ``UserError`` where it cannot make a batch.
        requests: its indices, one for each batch.
        num_workers: Processes that make batches; 0 makes them in this one.

    Yields:
        The batches, pinned where there is a GPU.

    Raises:
        UserError: while iterating, that of the data set.
        WorkerError: while iterating, a worker has died.
    """
    loader: DataLoader[Any] = DataLoader(
        batches,
        sampler=requests,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )
    with closing(iterate(loader)) as made:
        for batch in made:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _check_pictures(pictures: np.ndarray) -> None:
    if (pictures == pictures[:1]).all():
        images = "1 image" if len(pictures) == 1 else f"{len(pictures)} images of one picture"
        raise UserError(
            f"the data have {images}, expected 2 pictures or more for the negative images of ITM; use more data"
        )


def _next_picture(source: PairSource, pair: int) -> int:
    own = image_ids(source, source.pair_image[pair])
    following = ((pair + step) % source.num_pairs for step in range(1, source.num_pairs))
    return next(other for other in following if image_ids(source, source.pair_image[other]) != own)


def _as_it_is(batch: Any) -> Any:
    return batch
