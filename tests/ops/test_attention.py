"""Attention and frame attention against torch and against dense masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sclkern.reference import (
    attention,
    attention_probabilities,
    frame_attention,
    frame_attention_mask,
)


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
