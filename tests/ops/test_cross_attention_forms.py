"""``cross_attention``: which form a call takes, what a form costs, and which input is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from op_testing import DEVICE, needs_kernels, run_in_interpreter
from sclkern import reference
from sclkern.ops import cross_attention, explain
from sclkern.ops.cross_attention import plan_form, relative_costs


def inputs(batch, queries, keys, width):
    """The six tensors."""
    shapes = (batch, queries, width), (batch, keys, width), (3 * width, width), (3 * width,), (width, width), (width,)
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


@pytest.mark.parametrize(("queries", "keys"), [(65, 9), (9, 65), (30, 30)])
def test_costs_are_what_is_multiplied(queries, keys):
    tensors = inputs(2, queries, keys, 96)
    counts = {}
    for absorb in ("never", "keys", "queries"):
        with FlopCounterMode(display=False) as counter:
            reference.cross_attention(*tensors, num_heads=3, absorb=absorb)
        counts[absorb] = counter.get_total_flops()
    for absorb, share in relative_costs(queries, keys, 96, 3, keys).items():
        # The bias of the queries times the keys is left out of the count.
        assert counts[absorb] / counts["never"] == pytest.approx(share, rel=0.01)


def chosen(queries, keys, width=768, **options):
    return plan_form(queries, keys, width, 12, torch.zeros(1, device=DEVICE), **options)


def test_the_form_with_the_fewest_products_is_taken():
    lengths = {(325, 13): "keys", (13, 325): "queries", (65, 13): "keys", (13, 13): "never", (325, 325): "never"}
    lengths |= {(325, 30): "keys", (325, 60): "never"}
    for pair, form in lengths.items():
        assert chosen(*pair)[0] == chosen(*pair, backend="eager")[0] == form, pair
        assert chosen(*pair, absorb="queries", backend="eager")[0] == "queries"


@needs_kernels
def test_triton_by_name_takes_forms_that_have_a_kernel():
    assert [chosen(13, 325, backend=b)[:2] for b in ("auto", "triton")] == [chosen(13, 325, dropout_p=0.1)[:2]] * 2
    assert chosen(13, 325)[0] == "queries" and chosen(13, 325)[1].path == "triton-absorbed-queries"
    assert [chosen(13, 5000, backend=b)[0] for b in ("auto", "triton")] == ["queries", "never"]
    assert chosen(13, 5000, dropout_p=0.1)[0] == "never"
    assert chosen(325, 13, dropout_p=0.1)[:2] == chosen(325, 13, backend="triton")[:2]
    with pytest.raises(ValueError, match="queries of more than 4096 keys there is no kernel"):
        chosen(13, 5000, absorb="queries", backend="triton")
    with pytest.raises(ValueError, match="more than 32 keys there is no kernel"):
        chosen(325, 40, absorb="keys", backend="triton")
    # Heads of 8 channels are not for attention's kernel.
    assert chosen(325, 13, width=96, backend="triton")[0] == "keys"


def test_explains_the_form():
    tensors = inputs(1, 325, 13, 64)
    assert "; absorbed into the 13 keys: 0." in str(explain("cross_attention", *tensors, num_heads=1))
    tensors[0] = tensors[0][:, :13]
    assert "; nothing absorbed: keys would take 1." in str(explain("cross_attention", *tensors, num_heads=1))
    never = explain("cross_attention", *tensors, num_heads=1, absorb="never")
    assert str(never).endswith("; nothing absorbed, as requested")
    assert "not given, assumed supported: num_heads" in str(explain("cross_attention", *tensors))


T = [torch.zeros(2, 3, 8), torch.zeros(2, 5, 8), torch.zeros(24, 8), torch.zeros(24), torch.zeros(8, 8), torch.zeros(8)]


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({0: T[0][0]}, {}, ValueError, r"x: got shape \(3, 8\), expected \(B, Lq, W\)"),
        ({0: T[0].long()}, {}, TypeError, r"x: got torch\.int64"),
        ({1: T[1].half()}, {}, TypeError, r"context: got torch\.float16, expected that of x, torch\.float32"),
        ({1: T[1][:1]}, {}, ValueError, r"context: got shape \(1, 5, 8\), expected \(B, Lk, W\) = \(2, any, 8\)"),
        ({2: T[2][:8]}, {}, ValueError, r"in_weight: got shape \(8, 8\), expected \(3 W, W\)"),
        ({3: T[3][:8]}, {}, ValueError, r"in_bias: got shape \(8,\), expected \(3 W,\)"),
        ({4: T[4][:1]}, {}, ValueError, r"out_weight: got shape \(1, 8\), expected \(W, W\)"),
        ({5: T[5].to("meta")}, {}, ValueError, r"out_bias: got device meta, expected that of x, cpu"),
        ({}, {"num_heads": 3}, ValueError, r"num_heads: got 3, expected a divisor of W = 8"),
        ({}, {"num_heads": 2.0}, TypeError, r"num_heads: got float"),
        ({}, {"absorb": "values"}, ValueError, r"absorb: got 'values', expected one of auto, never, keys, queries"),
        ({}, {"key_padding_mask": torch.ones(2, 5)}, TypeError, r"key_padding_mask: got torch\.float32"),
        ({}, {"key_padding_mask": torch.ones(2, 3) > 0}, ValueError, r"key_padding_mask: got shape \(2, 3\)"),
        ({}, {"backend": "cuda"}, ValueError, r"backend: got 'cuda'"),
    ],
)
def test_bad_input_is_named(changes, options, error, message):
    arguments = [changes.get(index, tensor) for index, tensor in enumerate(T)]
    with pytest.raises(error, match=message):
        cross_attention(*arguments, **{"num_heads": 2, **options})


def test_in_the_interpreter():
    run_in_interpreter(__file__)
