from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sclkern import reference
from sclkern.reference import (
    attention,
    attention_probabilities,
    completion_loss,
    embed_patches,
    frame_attention,
    frame_attention_mask,
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


def test_masks_of_one_seed_are_drawn_apart():
    masks = [mask[:, 1:16] for mask in text_masks(5).values()]
    for a, b in permutations(masks, 2):
        assert not torch.equal(a, b)


def test_rows_of_equal_captions_get_different_masks():
    for mask in text_masks(6).values():
        assert len({tuple(row) for row in mask.tolist()}) > 1


class TestMaskText:
    @given(lengths=LENGTHS, ratio=RATIOS, seed=SEEDS, more=st.integers(0, 6), reference_mode=st.booleans())
    @pytest.mark.parametrize("kind", ["mlm", "completion"])
    def test_selects_words_alone_and_leaves_the_rest(self, kind, lengths, ratio, seed, more, reference_mode):
        ids, (read, selected) = masked(lengths, kind, ratio, seed, max(lengths) + more, reference=reference_mode)
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

    @pytest.mark.parametrize("reference_mode", [False, True])
    @pytest.mark.parametrize("kind", ["mlm", "completion"])
    def test_a_caption_without_words_gets_no_target(self, kind, reference_mode):
        ids, (read, selected) = masked([2, 9], kind, reference=reference_mode)
        assert not selected[0].any()
        assert torch.equal(read[0], ids[0])

    @given(lengths=st.lists(st.integers(3, 18), min_size=1, max_size=5), ratio=RATIOS, seed=SEEDS)
    def test_mlm_gives_every_caption_with_a_word_a_target(self, lengths, ratio, seed):
        assert masked(lengths, "mlm", ratio, seed)[1].selected.any(1).all()

    def test_reference_mlm_draws_over_the_padded_width_and_may_give_no_target(self):
        selected = masked([8] * 4000, "mlm", 0.15, seed=1, width=50, reference=True)[1].selected
        counts = selected.sum(1)
        # 8 of 50 positions without replacement, of which 6 are words: hypergeometric.
        none = math.comb(44, 8) / math.comb(50, 8)
        share = (counts == 0).double().mean().item()
        assert abs(share - none) < 4 * math.sqrt(none * (1 - none) / 4000), (share, none)
        mean = counts.double().mean().item()
        assert abs(mean - 8 * 6 / 50) < 4 * math.sqrt(8 * 0.12 * 0.88 / 4000), mean

    @given(lengths=LENGTHS, ratio=RATIOS, seed=SEEDS, reference_mode=st.booleans())
    def test_completion_always_writes_the_mask_token(self, lengths, ratio, seed, reference_mode):
        _, (read, selected) = masked(lengths, "completion", ratio, seed, reference=reference_mode)
        assert (read[selected] == MASK).all()

    def test_reference_completion_draws_with_replacement(self):
        rows, words, draws = 4000, 10, 5
        selected = masked([words + 2] * rows, "completion", 0.4, seed=2, reference=True)[1].selected
        counts = selected.sum(1).bincount(minlength=draws + 1)
        # P(c distinct of k draws from n) = S(k, c) n! / ((n - c)! n^k), S the Stirling numbers of the second kind.
        stirling = [0, 1, 15, 25, 10, 1]
        chances = [stirling[c] * math.perm(words, c) / words**draws for c in range(draws + 1)]
        assert math.isclose(sum(chances), 1)
        for count, chance in zip(counts.tolist(), chances, strict=True):
            spread = math.sqrt(rows * chance * (1 - chance))
            assert abs(count - rows * chance) <= 4.5 * spread + 1, (counts.tolist(), chances)

    @pytest.mark.parametrize("reference_mode", [False, True])
    @pytest.mark.parametrize("kind", ["mlm", "completion"])
    def test_is_uniform_over_words(self, kind, reference_mode):
        selected = masked([12] * 4000, kind, 0.3, seed=21, width=16, reference=reference_mode)[1].selected[:, 1:11]
        if kind == "mlm" and not reference_mode:
            assert_uniform(selected.sum(0), 4000, sums_of=3)
        elif not reference_mode:
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


def qkv(batch=2, queries=5, keys=7, heads=2, width=4, dtype=torch.float64):
    query = torch.randn(batch, queries, heads, width, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(batch, keys, heads, width, dtype=dtype, requires_grad=True) for _ in range(2))
    return query, key, value


KEYS = torch.tensor([[True, True, False, True, False, False, False], [True] * 7])


class TestAttention:
    @pytest.mark.parametrize("scale", [None, 0.3])
    @pytest.mark.parametrize("padded", [False, True])
    def test_equals_torch(self, padded, scale):
        inputs = qkv()
        mask = KEYS if padded else None
        out = attention(*inputs, key_padding_mask=mask, softmax_scale=scale)
        expected = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in inputs), attn_mask=KEYS[:, None, None] if padded else None, scale=scale
        ).transpose(1, 2)
        torch.testing.assert_close(out, expected)
        weight = torch.randn_like(out)
        gradients = torch.autograd.grad(out, inputs, weight)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, inputs, weight), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_a_query_without_keys_gives_zero_and_finite_gradients(self):
        inputs = qkv()
        mask = KEYS.clone()
        mask[0] = False
        out = attention(*inputs, key_padding_mask=mask)
        assert (out[0] == 0).all(), out[0]
        for name, gradient in zip("qkv", torch.autograd.grad(out.square().sum() + out.sum(), inputs), strict=True):
            assert gradient.isfinite().all(), (name, gradient)
            assert (gradient[0] == 0).all(), (name, gradient[0])

    @pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
    def test_what_padding_holds_is_never_read(self, garbage):
        query, key, value = qkv()
        clean = attention(query, key, value, key_padding_mask=KEYS)
        padding = ~KEYS[:, :, None, None]
        dirty_inputs = [query, *(x.detach().masked_fill(padding, garbage).requires_grad_() for x in (key, value))]
        dirty = attention(*dirty_inputs, key_padding_mask=KEYS)
        assert torch.equal(clean, dirty)
        gradients = torch.autograd.grad(clean.square().sum(), (query, key, value))
        for ours, theirs in zip(gradients, torch.autograd.grad(dirty.square().sum(), dirty_inputs), strict=True):
            assert torch.equal(ours, theirs), (ours, theirs)

    @pytest.mark.parametrize("all_padded", [False, True])
    def test_gradients_of_both_orders(self, all_padded):
        inputs = qkv(batch=2, queries=2, keys=3, heads=1, width=2)
        mask = torch.tensor([[True, False, True], [not all_padded, False, False]])

        def function(*tensors):
            return attention(*tensors, key_padding_mask=mask)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_large_scores_stay_finite(self):
        query, key, value = qkv(dtype=torch.float32)
        out = attention(1e4 * query, 1e4 * key, value, key_padding_mask=KEYS)
        best = attention_probabilities(1e4 * query, 1e4 * key, mask=KEYS[:, None, None]).argmax(-1)
        expected = torch.stack([value[b, best[b, :, :].T, torch.arange(2)] for b in range(2)])
        torch.testing.assert_close(out, expected)

    def test_dropout_keeps_the_mean_and_drops_its_share(self):
        query, key, _ = qkv(batch=1, queries=400, keys=50, heads=1)
        # An identity as the value shows the probabilities themselves.
        value = torch.eye(50, dtype=torch.float64).view(1, 50, 1, 50)
        plain = attention(query, key, value)
        dropped = attention(query, key, value, dropout_p=0.25)
        zero = (dropped == 0).double().mean().item()
        assert abs(zero - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 20000), zero
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)

    def test_a_query_without_keys_has_probabilities_of_zero(self):
        query, key, _ = qkv()
        mask = torch.tensor([False, True])[:, None, None, None]
        probabilities = attention_probabilities(query, key, mask=mask)
        assert (probabilities[0] == 0).all(), probabilities[0]
        torch.testing.assert_close(probabilities[1], attention_probabilities(query, key)[1])

    def test_probabilities_sum_to_one_over_the_valid_keys(self):
        query, key, _ = qkv()
        probabilities = attention_probabilities(query, key, mask=KEYS[:, None, None])
        assert probabilities.shape == (2, 2, 5, 7)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
        assert (probabilities.masked_select(~KEYS[:, None, None].expand_as(probabilities)) == 0).all()


