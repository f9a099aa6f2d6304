"""The specs of ops: one for every op, with sizes, kernels, and costs that were counted by hand."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import sclkern
from sclkern import ops
from sclkern.tools.bench.roofline import H200, MachineSpec, lower_bound
from sclkern.tools.specs import SPECS, captions

CAPTIONS = captions(16)
KERNELS = Path(sclkern.__file__).resolve().parents[1] / "kernels"


def cost(op: str, name: str, element: int = 2):
    spec = SPECS[op]
    return spec.cost(next(size.values for size in spec.sizes if size.name == name), element)


def test_every_op_has_a_spec():
    assert set(SPECS) == set(ops.OPS)
    for op, spec in SPECS.items():
        assert spec.name == spec.definition.__name__ == op
        for sizes in (spec.sizes, spec.cpu_sizes):
            assert len({size.name for size in sizes}) == len(sizes) > 0, op
            assert {size.priority for size in sizes} <= {1, 2, 3}, op
        assert all((KERNELS / f"{module}.py").is_file() for module in spec.kernels), op
        # Tests on a GPU compare every op that differentiates with float64.
        assert bool(spec.accuracy) == spec.differentiable, op
        assert len({shape.name for shape in spec.accuracy}) == len(spec.accuracy), op


@pytest.mark.parametrize("op", SPECS)
def test_inputs_name_what_they_say(op):
    spec = SPECS[op]
    small = spec.small_inputs(6, "cpu")
    assert {*spec.frozen, *spec.detached, *spec.float32} <= set(small)
    parameters = inspect.signature(getattr(ops, op)).parameters
    at_a_size = spec.inputs(spec.cpu_sizes[0].values, torch.float32, "cpu")
    for inputs in (small, at_a_size):
        assert set(inputs) <= set(parameters)
        assert bool(spec.leaves(inputs)) == spec.differentiable
    assert spec.dropout == ("dropout_p" in parameters)


def test_detached_inputs_are_no_leaves():
    spec = SPECS["completion_loss"]
    assert spec.leaves(spec.inputs({"N": 4}, torch.float32, "cpu")) == ("recovered",)
    assert "images" not in SPECS["embed_patches"].leaves(SPECS["embed_patches"].small_inputs(2, "cpu"))


def test_a_longest_caption_comes_first():
    assert captions(3) == CAPTIONS[:3]
    assert captions(4, 50) == [50, 13, 12, 14] and captions(4, 12) == [12, 12, 12, 12]


def test_captions_have_13_tokens_on_average():
    assert sum(CAPTIONS) / len(CAPTIONS) == pytest.approx(13, abs=0.1)


# From 64 samples of 12 heads of 64 channels: 4 * 64 * 12 * 64 * 325 * 325 and so on.
@pytest.mark.parametrize(
    ("op", "name", "operations", "megabytes"),
    [
        ("attention", "325", 4 * 64 * 12 * 64 * 325**2, 128.8),
        ("attention", "65", 4 * 64 * 12 * 64 * 65**2, 25.8),
        ("frame_attention", "4x197", 4 * 64 * 12 * 64 * (4 * 788 + 4 * 196 * 197), 312.3),
        ("completion_loss", "4096", 2 * 4096**2 * 768, 12.6),
        ("completion_loss", "4096 of 8192", 2 * 4096 * 8192 * 768, 18.9),
        ("linear_cross_entropy", "125", 2 * 125 * 50265 * 768, 77.4),
        ("dropout_add_layer_norm", "64x325", 0, 95.8),
    ],
)
def test_costs_counted_by_hand(op, name, operations, megabytes):
    work = cost(op, name)
    assert work.forward_flops == operations
    assert work.forward_bytes / 1e6 == pytest.approx(megabytes, abs=0.1)


def test_padding_of_captions_is_not_counted():
    work = cost("attention", "325x13")
    keys = sum(captions(64))
    assert work.forward_flops == 4 * 768 * 325 * keys
    assert work.forward_bytes == 2 * 768 * (2 * 64 * 325 + 2 * keys) + 4 * 12 * 64 * 325


def test_a_cross_attention_takes_the_form_that_multiplies_least():
    tokens = sum(captions(64))
    plain = 4 * (64 * 325 + tokens) * 768**2
    assert cost("cross_attention", "325x13").forward_flops < plain / 2


def test_the_lower_bound_is_the_slower_of_memory_and_products():
    work = cost("attention", "325x13")
    assert lower_bound(work, "forward", H200) == work.forward_bytes / H200.bandwidth
    slow = MachineSpec(1e15, 1e9)
    assert lower_bound(work, "backward", slow) == work.backward_flops / 1e9
    both = lower_bound(work, "forward", H200) + lower_bound(work, "backward", H200)
    assert lower_bound(work, "both", H200) == both
    assert work.of("both")[0] == work.forward_bytes + work.backward_bytes
