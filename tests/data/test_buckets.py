"""Few sizes for captions of many lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sclkern.data import open_pairs
from sclkern.data.buckets import TOKEN_STEP, Buckets
from sclkern.data.dataset import PairDataset
from sclkern.data.loader import PairLoader
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform


@given(st.lists(st.integers(2, 60), min_size=1, max_size=50), st.integers(1, 200), st.integers(2, 50))
def test_every_batch_fits_and_few_sizes_exist(lengths, batch_size, max_text_len):
    buckets = Buckets.from_lengths(lengths, batch_size, max_text_len)
    assert len(buckets.widths) <= 3 and len(buckets.tokens) <= 5
    for longest, tokens in ((2, 2 * batch_size), (max_text_len, batch_size * max_text_len)):
        width, room = buckets.fit(longest, tokens)
        assert longest <= width <= max_text_len and tokens <= room <= batch_size * max_text_len


def test_a_size_is_the_smallest_that_fits():
    buckets = Buckets(widths=(8, 16), tokens=(64, 128))
    assert buckets.fit(8, 64) == (8, 64)
    assert buckets.fit(9, 65) == (16, 128)
    with pytest.raises(ValueError, match="tokens: got 129, expected at most 128"):
        buckets.fit(8, 129)


def test_captions_of_usual_length_waste_little():
    lengths = torch.randint(10, 17, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    buckets = Buckets.from_lengths(lengths, 64, 50)
    width, room = buckets.fit(16, sum(lengths[:64]))
    assert width == 16
    assert room <= sum(lengths[:64]) + 2 * TOKEN_STEP


def test_a_loader_rounds_its_batches_up():
    table = open_pairs("demo", ["pairs"])
    tokenizer = CaptionTokenizer.from_pretrained("demo")
    dataset = PairDataset(table, tokenizer, build_transform("clip_test", 32), max_text_len=32, min_size=8, seed=0)
    buckets = Buckets(widths=(16, 24, 32), tokens=(128, 512))
    options = {"batch_size": 8, "shuffle": True, "seed": 0}
    exact, rounded = (PairLoader(dataset, buckets=sizes, **options).epoch(0) for sizes in (None, buckets))
    for _, ours, plain in zip(range(3), rounded, exact, strict=False):
        assert plain["text_tokens"] == plain["text_mask"].sum()
        width = plain["text_ids"].shape[1]
        assert ours["text_tokens"] in buckets.tokens and ours["text_tokens"] >= plain["text_tokens"]
        assert ours["text_ids"].shape == ours["text_mask"].shape and ours["text_ids"].shape[1] in buckets.widths
        assert torch.equal(ours["text_ids"][:, :width], plain["text_ids"])
        assert not ours["text_mask"][:, width:].any() and (ours["text_ids"][:, width:] == tokenizer.pad_id).all()