class TestFrameAttention:
    @pytest.mark.parametrize("frames, patches", [(2, 1), (2, 4), (3, 3), (5, 7)])
    def test_equals_dense_attention_with_its_mask(self, frames, patches):
        length = frames * (1 + patches)
        inputs = qkv(queries=length, keys=length)
        out = frame_attention(*inputs, frames)
        mask = frame_attention_mask(frames, 1 + patches, "cpu")
        dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=mask).transpose(1, 2)
        torch.testing.assert_close(out, dense)
        weight = torch.randn_like(out)
        gradients = torch.autograd.grad(out, inputs, weight)
        for ours, theirs in zip(gradients, torch.autograd.grad(dense, inputs, weight), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_mask_lets_a_cls_see_every_frame_and_a_patch_its_own(self):
        T, o = True, False  # noqa: N806
        assert frame_attention_mask(2, 3, "cpu").tolist() == [
            [T, T, T, T, T, T],
            [T, T, T, o, o, o],
            [T, T, T, o, o, o],
            [T, T, T, T, T, T],
            [o, o, o, T, T, T],
            [o, o, o, T, T, T],
        ]

    def test_one_frame_is_plain_attention(self):
        inputs = qkv(queries=6, keys=6)
        assert torch.equal(frame_attention(*inputs, 1), attention(*inputs))

    def test_gradients_of_both_orders(self):
        inputs = qkv(batch=1, queries=6, keys=6, heads=1, width=2)
        assert torch.autograd.gradcheck(lambda *x: frame_attention(*x, 2), inputs)
        assert torch.autograd.gradgradcheck(lambda *x: frame_attention(*x, 2), inputs)


def patch_inputs(frames=2, dtype=torch.float64):
    torch.manual_seed(7)
    return {
        "images": torch.randn(2, frames, 3, 12, 12, dtype=dtype),
        "weight": torch.randn(5, 3, 4, 4, dtype=dtype, requires_grad=True),
        "position": torch.randn(10, 5, dtype=dtype, requires_grad=True),
        "cls": torch.randn(5, dtype=dtype, requires_grad=True),
    }


def convolved(images, weight, position, cls, temporal=None):
    """(B, F, 1 + P, D) by the convolution of ViT."""
    batch, frames = images.shape[:2]
    patches = F.conv2d(images.flatten(0, 1), weight, stride=weight.shape[-1]).flatten(2).mT
    tokens = torch.cat([cls.expand(batch * frames, 1, -1), patches], dim=1) + position
    tokens = tokens.unflatten(0, (batch, frames))
    return tokens if temporal is None else tokens + temporal[:frames, None]


class TestEmbedPatches:
    @pytest.mark.parametrize("with_temporal", [False, True])
    @pytest.mark.parametrize("frames", [1, 3])
    def test_equals_the_convolution(self, frames, with_temporal):
        inputs = patch_inputs(frames)
        temporal = torch.randn(4, 5, dtype=torch.float64, requires_grad=True) if with_temporal else None
        out = embed_patches(**inputs, temporal=temporal)
        expected = convolved(**inputs, temporal=temporal).flatten(1, 2)
        torch.testing.assert_close(out, expected)
        leaves = [x for x in (inputs["weight"], inputs["position"], inputs["cls"], temporal) if x is not None]
        weight = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, weight)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves, weight), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_kept_patches_are_those_of_the_whole_image_in_every_frame(self):
        inputs = patch_inputs()
        keep = torch.tensor([[0, 4, 8], [1, 2, 7]])
        out = embed_patches(**inputs, keep=keep).unflatten(1, (2, 4))
        whole = convolved(**inputs)
        for row in range(2):
            places = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + keep[row]])
            torch.testing.assert_close(out[row], whole[row][:, places])

    def test_dropped_pixels_get_no_gradient(self):
        inputs = patch_inputs(frames=1)
        inputs["images"].requires_grad_()
        embed_patches(**inputs, keep=torch.tensor([[0], [8]])).sum().backward()
        touched = inputs["images"].grad[:, 0, 0].ne(0).nonzero()
        assert {tuple(p) for p in touched.tolist()} == {
            (row, 8 * row + y, 8 * row + x) for row in range(2) for y in range(4) for x in range(4)
        }

    def test_replaced_patches_are_the_mask_token_at_their_positions(self):
        inputs = patch_inputs()
        replace = torch.zeros(2, 9, dtype=torch.bool)
        replace[0, 2] = replace[1, 0] = True
        token = torch.randn(5, dtype=torch.float64, requires_grad=True)
        out = embed_patches(**inputs, replace=replace, mask_token=token).unflatten(1, (2, 10))
        expected = convolved(**inputs).detach().clone()
        expected[0, :, 3] = token + inputs["position"][3]
        expected[1, :, 1] = token + inputs["position"][1]
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        assert token.grad.tolist() == [4.0] * 5


