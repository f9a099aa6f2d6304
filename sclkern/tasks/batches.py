"""Batches of a task that depend on seed, step and place in the global batch alone, and those of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sclkern.data.batches import Batch
from sclkern.data.images import Picture
from sclkern.data.loader import load_batches
from sclkern.data.order import PairOrder, data_seed
from sclkern.data.source import has_clips
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import apply_transform
from sclkern.data.undecodable import MAX_IN_A_ROW, none_decodable, read_clip, read_picture
from sclkern.errors import UserError
from sclkern.tasks.task import Sample, Task, TaskSource

# Texts are padded to a multiple of it: a GPU then has few shapes.
_LENGTHS = 8
# In place of a picture that cannot be decoded: CLIP's mean colour.
_GREY = (123, 117, 104)


@dataclass(frozen=True)
class TaskRequest:
    """What a batch is to hold.

    Attributes:
        rows: epoch and number of each sample.
        place: of each row in the global batch; None in an evaluation.
    """

    rows: list[tuple[int, int]]
    place: list[int] | None = None


class TaskBatches(Dataset[Batch | UserError]):
    """The batch of each ``TaskRequest``: a dict with ``image``, ``text_ids``, ``text_mask``, ``pair`` and what the task
    adds.

    ``image`` is (B, 3, S, S), of clips (B, F, 3, S, S), of samples with I > 1 pictures (B, I, 3, S, S). Of several
    texts a sample, the first text of each sample comes first, then the second of each. ``pair`` (B,) are the numbers of
    the samples, ``place`` (B,) their places. ``undecodable`` has reasons by name.

    A picture that cannot be decoded is skipped in training, with its sample, for the next sample that can be read. In
    an evaluation, whose every sample counts, a grey one takes its place.

    Args:
        task: of the samples.
        source: of the samples.
        tokenizer: of the model.
        transform: of pictures, as ``PairDataset`` takes it.
        max_text_len: longest row of token ids.
        min_size: least height and width of a picture in pixels.
        seed: of every draw.
        choose_frames: of clips: maps their number of frames to the indices that are read. A clip is (F, 3, S, S), every
            frame augmented alike.
    """

    def __init__(
        self,
        task: Task,
        source: TaskSource,
        tokenizer: CaptionTokenizer,
        transform: Callable[[Image.Image], Tensor],
        *,
        max_text_len: int,
        min_size: int,
        seed: int,
        choose_frames: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self.choose_frames = choose_frames
        self.task, self.source, self.tokenizer, self.transform = task, source, tokenizer, transform
        self._decode = getattr(transform, "decode", None)
        self.max_text_len, self.min_size, self.seed = max_text_len, min_size, seed

    def __getitem__(self, request: TaskRequest) -> Batch | UserError:
        try:
            return self._batch(request)
        except UserError as error:
            return error

    def _batch(self, request: TaskRequest) -> Batch:
        undecodable: dict[int, str] = {}
        read = [self._read(epoch, number, request.place is None, undecodable) for epoch, number in request.rows]
        samples = [sample for _, sample, _ in read]
        pictures = torch.stack([torch.stack(images) for _, _, images in read])
        texts = [sample.texts[place] for place in range(len(samples[0].texts)) for sample in samples]
        ids, mask = self._texts(texts)
        return {
            "image": pictures[:, 0] if pictures.shape[1] == 1 else pictures,
            "text_ids": ids,
            "text_mask": mask,
            "pair": torch.tensor([number for number, _, _ in read]),
            "undecodable": {self.source.image_name(image): reason for image, reason in undecodable.items()},
            **({} if request.place is None else {"place": torch.tensor(request.place)}),
            **self.task.collate(self.source, [sample.target for sample in samples]),
        }

    def _read(
        self, epoch: int, number: int, every: bool, undecodable: dict[int, str]
    ) -> tuple[int, Sample, list[Tensor]]:
        """A sample with its number and its pictures; the first from ``number`` on that can be read, unless ``every``
        sample counts."""
        failed: dict[int, str] = {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(data_seed(self.seed, epoch, number))
            for step in range(self.source.num_samples):
                at = (number + step) % self.source.num_samples
                sample = self.task.sample(self.source, at)
                if not every and any(image in failed for image in sample.images):
                    continue
                images = [self._picture(image, every, failed) for image in sample.images]
                undecodable |= failed
                if every or all(image is not None for image in images):
                    return at, sample, [apply_transform(self.transform, image) for image in images if image is not None]
                if len(failed) >= MAX_IN_A_ROW:
                    break
        raise none_decodable(self.source, failed)

    def _picture(self, image: int, every: bool, failed: dict[int, str]) -> Picture | list[Image.Image] | None:
        clips: Any = self.source
        try:
            if self.choose_frames is not None and has_clips(clips):
                return read_clip(clips, image, self.min_size, self.choose_frames)
            return read_picture(self.source, image, self.min_size, self._decode)
        except ValueError as error:
            failed[image] = str(error)
            if not every:
                return None
            grey = Image.new("RGB", (2 * self.min_size, 2 * self.min_size), _GREY)
            if self.choose_frames is not None and has_clips(clips):
                return [grey for _ in self.choose_frames(1)]
            return grey

    def _texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokenizer(texts, self.max_text_len)
        width = min(math.ceil(ids.shape[1] / _LENGTHS) * _LENGTHS, self.max_text_len)
        room = (0, width - ids.shape[1])
        return torch.nn.functional.pad(ids, room, value=self.tokenizer.pad_id), torch.nn.functional.pad(mask, room)


class TaskLoader:
    """One rank's batches of a ``TaskBatches``.

    Args:
        batches: makes them.
        batch_size: samples of a batch.
        seed: of the order.
        num_workers: processes that decode.
        rank: index of this process.
        world_size: number of processes.
        accumulation: batches of a step and process.
    """

    def __init__(
        self,
        batches: TaskBatches,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.batches, self.batch_size, self.num_workers = batches, batch_size, num_workers
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        global_batch = batch_size * world_size * accumulation
        self.order = PairOrder(batches.source.num_samples, global_batch, seed=seed)

    def steps(self, start: int = 0) -> Generator[Batch]:
        """This rank's shuffled batches without end, ``accumulation`` for each step, as those of ``PairLoader``.

        Args:
            start: first step.

        Returns:
            The batches.
        """
        requests = (self._request(step, micro) for step in count(start) for micro in range(self.accumulation))
        return load_batches(self.batches, requests, self.num_workers)

    def numbers(self) -> range:
        """The batches of all samples in their order, the last one short, that are dealt to this rank."""
        return range(self.rank, math.ceil(self.batches.source.num_samples / self.batch_size), self.world_size)

    def in_order(self) -> Generator[Batch]:
        """The batches of ``numbers``, which do not depend on the number of ranks."""
        size, total = self.batch_size, self.batches.source.num_samples
        requests = (
            TaskRequest([(0, sample) for sample in range(number * size, min((number + 1) * size, total))])
            for number in self.numbers()
        )
        return load_batches(self.batches, requests, self.num_workers)

    def _request(self, step: int, micro: int) -> TaskRequest:
        first = (micro * self.world_size + self.rank) * self.batch_size
        place = torch.arange(first, first + self.batch_size)
        return TaskRequest(self.order.at(step, place), place.tolist())
