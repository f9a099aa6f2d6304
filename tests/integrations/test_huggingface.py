"""``register_attention``: ``attn_implementation="sclkern"`` in models of transformers."""

import sys

import pytest
import torch
from torch import nn

import sclkern
from sclkern import UserError, ops
from sclkern.integrations.huggingface.masks import key_padding
from sclkern.integrations.huggingface.warn import _warn_once


@pytest.fixture(autouse=True)
def registered():
    pytest.importorskip("transformers")
    sclkern.register_attention()
    _warn_once.cache_clear()


@pytest.mark.parametrize("name", ["bert", "roberta", "clip", "bridgetower", "blip", "vilt"])
@pytest.mark.parametrize("path", ["cpu", "kernels"])
def test_is_the_eager_attention(name, path, make, compute, assert_agree, request):
    model, inputs = make(name, attn_implementation="eager")
    expected = compute(model, inputs)
    if path == "kernels":
        request.getfixturevalue("kernels")
    model, _ = make(name, attn_implementation="sclkern")
    assert model.config._attn_implementation == "sclkern"
    assert_agree(compute(model, inputs), expected)


def test_can_be_set_later(make, compute, assert_agree):
    model, inputs = make("bert")
    expected = compute(model, inputs)
    model.set_attn_implementation("sclkern")
    assert_agree(compute(model, inputs), expected)


def test_padding_and_dropout_reach_the_op(make, monkeypatch):
    model, inputs = make("bert", attn_implementation="sclkern")
    calls = []

    def spy(query, key, value, **options):
        calls.append((tuple(query.shape), options))
        return ops.attention(query, key, value, **options)

    monkeypatch.setattr(
        "sclkern.integrations.huggingface.interface.ops", type("ops", (), {"attention": staticmethod(spy)})
    )
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.25
    model(**inputs)
    model.eval()(**inputs)
    (shape, options), dropout = calls[0], [options["dropout_p"] for _, options in calls]
    assert shape == (3, 6, 2, 32) and dropout == [0.25, 0.25, 0.0, 0.0]
    assert torch.equal(options["key_padding_mask"], inputs["attention_mask"].bool())


def test_without_padding_no_mask(make, monkeypatch):
    model, inputs = make("bert", attn_implementation="sclkern")
    masks = []
    monkeypatch.setattr(
        "sclkern.integrations.huggingface.interface.key_padding",
        lambda mask, *sizes: masks.append(mask) or key_padding(mask, *sizes),
    )
    model(inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"]))
    assert masks == [None, None]


def test_a_causal_mask_is_computed_by_torch_with_a_warning(make):
    model, inputs = make("clip", attn_implementation="sclkern")
    with pytest.warns(
        UserWarning, match="a mask that differs between queries, such as a causal one: computed by torch"
    ):
        model(**inputs)


def test_a_mask_of_four_dimensions(make, compute, assert_agree):
    mask = torch.zeros(3, 1, 6, 6).masked_fill(torch.rand(3, 1, 6, 6) < 0.3, torch.finfo(torch.float32).min)
    mask[..., 0] = 0.0
    for given in (mask, mask == 0, mask[:, :, :1], mask[:1, :, :1], mask.clamp_min(-1.0)):
        eager, inputs = make("bert", attn_implementation="eager")
        # The eager attention adds whatever it gets.
        added = torch.where(given, 0.0, torch.finfo(torch.float32).min) if given.dtype == torch.bool else given
        expected = compute(eager, {**inputs, "attention_mask": added})
        model, _ = make("bert", attn_implementation="sclkern")
        assert_agree(compute(model, {**inputs, "attention_mask": given}), expected)


def test_a_head_without_kernel(compute, assert_agree):
    import transformers

    sizes = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    eager = transformers.BertModel._from_config(config, attn_implementation="eager")
    ours = transformers.BertModel._from_config(config, attn_implementation="sclkern")
    ours.load_state_dict(eager.state_dict())
    inputs = {"input_ids": torch.randint(0, 20, (2, 5))}
    assert_agree(compute(ours, inputs), compute(eager, inputs))


def test_a_warning_names_requested_attention_maps(make):
    eager, inputs = make("bert", attn_implementation="eager")
    model, _ = make("bert", attn_implementation="sclkern")
    with pytest.warns(UserWarning, match="attention maps are requested: computed by the eager attention of the model"):
        actual = model(**inputs, output_attentions=True).attentions
    expected = eager(**inputs, output_attentions=True).attentions
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_into_one_graph(make, kernels):
    model, inputs = make("bert", attn_implementation="sclkern")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_a_second_name_and_a_second_time(make):
    sclkern.register_attention("sclkern_too")
    sclkern.register_attention("sclkern_too")
    model, inputs = make("bert", attn_implementation="sclkern_too")
    model(**inputs)


@pytest.mark.parametrize("name", ["sdpa", "eager", ""])
def test_a_name_of_transformers_is_refused(name):
    with pytest.raises(UserError, match=f"name: got {name!r}, which transformers has"):
        sclkern.register_attention(name)


def test_a_name_that_is_none():
    with pytest.raises(TypeError, match="name: got int, expected a string"):
        sclkern.register_attention(3)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="transformers cannot be imported"):
        sclkern.register_attention()


def test_a_part_of_a_model_can_be_fused(make, compute, assert_agree, kernels):
    model, _ = make("bert")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model.encoder.layer[0]

        def forward(self, **inputs):
            out = self.layer(**inputs)
            return out if isinstance(out, tuple) else (out,)

    layer, mask = Layer(), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., 3:] = False
    inputs = {"hidden_states": torch.randn(2, 5, 64), "attention_mask": mask}
    expected = compute(layer, inputs)
    with sclkern.fuse(layer):
        assert layer.layer.attention.self.config._attn_implementation == "sclkern"
        assert model.encoder.layer[1].attention.self.config._attn_implementation == "sdpa"
        assert_agree(compute(layer, inputs), expected)