def pairs(rows=6, width=5, dtype=torch.float64, groups=()):
    return tuple(torch.randn(*groups, rows, width, dtype=dtype, requires_grad=True) for _ in range(2))


def plain_loss(recovered, complete, temperature, directions="both"):
    """The formula as it is usually written."""
    similarity = F.normalize(recovered, dim=-1) @ F.normalize(complete, dim=-1).T / temperature
    diagonal = torch.arange(len(similarity))
    loss = F.cross_entropy(similarity, diagonal)
    return loss + F.cross_entropy(similarity.T, diagonal) if directions == "both" else loss


DIRECTIONS = ["both", "recovered_to_complete"]


class TestCompletionLoss:
    @pytest.mark.parametrize("directions", DIRECTIONS)
    @pytest.mark.parametrize("temperature", [0.03, 0.5, 2.0])
    def test_equals_cross_entropy(self, temperature, directions):
        inputs = pairs()
        temperature = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        leaves = (*inputs, temperature)
        ours = completion_loss(*inputs, temperature=temperature, directions=directions)
        plain = plain_loss(*inputs, temperature, directions)
        torch.testing.assert_close(ours, plain)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(a, b)

    @staticmethod
    def confident(dtype, rows=64, width=64, cosine=0.995):
        generator = torch.Generator().manual_seed(5)
        complete = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)
        noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        noise = F.normalize(noise - (noise * complete).sum(-1, keepdim=True) * complete, dim=-1)
        recovered = cosine * complete + math.sqrt(1 - cosine**2) * noise
        return [x.to(dtype).requires_grad_() for x in (recovered, complete)]

    @staticmethod
    def errors(function, dtype, directions):
        truth_inputs, inputs = (TestCompletionLoss.confident(kind) for kind in (torch.float64, dtype))
        truth = completion_loss(*truth_inputs, temperature=0.03, directions=directions)
        loss = function(*inputs, temperature=0.03, directions=directions)
        errors = {"loss": ((loss - truth) / truth).abs().item()}
        gradients = torch.autograd.grad(truth, truth_inputs), torch.autograd.grad(loss, inputs)
        for name, exact, ours in zip(("recovered", "complete"), *gradients, strict=True):
            errors[name] = ((ours - exact).norm() / exact.norm()).item()
        return errors

    @pytest.mark.parametrize("directions", DIRECTIONS)
    def test_confident_positives_are_right_in_float32(self, directions):
        errors = self.errors(completion_loss, torch.float32, directions)
        assert max(errors.values()) < 1e-3, errors

    @pytest.mark.parametrize("directions", DIRECTIONS)
    def test_confident_positives_are_beyond_the_plain_formula_in_float32(self, directions):
        # Without this the test above proves nothing.
        errors = self.errors(plain_loss, torch.float32, directions)
        assert min(errors.values()) > 1e-2, errors
        assert max(self.errors(plain_loss, torch.float64, directions).values()) < 1e-3

    def test_autocast_does_not_round_the_similarities(self):
        recovered, complete = pairs(dtype=torch.float32)
        plain = completion_loss(recovered, complete, temperature=0.03)
        with torch.autocast("cpu", torch.bfloat16):
            cast = completion_loss(recovered, complete, temperature=0.03)
        torch.testing.assert_close(cast, plain)

    def test_one_row_has_no_negatives_and_no_loss(self):
        inputs = pairs(rows=1)
        loss = completion_loss(*inputs, temperature=0.03)
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_zero_feature_has_finite_gradients(self, dtype):
        recovered, complete = (x.detach() for x in pairs(dtype=dtype))
        recovered[0] = complete[3] = complete[0] = 0
        inputs = recovered.requires_grad_(), complete.requires_grad_()
        loss = completion_loss(*inputs, temperature=0.03)
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, inputs):
            assert gradient.isfinite().all(), gradient

    @pytest.mark.parametrize("directions", DIRECTIONS)
    @pytest.mark.parametrize("garbage", [0.0, 1e3, math.nan, math.inf])
    def test_invalid_rows_are_neither_anchors_nor_negatives(self, garbage, directions):
        valid = torch.tensor([True, False, True, True, False, True])
        clean = pairs()
        inputs = [x.detach().masked_fill(~valid[:, None], garbage).requires_grad_() for x in clean]
        loss = completion_loss(*inputs, temperature=0.1, directions=directions, valid=valid)
        expected = plain_loss(*(x[valid] for x in clean), 0.1, directions)
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, inputs)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, clean), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("rows", [0, 4])
    def test_no_valid_row_gives_zero_and_zero_gradients(self, rows):
        inputs = pairs(rows=rows)
        loss = completion_loss(*inputs, temperature=0.03, valid=torch.zeros(rows, dtype=torch.bool))
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))

    def test_groups_are_averaged(self):
        recovered, complete = pairs(groups=(3,))
        valid = torch.tensor([[True] * 6, [True, True, False, False, True, False], [False] * 6])
        grouped = completion_loss(recovered, complete, temperature=0.2)
        single = [completion_loss(r, c, temperature=0.2) for r, c in zip(recovered, complete, strict=True)]
        torch.testing.assert_close(grouped, sum(single) / 3)
        grouped = completion_loss(recovered, complete, temperature=0.2, valid=valid)
        single = [
            completion_loss(r, c, temperature=0.2, valid=v) for r, c, v in zip(recovered, complete, valid, strict=True)
        ]
        torch.testing.assert_close(grouped, sum(single) / 3)

    @pytest.mark.parametrize("grouped", [False, True])
    @pytest.mark.parametrize("with_valid", [False, True])
    @pytest.mark.parametrize("directions", DIRECTIONS)
    def test_gradients_of_both_orders(self, directions, with_valid, grouped):
        inputs = (*pairs(rows=3, width=2, groups=(2,) * grouped), torch.tensor(0.7, dtype=torch.float64))
        inputs[2].requires_grad_()
        valid = torch.tensor([True, True, False]).expand(*(2,) * grouped, 3) if with_valid else None

        def function(recovered, complete, temperature):
            return completion_loss(recovered, complete, temperature=temperature, directions=directions, valid=valid)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    @pytest.mark.parametrize("wanted", [(True, False), (False, True)])
    def test_a_side_without_gradient_leaves_the_other_as_it_is(self, wanted):
        inputs = pairs()
        both = torch.autograd.grad(completion_loss(*inputs, temperature=0.1), inputs)
        partial = [x.detach().requires_grad_(flag) for x, flag in zip(inputs, wanted, strict=True)]
        side = wanted.index(True)
        (gradient,) = torch.autograd.grad(completion_loss(*partial, temperature=0.1), [partial[side]])
        torch.testing.assert_close(gradient, both[side])


def test_streams_of_the_draws_differ():
    streams = [value for name, value in vars(reference).items() if name.startswith("STREAM_")]
    assert len(streams) == 5
    assert len(set(streams)) == 5
