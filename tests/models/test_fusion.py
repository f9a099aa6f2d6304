from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sclkern.models.fusion import OutputSelection, Section
from sclkern.models.layouts import Padded, Rows

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


@pytest.mark.parametrize("fusion_layers", [0, 2])
def test_selected_outputs_are_those_of_all_tokens(make_model, fusion_layers):
    fusion = make_model(fusion_layers=fusion_layers).fusion
    text, mask, image = streams()
    rows = Rows(torch.tensor([[0, 2], [1, 0]]), Padded()), Rows(torch.tensor([[8], [0]]), Padded())
    whole = Section(0, len(image), Padded())
    full = fusion(text, Padded(mask), image, Padded())
    selected = fusion(text, Padded(mask), image, Padded(), outputs=OutputSelection(*rows, whole, whole))
    for tokens, kept, stream in zip(selected, rows, full, strict=True):
        torch.testing.assert_close(tokens, kept.take(stream), rtol=1e-9, atol=1e-10)


def test_a_stream_without_outputs_is_not_computed(make_model):
    fusion = make_model(fusion_layers=1).fusion
    text, mask, image = streams()
    ran = []
    for layers in (fusion.text_layers, fusion.image_layers):
        layers[0].register_forward_hook(lambda module, *_: ran.append(module))
    rows, none = Rows(torch.tensor([[0], [1]]), Padded()), Rows(torch.zeros(2, 0, dtype=torch.int64), Padded())
    whole = Section(0, len(image), Padded())
    text_out, image_out = fusion(text, Padded(mask), image, Padded(), outputs=OutputSelection(rows, none, whole, whole))
    assert ran == [fusion.text_layers[0]]
    assert text_out.shape == (2, 1, 64) and image_out.shape == (2, 0, 64)
