"""Masks of patches and words: counts, uniformity, what is never chosen."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sclkern import random
from sclkern.reference import (
    mask_text,
    select_patches,
    select_tokens,
)

PAD, BOS, EOS, MASK, VOCABULARY = 1, 0, 2, 119, 120
SEEDS = st.integers(0, 2**62)
RATIOS = st.floats(0, 0.99)
LENGTHS = st.lists(st.integers(2, 18), min_size=1, max_size=5)


def captions(lengths, width=None):
    lengths = torch.tensor(lengths)
    column = torch.arange(width or int(lengths.max()))
    ids = (3 + (7 * column + 11 * torch.arange(len(lengths))[:, None]) % 100).where(column < lengths[:, None], PAD)
    ids[:, 0] = BOS
    ids[torch.arange(len(lengths)), lengths - 1] = EOS
    return ids, lengths


def masked(lengths, kind, ratio=0.4, seed=0, width=None, **options):
    ids, lengths = captions(lengths, width)
    return ids, mask_text(
        ids, lengths, kind=kind, ratio=ratio, mask_id=MASK, vocab_size=VOCABULARY, seed=seed, **options
    )


def assert_uniform(counts, trials, sums_of=1):
    """``counts`` of ``trials`` draws of ``sums_of`` distinct places: chi-square at about one false alarm in 1e5."""
    expected = trials * sums_of / len(counts)
    freedom = len(counts) - 1
    # Draws without replacement vary less than the multinomial by this factor.
    scale = (len(counts) - sums_of) / freedom
    chi_square = ((counts.double() - expected) ** 2 / expected).sum().item() / scale
    bound = freedom * (1 - 2 / (9 * freedom) + 4.26 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound, f"chi-square {chi_square} of {freedom} degrees, bound {bound}: {counts.tolist()}"


class TestSelectPatches:
    @given(patches=st.integers(1, 70), ratio=st.floats(0, 1), batch=st.integers(1, 5), seed=SEEDS)
    def test_keeps_the_stated_number_of_distinct_patches_in_order(self, patches, ratio, batch, seed):
        keep = select_patches(patches, ratio, batch, seed=seed)
        assert keep.shape == (batch, max(1, int(patches * ratio)))
        assert (keep.diff(dim=1) > 0).all(), keep
        assert keep.min() >= 0
        assert keep.max() < patches

    def test_keeps_64_of_324_and_39_of_196_when_four_fifths_are_dropped(self):
        assert select_patches(324, 1 - 0.8, 1, seed=0).shape[1] == 64
        assert select_patches(196, 1 - 0.8, 1, seed=0).shape[1] == 39

    def test_is_uniform_over_patches(self):
        keep = select_patches(20, 0.25, 4000, seed=11)
        assert_uniform(keep.flatten().bincount(minlength=20), 4000, sums_of=5)

    def test_is_uniform_over_pairs(self):
        keep = select_patches(5, 0.4, 4000, seed=12)
        pairs = (keep[:, 0] * 5 + keep[:, 1]).bincount(minlength=25)
        assert_uniform(pairs[pairs > 0], 4000)
        assert (pairs > 0).sum() == 10

    def test_rows_of_a_smaller_batch_are_those_of_a_larger_one(self):
        assert torch.equal(select_patches(16, 0.5, 3, seed=1), select_patches(16, 0.5, 9, seed=1)[:3])


class TestSelectTokens:
    @given(patches=st.integers(1, 70), ratio=RATIOS, batch=st.integers(1, 5), seed=SEEDS)
    def test_replaces_the_stated_number_of_patches(self, patches, ratio, batch, seed):
        replace = select_tokens(patches, ratio, batch, seed=seed)
        assert replace.dtype == torch.bool
        assert replace.sum(1).tolist() == [int(patches * ratio)] * batch

    def test_is_uniform_over_patches(self):
        assert_uniform(select_tokens(20, 0.3, 4000, seed=13).sum(0), 4000, sums_of=6)


def text_masks(seed):
    return {
        "mlm": masked([18] * 8, "mlm", seed=seed)[1].selected,
        "completion": masked([18] * 8, "completion", seed=seed)[1].selected,
        "patches": F.one_hot(select_patches(16, 0.4, 8, seed=seed), 16).sum(1).bool(),
        "tokens": select_tokens(16, 0.4, 8, seed=seed),
    }


@pytest.mark.parametrize("name", ["mlm", "completion", "patches", "tokens"])
def test_masks_repeat_with_the_seed_and_change_with_it(name):
    assert torch.equal(text_masks(3)[name], text_masks(3)[name])
    assert not torch.equal(text_masks(3)[name], text_masks(4)[name])
    assert torch.equal(text_masks(3)[name], text_masks(torch.tensor(3))[name])


def test_masks_of_one_seed_are_independent():
    masks = [mask[:, 1:16] for mask in text_masks(5).values()]
    for a, b in permutations(masks, 2):
        assert not torch.equal(a, b)


def test_rows_of_equal_captions_get_different_masks():
    for mask in text_masks(6).values():
        assert len({tuple(row) for row in mask.tolist()}) > 1


class TestMaskText:
    @given(lengths=LENGTHS, ratio=RATIOS, seed=SEEDS, more=st.integers(0, 6), published=st.booleans())
    @pytest.mark.parametrize("kind", ["mlm", "completion"])
    def test_selects_only_caption_tokens(self, kind, lengths, ratio, seed, more, published):
        ids, (read, selected) = masked(lengths, kind, ratio, seed, max(lengths) + more, published=published)
        assert not selected[ids <= 2].any(), (ids, selected)
        assert torch.equal(read.where(~selected, ids), ids)
        assert read.min() >= 0
        assert read.max() < VOCABULARY

    @given(lengths=LENGTHS, ratio=RATIOS, seed=SEEDS, more=st.integers(0, 6))
    @pytest.mark.parametrize("kind", ["mlm", "completion"])
    def test_a_wider_batch_changes_no_mask(self, kind, lengths, ratio, seed, more):
        width = max(lengths)
        _, narrow = masked(lengths, kind, ratio, seed)
        ids, wide = masked(lengths, kind, ratio, seed, width + more)
        assert torch.equal(wide.ids[:, :width], narrow.ids)
        assert torch.equal(wide.selected[:, :width], narrow.selected)
        assert torch.equal(wide.ids[:, width:], ids[:, width:])

    @pytest.mark.parametrize("ratio", [0.0, 0.1, 0.15, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99, 1 - 0.9, 1 - 0.8])
    def test_counts_are_those_of_python_floats(self, ratio):
        words = range(1, 49)
        lengths = [n + 2 for n in words]
        mlm = masked(lengths, "mlm", ratio)[1].selected.sum(1).tolist()
        completion = masked(lengths, "completion", ratio)[1].selected.sum(1).tolist()
        assert mlm == [max(1, math.floor(ratio * n + 0.5)) for n in words]
        assert completion == [int(n * ratio) + 1 for n in words]

    @pytest.mark.parametrize("published", [False, True])
    @pytest.mark.parametrize("kind", ["mlm", "completion"])
    def test_a_caption_without_tokens_gets_no_target(self, kind, published):
        ids, (read, selected) = masked([2, 9], kind, published=published)
        assert not selected[0].any()
        assert torch.equal(read[0], ids[0])

    @given(lengths=st.lists(st.integers(3, 18), min_size=1, max_size=5), ratio=RATIOS, seed=SEEDS)
    def test_mlm_gives_every_caption_with_a_token_a_target(self, lengths, ratio, seed):
        assert masked(lengths, "mlm", ratio, seed)[1].selected.any(1).all()

    def test_reference_mlm_draws_over_the_padded_width_and_may_give_no_target(self):
        selected = masked([8] * 4000, "mlm", 0.15, seed=1, width=50, published=True)[1].selected
        counts = selected.sum(1)
        # 8 of 50 positions without replacement, of which 6 are words: hypergeometric.
        none = math.comb(44, 8) / math.comb(50, 8)
        share = (counts == 0).double().mean().item()
        assert abs(share - none) < 4 * math.sqrt(none * (1 - none) / 4000), (share, none)
        mean = counts.double().mean().item()
        assert abs(mean - 8 * 6 / 50) < 4 * math.sqrt(8 * 0.12 * 0.88 / 4000), mean

    @given(lengths=LENGTHS, ratio=RATIOS, seed=SEEDS, published=st.booleans())
    def test_completion_always_writes_the_mask_token(self, lengths, ratio, seed, published):
        _, (read, selected) = masked(lengths, "completion", ratio, seed, published=published)
        assert (read[selected] == MASK).all()

    def test_reference_completion_draws_with_replacement(self):
        rows, words, draws = 4000, 10, 5
        selected = masked([words + 2] * rows, "completion", 0.4, seed=2, published=True)[1].selected
        counts = selected.sum(1).bincount(minlength=draws + 1)
        # P(c distinct of k draws from n) = S(k, c) n! / ((n - c)! n^k), S the Stirling numbers of the second kind.
        stirling = [0, 1, 15, 25, 10, 1]
        chances = [stirling[c] * math.perm(words, c) / words**draws for c in range(draws + 1)]
        assert math.isclose(sum(chances), 1)
        for count, chance in zip(counts.tolist(), chances, strict=True):
            spread = math.sqrt(rows * chance * (1 - chance))
            assert abs(count - rows * chance) <= 4.5 * spread + 1, (counts.tolist(), chances)

    @pytest.mark.parametrize("published", [False, True])
    @pytest.mark.parametrize("kind", ["mlm", "completion"])
    def test_is_uniform_over_words(self, kind, published):
        selected = masked([12] * 4000, kind, 0.3, seed=21, width=16, published=published)[1].selected[:, 1:11]
        if kind == "mlm" and not published:
            assert_uniform(selected.sum(0), 4000, sums_of=3)
        elif not published:
            assert_uniform(selected.sum(0), 4000, sums_of=4)
        else:
            # The number of distinct words varies: a plain multinomial is the looser bound.
            counts = selected.sum(0).double()
            chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
            assert chi_square < 37, counts

    def test_mlm_writes_mask_random_and_own_tokens_in_80_10_10(self):
        ids, (read, selected) = masked([50] * 4000, "mlm", 0.5, seed=3)
        total = int(selected.sum())
        own = (read == ids) & selected
        as_mask = (read == MASK) & selected
        # A random token is the mask or the own one once in VOCABULARY draws each.
        for name, hits, chance in (
            ("mask", as_mask, 0.8 + 0.1 / VOCABULARY),
            ("own", own, 0.1 + 0.1 / VOCABULARY),
            ("other", selected & ~own & ~as_mask, 0.1 - 0.2 / VOCABULARY),
        ):
            share = hits.sum().item() / total
            assert abs(share - chance) < 4.5 * math.sqrt(chance * (1 - chance) / total), (name, share, chance, total)

    def test_random_tokens_are_uniform_over_the_vocabulary(self):
        ids, (read, selected) = masked([50] * 6000, "mlm", 0.9, seed=4)
        tokens = read[selected & (read != ids) & (read != MASK)].bincount(minlength=VOCABULARY)
        # Of the tokens that no caption holds: where a random one equals the caption's own cannot be seen.
        rare = torch.cat([tokens[:3], tokens[103:119]])
        assert_uniform(rare, int(rare.sum()))


def test_streams_of_the_draws_differ():
    streams = [value for name, value in vars(random).items() if name.startswith("STREAM_")]
    assert len(streams) >= 5 and len(set(streams)) == len(streams), streams
