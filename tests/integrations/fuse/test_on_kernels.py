"""The kernels themselves in fused models: on a GPU, or in a process whose Triton interprets them."""

import pytest
import torch

import sclkern
from op_testing import DEVICE, needs_kernels, run_in_interpreter
from sclkern.ops.dispatch import interpreted

# Interpreted, the others take a quarter of a minute.
MODELS = ["clip", "vilt"] + ["bert", "blip", "bridgetower"] * (not interpreted())


@needs_kernels
def test_the_layer_of_meter_and_scl(cross_layer, compute, assert_agree):
    layer, inputs = cross_layer
    layer, inputs = layer.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    expected = compute(layer, inputs)
    sclkern.fuse(layer)
    assert_agree(compute(layer, inputs), expected, relative=1e-4)


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name, make, compute, assert_agree):
    model, inputs = make(name, attn_implementation="eager")
    model.to(DEVICE)
    inputs = {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in inputs.items()}
    expected = compute(model, inputs)
    sclkern.fuse(model)
    assert_agree(compute(model, inputs), expected, relative=1e-4)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
