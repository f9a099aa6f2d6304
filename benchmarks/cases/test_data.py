"""Decoding, transforming and batching of images, by the loader that training uses."""

from __future__ import annotations

import statistics

import pytest
import torch

from sclkern.data import open_pairs
from sclkern.data.dataset import PairDataset
from sclkern.data.loader import PairLoader
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform

SIZE, BATCH, BATCHES = 288, 16, 4


@pytest.mark.priority(2)
@pytest.mark.parametrize("transform", ["clip", "clip_randaug"])
def test_loading(benchmark, record, transform):
    table = open_pairs("demo", ["pairs"])
    options = {"max_text_len": 50, "min_size": 16, "seed": 0}
    dataset = PairDataset(table, CaptionTokenizer.from_pretrained("demo"), build_transform(transform, SIZE), **options)
    loader = PairLoader(dataset, batch_size=BATCH, shuffle=True, seed=0)

    def load() -> torch.Tensor:
        # In this process: the rate of one core, which workers multiply.
        images = [batch["image"] for batch, _ in zip(loader.epoch(0), range(BATCHES), strict=False)]
        return torch.cat(images)

    # The same images every time, none empty and none broken.
    first = load()
    assert first.shape == (BATCH * BATCHES, 3, SIZE, SIZE) and torch.equal(first, load())
    assert first.isfinite().all() and (first.flatten(1).std(1) > 0).all()
    benchmark.pedantic(load, rounds=3)
    seconds = statistics.median(benchmark.stats.stats.data)
    record(
        f"data/demo/{transform}",
        rows=BATCH * BATCHES,
        pixels=SIZE,
        workers=0,
        median_seconds=seconds,
        pairs_per_second=BATCH * BATCHES / seconds,
    )
