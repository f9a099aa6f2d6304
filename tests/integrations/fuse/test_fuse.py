"""``fuse``: what it replaces, what it leaves and why, and that it can be undone."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import sclkern
from sclkern import UserError
from sclkern.integrations.huggingface.warn import _warn_once


@pytest.mark.parametrize("path", ["cpu", "kernels"])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_of_meter_and_scl(path, training, cross_layer, compute, assert_agree, request):
    layer, inputs = cross_layer
    layer.train(training)
    expected = compute(layer, inputs)
    if path == "kernels":
        request.getfixturevalue("kernels")
    report = sclkern.fuse(layer)
    assert_agree(compute(layer, inputs), expected)
    assert not report.left
    assert {(entry.path, entry.by) for entry in report.replaced} == {
        ("attention.self", "ops.attention"),
        ("attention.output", "ops.dropout_add_layer_norm"),
        ("crossattention.self", "ops.attention"),
        ("crossattention.output", "ops.dropout_add_layer_norm"),
        ("intermediate", "ops.bias_gelu (none)"),
        ("output", "ops.dropout_add_layer_norm"),
    }


def test_dropout_is_that_of_the_modules(cross_layer, kernels):
    layer, _ = cross_layer
    sclkern.fuse(layer, only="dropout_add_layer_norm")
    module, residual = layer.output, torch.randn(2, 5, 64)
    module.dropout.p = 1.0
    torch.testing.assert_close(module(torch.randn(2, 5, 96), residual), module.LayerNorm(residual))
    module.eval()
    assert not torch.equal(module(torch.randn(2, 5, 96), residual), module.LayerNorm(residual))


def test_only_this_instance_is_changed(cross_layer):
    layer, _ = cross_layer
    other = copy.deepcopy(layer)
    classes = {id(module): type(module) for module in other.modules()}
    forward = type(layer.output).forward
    sclkern.fuse(layer)
    assert type(other.output).forward is forward and type(other.output) is not type(layer.output)
    assert {id(module): type(module) for module in other.modules()} == classes
    assert isinstance(layer.output, type(other.output))


def test_a_config_shared_by_two_models_is_not_changed(make):
    transformers = pytest.importorskip("transformers")
    model, _ = make("bert")
    other = transformers.BertModel(model.config)
    config = model.config
    assert other.config is config
    with sclkern.fuse(model):
        assert model.config._attn_implementation == "sclkern"
        assert other.config._attn_implementation == "sdpa"
    assert model.config is config


def test_revert_leaves_nothing(make):
    model, _ = make("bridgetower")
    before = {id(module): (type(module), dict(module.__dict__)) for module in model.modules()}
    hooks = {id(module): len(module._forward_pre_hooks) for module in model.modules()}
    report = sclkern.fuse(model)
    report.revert()
    report.revert()
    for module in model.modules():
        cls, attributes = before[id(module)]
        assert type(module) is cls and module.__dict__.keys() == attributes.keys()
        assert len(module._forward_pre_hooks) == hooks[id(module)]
    assert model.config is before[id(model)][1]["config"]


def test_revert_drops_a_forward_that_was_kept_on_the_instance(cross_layer, compute, assert_agree):
    # As transformers 5.0 does, after it has collected attention maps.
    layer, inputs = cross_layer
    expected = compute(layer, inputs)
    with sclkern.fuse(layer):
        for module in (layer.attention.self, layer.crossattention.self, layer.output):
            module.forward = module.forward
        assert_agree(compute(layer, inputs), expected)
    assert_agree(compute(layer, inputs), expected, relative=0)


def test_context_manager_reverts_after_an_error(cross_layer):
    layer, _ = cross_layer
    cls = type(layer.output)
    with pytest.raises(RuntimeError), sclkern.fuse(layer):
        assert type(layer.output) is not cls
        raise RuntimeError
    assert type(layer.output) is cls


def test_revert_refuses_to_lose_a_class_that_was_given_later(cross_layer):
    layer, _ = cross_layer
    own = type(layer.output)
    report = sclkern.fuse(layer)
    fused = type(layer.output)
    layer.output.__class__ = type("FSDPOutput", (fused,), {})
    with pytest.raises(UserError, match="a Output was made a FSDPOutput after fuse"):
        report.revert()
    assert type(layer.attention.self).__mro__[1].__name__ == "FusedSelfAttention"
    layer.output.__class__ = fused
    report.revert()
    assert type(layer.output) is own


def test_report_reads_as_a_table(cross_layer):
    layer, _ = cross_layer
    layer.output.dense.register_forward_hook(lambda *a: None)
    text = str(sclkern.fuse(layer))
    assert "5 modules replaced, 1 left; the ops of 2 run on the model's device, those of 3 on a GPU only" in text
    assert "Output: ops.dropout_add_layer_norm (on a GPU)  [attention.output and 1 more]" in text
    assert "other masks, attention maps, caches: the module's own forward" in text
    assert "CrossAttention: ops.attention  [attention.self and 1 more]" in text
    assert "left: Output: its dense carries hooks, or another forward  [output]" in text


@pytest.mark.parametrize("name", ["bert", "clip", "vilt"])
def test_signatures_stay(name, make):
    """By which transformers' ``Trainer`` chooses the columns of a data set, and what it expects of the loss."""
    model, _ = make(name)
    expected = [inspect.signature(module.forward) for module in model.modules()]
    report = sclkern.fuse(model, strict=False)
    assert report.replaced and [inspect.signature(module.forward) for module in model.modules()] == expected


