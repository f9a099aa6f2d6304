"""Bytes and operations of the workload, against figures counted by hand."""

from __future__ import annotations

import pytest

from sclkern import ops
from sclkern.tools.bench.workload import CAPTIONS, PLANNED, WORKLOAD, Rates, floor


def cost(op: str, name: str, element: int = 2):
    work = WORKLOAD[op]
    return work.cost(next(size.values for size in work.gpu if size.name == name), element)


def test_every_op_has_its_work():
    assert set(WORKLOAD) == set(ops.OPS)
    for op, work in WORKLOAD.items():
        for sizes in (work.gpu, work.cpu):
            assert len({size.name for size in sizes}) == len(sizes) > 0, op
            assert min(size.importance for size in work.gpu) >= 1 and max(size.importance for size in work.gpu) <= 3


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
        ("linear_cross_entropy", "125", 2 * 125 * 50265 * 768, 77.4),
        ("dropout_add_layer_norm", "64x325", 0, 95.8),
    ],
)
def test_costs_counted_by_hand(op, name, operations, megabytes):
    found = cost(op, name)
    assert found.forward_flops == operations
    assert found.forward_bytes / 1e6 == pytest.approx(megabytes, abs=0.1)


def test_padding_of_captions_is_not_counted():
    found = cost("attention", "325x13")
    keys = sum((CAPTIONS * 4)[:64])
    assert found.forward_flops == 4 * 768 * 325 * keys
    assert found.forward_bytes == 2 * 768 * (2 * 64 * 325 + 2 * keys) + 4 * 12 * 64 * 325


def test_a_cross_attention_takes_the_form_that_multiplies_least():
    tokens = sum((CAPTIONS * 4)[:64])
    plain = 4 * (64 * 325 + tokens) * 768**2
    assert cost("cross_attention", "325x13").forward_flops < plain / 2


def test_the_floor_is_the_slower_of_memory_and_products():
    found = cost("attention", "325x13")
    assert floor(found, "forward", PLANNED) == found.forward_bytes / PLANNED.bandwidth
    slow = Rates(1e15, 1e9)
    assert floor(found, "backward", slow) == found.backward_flops / 1e9
    both = floor(found, "forward", PLANNED) + floor(found, "backward", PLANNED)
    assert floor(found, "both", PLANNED) == both
    assert found.of("both")[0] == found.forward_bytes + found.backward_bytes
