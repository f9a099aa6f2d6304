from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sclkern.models.layouts import Padded

BACKENDS = ["auto", "sdpa", "eager"]


def streams(rows=2, text=6, image=9):
    mask = torch.arange(text) < torch.tensor([text, 3])[:, None]
    return (
        torch.randn(rows, text, 64, dtype=torch.float64, requires_grad=True),
        mask,
        torch.randn(rows, image, 64, dtype=torch.float64, requires_grad=True),
    )


def layer(attend, block, x, mask, context, context_mask):
    """BERT's post-norm layer with cross-attention, step by step."""

    def norm(module, y):
        return F.layer_norm(y, (64,), module.weight, module.bias, 1e-12)

    x = norm(block.attention_norm, x + attend(block.attention, x, x, mask))
    x = norm(block.cross_attention_norm, x + attend(block.cross_attention, x, context, context_mask))
    hidden = F.gelu(x @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return norm(block.mlp_norm, x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_streams_read_the_previous_layers_outputs(make_model, torch_attention, backend):
    fusion = make_model().set_backend(backend).fusion
    text, mask, image = streams()
    expected_text, expected_image = text, image
    for text_block, image_block in zip(fusion.text_layers, fusion.image_layers, strict=True):
        next_text = layer(torch_attention, text_block, expected_text, mask, expected_image, None)
        next_image = layer(torch_attention, image_block, expected_image, None, expected_text, mask)
        expected_text, expected_image = next_text, next_image
    fused_text, fused_image = fusion(text, Padded(mask), image, Padded())
    torch.testing.assert_close(fused_text[mask], expected_text[mask], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fused_image, expected_image, rtol=1e-9, atol=1e-10)


def test_in_one_layer_a_stream_does_not_pass_through_the_others_weights(make_model):
    fusion = make_model(fusion_layers=1).fusion
    text, mask, image = streams()
    before = fusion(text, Padded(mask), image, Padded())
    for stream, untouched in ((fusion.text_layers, 1), (fusion.image_layers, 0)):
        state = {name: value.clone() for name, value in stream.state_dict().items()}
        with torch.no_grad():
            for parameter in stream.parameters():
                parameter += torch.randn_like(parameter)
        after = fusion(text, Padded(mask), image, Padded())
        assert torch.equal(after[untouched], before[untouched])
        assert not torch.equal(after[1 - untouched], before[1 - untouched])
        stream.load_state_dict(state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_read(make_model, backend):
    fusion = make_model().set_backend(backend).fusion
    text, mask, image = streams()
    fused_text, fused_image = fusion(text, Padded(mask), image, Padded())
    other_text, other_image = fusion(text.masked_fill(~mask[..., None], 1e3), Padded(mask), image, Padded())
    torch.testing.assert_close(other_image, fused_image, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other_text[mask], fused_text[mask], rtol=1e-10, atol=1e-12)


def test_backends_have_equal_outputs_and_gradients(make_model):
    model = make_model()
    text, mask, image = streams()
    results = []
    for backend in BACKENDS:
        fused_text, fused_image = model.set_backend(backend).fusion(text, Padded(mask), image, Padded())
        loss = fused_text[mask].sin().sum() + fused_image.cos().sum()
        results.append([fused_text[mask], fused_image, *torch.autograd.grad(loss, [text, image])])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