def test_errors(cross_layer):
    layer, _ = cross_layer
    with pytest.raises(TypeError, match=r"model: got dict, expected a torch\.nn\.Module"):
        sclkern.fuse({})
    with pytest.raises(UserError, match=r"only: got 'norm', expected any of attention, completion_loss, dropout_add"):
        sclkern.fuse(layer, only=["attention", "norm"])
    with pytest.raises(UserError, match=r"nothing in this Sequential could be replaced"):
        sclkern.fuse(nn.Sequential(nn.Linear(2, 2)))
    assert not sclkern.fuse(nn.Sequential(nn.Linear(2, 2)), strict=False).replaced


def test_only_applies_the_named_rules(cross_layer):
    layer, _ = cross_layer
    assert {entry.path for entry in sclkern.fuse(layer, only="linear_gelu", strict=False).replaced} == {"intermediate"}
    rest = sclkern.fuse(layer, only=("attention", "dropout_add_layer_norm"))
    assert len(rest.replaced) == 5
    rest.revert()
    assert "fused" in repr(layer.intermediate) and "fused" not in repr(layer.output)


@pytest.mark.parametrize("name", ["cross_layer", "bert"])
def test_a_second_time_nothing_is_left_to_replace(name, cross_layer, make):
    model = cross_layer[0] if name == "cross_layer" else make(name)[0]
    sclkern.fuse(model)
    with pytest.raises(UserError, match="fused already"):
        sclkern.fuse(model)
    assert not sclkern.fuse(model, strict=False).replaced


class _PreNorm(nn.Module):
    """The children of BERT's output layer, and another formula."""

    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1)

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(self.LayerNorm(hidden_states))) + input_tensor


class _LateDropout(_PreNorm):
    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.LayerNorm(self.dense(hidden_states) + input_tensor))


@pytest.mark.parametrize("kind", [_PreNorm, _LateDropout])
def test_another_formula_is_left(kind):
    report = sclkern.fuse(nn.Sequential(kind()), strict=False)
    (entry,) = report.left
    assert entry.why.startswith("its forward computes something else")


def test_another_scale_is_left(cross_layer):
    layer, _ = cross_layer
    attention = layer.attention.self

    class Unscaled(type(attention)):
        def forward(self, hidden_states, *args):
            return super().forward(hidden_states * 1.3, *args)

    attention.__class__ = Unscaled
    report = sclkern.fuse(layer)
    assert [(entry.path, entry.why) for entry in report.left] == [
        ("attention.self", "its forward computes something else on a small input")
    ]


def test_another_activation_is_left(cross_layer):
    layer, _ = cross_layer
    layer.intermediate.intermediate_act_fn = nn.ReLU()
    report = sclkern.fuse(layer)
    assert [entry.why for entry in report.left] == ["ReLU is no GELU"]


def test_a_layer_of_another_class_is_left(cross_layer, compute, assert_agree, kernels):
    class LowRank(nn.Linear):
        pass

    layer, inputs = cross_layer
    layer.output.dense.__class__ = LowRank
    expected = compute(layer, inputs)
    report = sclkern.fuse(layer)
    assert [entry.why for entry in report.left] == ["its dense is LowRank, not torch's Linear"]
    assert_agree(compute(layer, inputs), expected)


def test_on_the_meta_device_all_is_left(cross_layer):
    with pytest.raises(UserError, match="its parameters are on the meta device"):
        sclkern.fuse(cross_layer[0].to("meta"))


