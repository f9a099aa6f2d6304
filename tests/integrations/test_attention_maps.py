"""Attention maps that are requested are given: by models that collect them by hand, compiled, copied, loaded again."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import sclkern
from sclkern import ops
from sclkern.integrations.huggingface.warn import _warn_once

transformers = pytest.importorskip("transformers")
BERT = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
IDS = torch.arange(1, 19).view(2, 9)


@pytest.fixture(autouse=True)
def registered():
    sclkern.register_attention()
    _warn_once.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def op_calls(monkeypatch):
    """One entry for each call of ``ops.attention`` from the interface."""
    calls = []

    def spy(*args, **options):
        calls.append(1)
        return ops.attention(*args, **options)

    spied = type("ops", (), {"attention": staticmethod(spy)})
    monkeypatch.setattr("sclkern.integrations.huggingface.interface.ops", spied)
    return calls


@pytest.fixture(params=["selected", "fused"])
def bridgetower(request, make):
    """BridgeTower, which collects by hand what its layers return; its input, and the maps of its eager attention."""
    eager, inputs = make("bridgetower", attn_implementation="eager")
    model, _ = make("bridgetower", attn_implementation="sclkern" if request.param == "selected" else "eager")
    expected = eager.eval()(**inputs, output_attentions=True).attentions
    if request.param == "fused":
        sclkern.fuse(model)
    return model.eval(), inputs, expected


def assert_maps(actual, expected):
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert all(value is not None for value in ours)
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_maps_that_a_model_collects_by_hand(bridgetower, op_calls):
    model, inputs, expected = bridgetower
    for _ in range(2):
        assert_maps(model(**inputs, output_attentions=True).attentions, expected)
        # As PEFT's adapters call the model around which they are.
        assert_maps(model.forward(**inputs, output_attentions=True).attentions, expected)
        assert not op_calls
        for options in ({}, {"output_attentions": False}):
            out = model(**inputs, **options).attentions
            assert not any(torch.is_tensor(value) for pair in out or () for value in pair or ())
            assert len(op_calls) == 11, "the op computes 3 layers of text and 4 of both, with self- and cross-attention"
            op_calls.clear()


@torch.no_grad()
@pytest.mark.parametrize("way", ["selected", "fused"])
def test_the_op_goes_on_after_a_call_for_maps(way, op_calls):
    """transformers 5.0 leaves a forward on each module that it collected from."""
    own = "sclkern" if way == "selected" else "eager"
    model = transformers.BertModel._from_config(transformers.BertConfig(**BERT), attn_implementation=own).eval()
    if way == "fused":
        sclkern.fuse(model)
    for _ in range(2):
        assert all(value is not None for value in model(IDS, output_attentions=True).attentions) and not op_calls
        assert model(IDS).attentions is None and len(op_calls) == 2
        op_calls.clear()


@torch.no_grad()
def test_maps_that_the_users_own_module_collects():
    class Layers(torch.nn.Module):
        def __init__(self, implementation):
            super().__init__()
            torch.manual_seed(0)
            bert = transformers.BertModel._from_config(
                transformers.BertConfig(**BERT), attn_implementation=implementation
            )
            self.layers = torch.nn.ModuleList(layer.attention.self for layer in bert.encoder.layer)

        def forward(self, hidden, output_attentions=False):
            return [layer(hidden)[1] for layer in self.layers]

    eager, ours = Layers("eager").eval(), Layers("sclkern").eval()
    hidden = torch.randn(2, 5, 64)
    assert_maps([ours(hidden, output_attentions=True)], [eager(hidden)])
    assert ours(hidden) == [None, None]


@torch.no_grad()
def test_maps_that_the_configuration_asks_for(make):
    eager, inputs = make("bridgetower", attn_implementation="eager")
    expected = eager.eval()(**inputs, output_attentions=True).attentions
    model, _ = make("bridgetower", attn_implementation="eager")
    model.config.output_attentions = True
    model.set_attn_implementation("sclkern")
    assert_maps(model.eval()(**inputs).attentions, expected)


@torch.no_grad()
@pytest.mark.parametrize("way", ["selected", "fused"])
def test_maps_of_a_compiled_model(way, make):
    small, inputs = make("bridgetower")
    # As many tokens as patches: compiled, some versions of transformers make the masks of both for all layers.
    inputs |= {name: inputs[name][:, :5] for name in ("input_ids", "attention_mask")}
    config = small.config
    config.num_hidden_layers = config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    eager = transformers.BridgeTowerModel._from_config(config, attn_implementation="eager").eval()
    model = transformers.BridgeTowerModel._from_config(
        config, attn_implementation="sclkern" if way == "selected" else "eager"
    ).eval()
    model.load_state_dict(eager.state_dict())
    if way == "fused":
        sclkern.fuse(model)
    # In several graphs where Dynamo cannot trace how transformers keeps what it collects (torch 2.11).
    compiled = torch.compile(model, backend="eager")
    expected = eager(**inputs, output_attentions=True).attentions
    assert_maps(compiled(**inputs, output_attentions=True).attentions, expected)


def test_maps_with_checkpoints_in_the_users_code(make):
    """Recomputed in the backward, a layer is outside of its model, and must compute as it did within."""
    from torch.utils.checkpoint import checkpoint

    for options in ({}, {"output_attentions": True}):
        model, inputs = make("bridgetower", attn_implementation="sclkern")
        for layer in (*model.cross_modal_text_layers, *model.cross_modal_image_layers):
            plain = layer.forward
            layer.forward = lambda *args, plain=plain, **kw: checkpoint(plain, *args, use_reentrant=False, **kw)
        model(**inputs, **options).text_features.sum().backward()
        assert model.cross_modal_text_layers[0].attention.self.query.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_what_only_eager_attention_computes_compiles():
    """T5's decoder has a position bias beside a causal mask; the function of its file is traced."""
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    model = transformers.T5Model._from_config(config, attn_implementation="sclkern").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    options = {"decoder_input_ids": IDS, "use_cache": False}
    torch.testing.assert_close(compiled(IDS, **options)[0], model(IDS, **options)[0])


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
out = model(torch.arange(1, 19).view(2, 9), output_attentions=True)
torch.save([out.last_hidden_state, *out.attentions], sys.argv[2])
"""


@torch.no_grad()
def test_a_model_that_another_process_loads(tmp_path):
    """transformers learns what a class records from models that are made, which no loaded one is."""
    model = transformers.BertModel._from_config(transformers.BertConfig(**BERT), attn_implementation="sdpa").eval()
    sclkern.fuse(model)
    torch.save(model, tmp_path / "model.pt")
    expected = model(IDS, output_attentions=True)
    assert len(expected.attentions) == 2
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, timeout=300)
    actual = torch.load(tmp_path / "out.pt")
    assert_maps([actual], [[expected.last_hidden_state, *expected.attentions]])


@torch.no_grad()
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_copies_give_the_maps_of_their_own_calls(implementation, way):
    model = transformers.BertModel._from_config(
        transformers.BertConfig(**BERT), attn_implementation=implementation
    ).eval()
    report = sclkern.fuse(model)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = model(IDS, output_attentions=True).attentions
    assert other(IDS).attentions is None
    assert_maps([other(IDS, output_attentions=True).attentions], [expected])
    assert model(IDS).attentions is None
    report.revert()
    assert not any(name.startswith("_sclkern") for module in model.modules() for name in vars(module))
    assert_maps([other(IDS, output_attentions=True).attentions], [expected])
