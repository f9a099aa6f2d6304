"""A batch of samples, put together by the process that decodes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from sclkern.data.buckets import Buckets
from sclkern.data.dataset import PairDataset, SampleIndex
from sclkern.errors import UserError

Batch = dict[str, Any]


@dataclass(frozen=True)
class BatchRequest:
    """What a batch is to hold, in plain numbers, which are sent to a worker.

    Attributes:
        rows: the samples.
        keys: further entries of the batch, int64.
        false_rows: for each negative image, the place of its pair in the global batch and its index, where some are not
            among the rows; else empty.
    """

    rows: Sequence[SampleIndex]
    keys: dict[str, list[int]] = field(default_factory=dict)
    false_rows: Sequence[tuple[int, SampleIndex]] = ()


class PairBatches(Dataset[Batch | UserError]):
    """The batch of each ``BatchRequest``, as ``PairLoader`` describes it.

    A ``UserError`` is returned, because ``DataLoader`` would bury its one line in a traceback.

    Args:
        dataset: the samples.
        pad_to_max: whether captions are padded to the dataset's ``max_text_len``; else to the longest of the batch.
        buckets: sizes that the length of captions and ``text_tokens`` are rounded up to.
    """

    def __init__(self, dataset: PairDataset, *, pad_to_max: bool, buckets: Buckets | None) -> None:
        self.dataset = dataset
        self.pad_to_max = pad_to_max
        self.buckets = buckets

    def __getitem__(self, request: BatchRequest) -> Batch | UserError:
        try:
            return self._batch(request)
        except UserError as error:
            return error

    def _batch(self, request: BatchRequest) -> Batch:
        samples = [self.dataset[index] for index in request.rows]
        ids, mask, tokens = self._captions([sample["caption"] for sample in samples])
        undecodable = {name: why for sample in samples for name, why in sample["undecodable"].items()}
        batch: Batch = {
            "image": torch.stack([sample["image"] for sample in samples]),
            "text_ids": ids,
            "text_mask": mask,
            "text_tokens": tokens,
            "pair": torch.tensor([sample["pair"] for sample in samples]),
            "image_id": torch.tensor([sample["image_id"] for sample in samples]),
            "undecodable": undecodable,
            **{name: torch.tensor(values, dtype=torch.int64) for name, values in request.keys.items()},
        }
        if request.false_rows:
            images = dict(zip(request.keys["place"], batch["image"], strict=True))
            for place, index in request.false_rows:
                if place not in images:
                    other = self.dataset[index]
                    images[place] = other["image"]
                    undecodable.update(other["undecodable"])
            batch["false_image"] = torch.stack([images[place] for place, _ in request.false_rows])
        elif drawn := [sample["false_image"] for sample in samples if "false_image" in sample]:
            batch["false_image"] = torch.stack(drawn)
        elif "match_labels" in request.keys and "false_place" not in request.keys:  # every row has its own image
            batch["false_image"] = batch["image"][:0]
        return batch

    def _captions(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Ids (B, L), mask (B, L) and the number of tokens that the batch has room for."""
        length, tokenizer = self.dataset.max_text_len, self.dataset.tokenizer
        ids, mask = tokenizer(captions, length, pad_to=length if self.pad_to_max else None)
        tokens = int(mask.sum())
        if self.buckets is not None:
            width, tokens = self.buckets.fit(ids.shape[1], tokens)
            ids = torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=tokenizer.pad_id)
            mask = torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
        return ids, mask, tokens


class BatchesOfKinds(Dataset[Batch | UserError]):
    """The batch of each kind and ``BatchRequest``.

    Args:
        batches: of each kind of samples, by its name.
    """

    def __init__(self, batches: Mapping[str, PairBatches]) -> None:
        self.batches = dict(batches)

    def __getitem__(self, index: tuple[str, BatchRequest]) -> Batch | UserError:
        kind, request = index
        return self.batches[kind][request]