def test_hooks_set_later_run(cross_layer, kernels):
    layer, inputs = cross_layer
    sclkern.fuse(layer)
    called = []
    for module in (layer.output.dense, layer.intermediate.dense, layer.output.LayerNorm, layer.attention.self.key):
        module.register_forward_hook(lambda module, args, out: called.append(module))
    layer(**inputs)
    assert len(called) == 4


def test_one_warning_names_requested_attention_maps(cross_layer):
    layer, inputs = cross_layer
    layer.eval()
    expected = layer(**inputs, output_attentions=True)
    sclkern.fuse(layer)
    _warn_once.cache_clear()
    with pytest.warns(
        UserWarning, match="attention maps are requested: computed by the original forward of CrossAttention"
    ):
        actual = layer(**inputs, output_attentions=True)
    torch.testing.assert_close(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(**inputs, output_attentions=True)


@pytest.mark.parametrize("which", ["head_mask", "soft", "causal"])
def test_what_the_op_cannot_do_is_computed_as_before(which, cross_layer):
    layer, inputs = cross_layer
    module, hidden = layer.attention.self.eval(), inputs["hidden_states"]
    arguments = {
        "head_mask": {"head_mask": torch.tensor([1.0, 0.0])[:, None, None]},
        "soft": {"attention_mask": torch.linspace(-2, 0, 5).expand(2, 1, 1, 5)},
        "causal": {"attention_mask": torch.full((2, 1, 5, 5), -10000.0).triu(1)},
    }[which]
    expected = module(hidden, **arguments)[0]
    sclkern.fuse(layer)
    torch.testing.assert_close(module(hidden, **arguments)[0], expected)


class _Block(nn.Module):
    """A block of CLIP's vision model as OpenAI's and METER's code has it, (L, B, D)."""

    def __init__(self):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(64, 2), nn.LayerNorm(64), nn.LayerNorm(64)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(64, 96))
        self.mlp.add_module("gelu", nn.GELU("tanh"))
        self.mlp.add_module("c_proj", nn.Linear(96, 64))

    def attention(self, x, mask=None):
        return self.attn(x, x, x, need_weights=False, key_padding_mask=mask)[0]

    def forward(self, x, mask=None):
        x = x + self.attention(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


def test_the_block_of_clip_without_transformers(compute, assert_agree, kernels):
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = _Block()

        def forward(self, x, mask):
            return (self.block(x, mask),)

    tower = Tower()
    inputs = {"x": torch.randn(5, 2, 64), "mask": torch.arange(5).expand(2, 5) > 3}
    expected = compute(tower, inputs)
    report = sclkern.fuse(tower)
    assert [entry.by for entry in report.replaced] == ["nn.MultiheadAttention", "ops.bias_gelu (tanh)"]
    assert_agree(compute(tower, inputs), expected)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu", "batch_first": True}])
@pytest.mark.parametrize("only", [None, "attention", "transformer_encoder"])
def test_the_encoder_of_torch(options, only, compute, assert_agree):
    layer = nn.TransformerEncoderLayer(64, 2, 96, 0.0, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 64)
    padding = torch.zeros(x.shape[:2] if options.get("batch_first") else (5, 2), dtype=torch.bool)
    padding[0, -1] = True
    inputs = {"src": x, "src_key_padding_mask": padding}

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model

        def forward(self, **inputs):
            return (self.encoder(**inputs),)

    if not options.get("batch_first"):
        inputs = {"src": x.transpose(0, 1), "src_key_padding_mask": padding.T}
    wrapped = Wrapped()
    expected = compute(wrapped, inputs)
    report = sclkern.fuse(wrapped, only=only)
    assert len(report.replaced) == {None: 3, "attention": 2, "transformer_encoder": 3}[only]
    assert_agree(compute(wrapped, inputs), expected)
    report.revert()
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention and "backend" not in vars(model.layers[0].self_attn)
    assert_agree(compute(wrapped, inputs), expected, relative=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_are_recognised(dtype, cross_layer):
    assert not sclkern.fuse(cross_layer[0].to(dtype)).left


def test_trying_a_module_changes_neither_modes_nor_random_numbers(make):
    model, _ = make("bridgetower")
    model.text_model.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    sclkern.fuse(model)
    assert [module.training for module in model.modules()] == modes
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == dropouts
    assert torch.equal(torch.get_rng_state(), state)


def test_an_attention_by_choice_is_kept(make):
    model, _ = make("bert")
    model.config._attn_implementation_internal = "flash_attention_2"
    report = sclkern.fuse(model, strict=False)
    assert {entry.why for entry in report.left} == {"its attention is 'flash_attention_2' by choice"}
    assert model.config._attn_implementation == "flash_attention_2"
