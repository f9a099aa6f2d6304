"""Patch embedding against a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sclkern.reference import embed_patches
from sclkern.reference.embed_patches import unfold_patches


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


@pytest.mark.parametrize("kept", [None, [[0, 4, 8], [7, 1, 2]]])
def test_unfolding_reads_images_of_any_strides(kept):
    images = torch.arange(2 * 2 * 12 * 12 * 3).view(2, 2, 12, 12, 3).permute(0, 1, 4, 2, 3)
    keep = None if kept is None else torch.tensor(kept)
    patches = unfold_patches(images, 4, keep)
    for sample, chosen in enumerate(kept or [range(9)] * 2):
        for slot, patch in enumerate(chosen):
            y, x = 4 * (patch // 3), 4 * (patch % 3)
            assert torch.equal(patches[sample, :, slot], images[sample, :, :, y : y + 4, x : x + 4].flatten(1))


class TestEmbedPatches:
    @pytest.mark.parametrize("eps", [1e-5, 0.1])
    def test_normalisation_is_that_of_layer_norm(self, eps):
        inputs = patch_inputs()
        norm = torch.nn.LayerNorm(5, eps=eps, dtype=torch.float64)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        out = embed_patches(**inputs, norm_weight=norm.weight, norm_bias=norm.bias, eps=eps)
        torch.testing.assert_close(out, norm(embed_patches(**inputs)))

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
