"""A bias of the scores in models of transformers: beside the mask as in T5, or part of it as in BEiT."""

import copy

import pytest
import torch

import sclkern
from sclkern import ops
from sclkern.integrations.huggingface.fusing import dispatches
from sclkern.integrations.huggingface.interface import attention
from sclkern.integrations.huggingface.warn import _warn_once
from swapped_models.checks import agree, compute, outputs
from swapped_models.inputs import make_inputs
from swapped_models.tiny import stir, tiny

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def registered():
    sclkern.register_attention()
    _warn_once.cache_clear()


@pytest.fixture
def biases(monkeypatch):
    """The bias of each call of ``ops.attention`` from the interface."""
    calls = []

    def spy(query, key, value, *, bias=None, **options):
        calls.append(bias)
        return ops.attention(query, key, value, bias=bias, **options)

    spied = type("ops", (), {"attention": staticmethod(spy)})
    monkeypatch.setattr("sclkern.integrations.huggingface.interface.ops", spied)
    return calls


def build(name, implementation="eager", **sizes):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = tiny(cls.config_class, **sizes)
    model = stir(cls._from_config(config, attn_implementation=implementation).double()).eval()
    if not any(map(dispatches, model.modules())):
        pytest.skip(f"{name} of this transformers computes its attention itself")
    torch.set_default_dtype(torch.float64)
    try:
        return model, make_inputs(model, {})
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("path", ["cpu", "kernels"])
@pytest.mark.parametrize("way", ["fused", "selected"])
@pytest.mark.parametrize("name", ["T5EncoderModel", "LayoutLMv3Model"])
def test_beside_the_mask(name, way, path, biases, request):
    sizes = {} if name != "LayoutLMv3Model" else {"input_size": 32, "coordinate_size": 12, "shape_size": 8}
    model, inputs = build(name, **sizes)
    expected = compute(model, inputs)
    # LayoutLMv3 computes its bias without gradients.
    learned = any("relative_attention_bias.weight" in key for key in expected)
    assert learned == (name == "T5EncoderModel")
    if path == "kernels":
        request.getfixturevalue("kernels")
    if way == "fused":
        ours = copy.deepcopy(model)
        report = sclkern.fuse(ours, only="attention")
        assert len(report.replaced) == 2 and not report.left
    else:
        ours, _ = build(name, "sclkern", **sizes)
    agree(compute(ours, inputs), expected, 1e-5)
    assert len(biases) == 2 and all(bias is not None for bias in biases)
    # Maps are the model's own.
    options = {"output_attentions": True}
    agree(outputs(ours, inputs, **options), outputs(model, inputs, **options), 1e-5, maps=True)
    assert len(biases) == 2


def test_beside_a_causal_mask(biases):
    model, inputs = build("T5ForConditionalGeneration")
    expected = compute(model, inputs)
    ours = copy.deepcopy(model)
    report = sclkern.fuse(ours, only="attention")
    assert {one.path.split(".")[0] for one in report.replaced} == {"encoder", "decoder"}
    assert {one.why for one in report.left} == {"causal attention, which torch's attention computes"}
    agree(compute(ours, inputs), expected, 1e-5)
    # Two layers of self-attention in the encoder, and of cross-attention in the decoder.
    assert len(biases) == 4
    selected, _ = build("T5ForConditionalGeneration", "sclkern")
    with pytest.warns(UserWarning, match="a position bias beside a mask that differs between queries"):
        agree(compute(selected, inputs), expected, 1e-5)


def test_beside_a_mask_that_adds_numbers(biases):
    model, inputs = build("T5EncoderModel")
    ours = copy.deepcopy(model)
    sclkern.fuse(ours, only="attention")
    mask = torch.zeros(3, 1, 6, 6, dtype=torch.float64)
    mask[..., 2] = 1.5
    ids = inputs["input_ids"][:, :6]
    with pytest.warns(UserWarning, match="a position bias beside a mask that adds numbers other than 0"):
        found = ours(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask)[0])
    assert not biases


def test_within_the_mask(biases):
    model, inputs = build("BeitModel", use_relative_position_bias=True)
    expected = compute(model, inputs)
    table = [key for key in expected if "relative_position_bias_table" in key]
    assert len(table) == 2
    ours = copy.deepcopy(model)
    sclkern.fuse(ours, only="attention")
    agree(compute(ours, inputs), expected, 1e-5)
    assert len(biases) == 2 and all(bias is not None for bias in biases)
    # Without a gradient torch's attention is as good.
    agree(outputs(ours, inputs), outputs(model, inputs), 1e-5)
    assert len(biases) == 2


def test_a_learned_mask_that_the_op_does_not_take_is_not_lost(biases):
    module = transformers.BertModel(tiny(transformers.BertConfig)).encoder.layer[0].attention.self
    query, key, value = (torch.randn(2, 2, 5, width, dtype=torch.float64) for width in (32, 32, 16))
    mask = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="values in their width: computed by torch's attention"):
        out, _ = attention(module, query, key, value, mask, scaling=0.25)
    expected = (query @ key.mT * 0.25 + mask).softmax(-1) @ value
    torch.testing.assert_close(out, expected.transpose(1, 2))
    grads = [torch.autograd.grad(one.square().sum(), mask)[0] for one in (out, expected)]
    torch.testing.assert_close(*grads)
    assert not biases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
def test_a_mask_in_a_narrower_dtype(dtype, learned, biases):
    model, inputs = build("BertModel")
    mask = torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8).to(dtype).requires_grad_(learned)
    call = {"input_ids": inputs["input_ids"][:, :8], "attention_mask": mask}
    ours = copy.deepcopy(model)
    sclkern.fuse(ours, only="attention")
    torch.testing.assert_close(ours(**call)[0], model(**call)[0])
    assert len(biases) == 2 * learned


def test_under_autocast(biases):
    model, inputs = build("T5EncoderModel")
    model = model.float()
    ours = copy.deepcopy(model)
    sclkern.fuse(ours, only="attention")
    with torch.autocast("cpu", torch.bfloat16):
        found, truth = ours(**inputs)[0], model(**inputs)[0]
    assert found.dtype == truth.dtype and len(biases) == 2
    torch.testing.assert_close(found, truth, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_compiled():
    model, inputs = build("T5EncoderModel", "sclkern")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs["input_ids"])[0], model(inputs["input_ids"])[0])
