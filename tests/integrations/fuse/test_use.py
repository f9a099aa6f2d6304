"""A fused model is used as any other: copied, saved, compiled, under autocast, with gradient checkpointing."""

import copy
import pickle

import pytest
import torch

import sclkern


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["cross_layer", "bridgetower"])
def test_copies_are_fused_and_independent(way, name, cross_layer, make, compute, assert_agree, kernels):
    model, inputs = cross_layer if name == "cross_layer" else make(name)
    expected = compute(model, inputs)
    if way == "pickle" and name == "cross_layer":
        pytest.skip("its classes belong to a conftest")
    report = sclkern.fuse(model)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert [type(a) for a in other.modules()] == [type(b) for b in model.modules()]
    assert_agree(compute(other, inputs), expected)
    report.revert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_agree(compute(other, inputs), expected)


@pytest.mark.parametrize("name", ["bert", "clip", "bridgetower", "blip"])
def test_saved_and_loaded_by_transformers(name, make, compute, assert_agree, tmp_path):
    model, inputs = make(name)
    expected, cls = compute(model, inputs), type(model)
    sclkern.fuse(model)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).train()
    assert loaded.config.architectures == [cls.__name__]
    assert_agree(compute(loaded, inputs), expected)


def test_compiles_into_one_graph(cross_layer, compute, assert_agree, kernels):
    layer, inputs = cross_layer
    expected = compute(layer, inputs)
    sclkern.fuse(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual = {key.replace("_orig_mod.", ""): value for key, value in compute(compiled, inputs).items()}
    assert_agree(actual, expected)


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_a_model_compiles_into_one_graph(name, make, kernels):
    model, inputs = make(name)
    if name == "clip":
        model, inputs = model.vision_model, {"pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        sclkern.fuse(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("path", ["cpu", "kernels"])
def test_autocast(path, cross_layer, request):
    layer, inputs = cross_layer
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(**inputs)[0]
    if path == "kernels":
        request.getfixturevalue("kernels")
    sclkern.fuse(layer)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(**inputs)[0]
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["bert", "blip", "vilt"])
@pytest.mark.parametrize("options", [{}, {"output_attentions": True}], ids=["plain", "maps"])
def test_gradient_checkpointing(name, options, make, compute, assert_agree):
    model, inputs = make(name, attn_implementation="eager")
    expected = compute(model, inputs, **options)
    sclkern.fuse(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_agree(compute(model, inputs, **options), expected)
