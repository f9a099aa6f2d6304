"""The same wrong argument raises the same error in every op that takes it, before any work."""

import inspect

import pytest
import torch

from op_testing import small_inputs
from sclkern import ops
from sclkern.ops import _checks

NOT_INT64 = torch.zeros(1)
TWO = torch.zeros(2, dtype=torch.int64)
NUMBER = [
    (True, TypeError, "got bool, expected a number"),
    ("0.1", TypeError, "got str, expected a number"),
    (float("nan"), ValueError, "got nan, expected a finite number"),
    (float("inf"), ValueError, "got inf, expected a finite number"),
]
INTEGER = [
    (True, TypeError, "got bool, expected an int"),
    (1.5, TypeError, "got float, expected an int"),
]
NEGATIVE = (-1, ValueError, "got -1, expected an int")
SEED = [
    (1.5, TypeError, "got float, expected an int, an int64 tensor of one element"),
    (True, TypeError, "got bool, expected an int, an int64 tensor of one element"),
    (NOT_INT64, TypeError, r"got torch\.float32, expected torch\.int64"),
    (TWO, ValueError, r"got shape \(2,\), expected one element"),
    (TWO[:1].to("meta"), ValueError, "got device meta, expected"),
]
PROBABILITY = [
    *NUMBER,
    (1.5, ValueError, "got 1.5, expected a finite number from 0 to 1"),
    (-0.1, ValueError, "got -0.1"),
]
BOOLEAN = [(1, TypeError, "got int, expected a bool"), (None, TypeError, "got NoneType, expected a bool")]
NAME = [("no such", ValueError, "got 'no such', expected one of ")]
MASK = [
    (torch.zeros(2, 5), TypeError, r"got torch\.float32, expected torch\.bool"),
    ([True], TypeError, "got list, expected a tensor"),
    (torch.zeros(7, 7, 7, dtype=torch.bool), ValueError, r"got shape \(7, 7, 7\), expected \("),
]
IDS = [
    ([0, 1], TypeError, "got list, expected a tensor"),
    (NOT_INT64, TypeError, r"got torch\.float32, expected torch\.int64"),
    (TWO.expand(7, 7, 2), ValueError, r"got shape \(7, 7, 2\), expected \("),
]
# Wrong values of the arguments that are no floating tensors, whichever op takes them.
WRONG = {
    "absorb": NAME,
    "approximate": NAME,
    "backend": NAME,
    "batch": [*INTEGER, NEGATIVE],
    "directions": NAME,
    "dropout_ids": IDS,
    "dropout_p": PROBABILITY,
    "eps": [*NUMBER, (-1.0, ValueError, "got -1.0, expected a")],
    "gather": NAME,
    "ignore_index": INTEGER,
    "keep_ratio": PROBABILITY,
    "key_padding_mask": MASK,
    "kind": NAME,
    "mask_id": [*INTEGER, NEGATIVE],
    "max_seqlen_k": [*INTEGER, NEGATIVE],
    "max_seqlen_q": [*INTEGER, NEGATIVE],
    "normalize": BOOLEAN,
    "num_frames": [*INTEGER, NEGATIVE],
    "num_heads": [*INTEGER, NEGATIVE],
    "num_patches": [*INTEGER, NEGATIVE],
    "published": BOOLEAN,
    "ratio": PROBABILITY,
    "reduction": NAME,
    "replace": MASK,
    "return_copy": BOOLEAN,
    "return_hits": BOOLEAN,
    "return_lse": BOOLEAN,
    "return_sum": BOOLEAN,
    "row_ids": [*IDS, (TWO.to("meta"), ValueError, "got (shape|device) ")],
    "same": IDS,
    "scale": NUMBER,
    "seed": SEED,
    "softmax_scale": NUMBER,
    "temperature": [*NUMBER, (0.0, ValueError, "got 0.0, expected a positive number")],
    "valid": MASK,
    "vocab_size": [*INTEGER, NEGATIVE],
}
# Integer tensors have tests of their own in the files of their ops; a group is torch's.
ELSEWHERE = {"cu_seqlens_k", "cu_seqlens_q", "device", "group", "ids", "keep", "labels", "lengths"}


# Floating arguments that are optional, and not among the small inputs.
OPTIONAL = {"attention": {"bias": torch.zeros(1, 1, 5, 5)}}


def good_arguments(op):
    torch.manual_seed(0)
    inputs = small_inputs(op, 5) | OPTIONAL.get(op, {})
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()} | (
        {"device": "cpu"} if "device" in inputs else {}
    )


def floating(op):
    arguments = good_arguments(op)
    return [n for n, value in arguments.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]


CASES = [
    pytest.param(op, name, *wrong, id=f"{op}-{name}-{place}")
    for op, function in ops.OPS.items()
    for name in inspect.signature(function).parameters
    for place, wrong in enumerate(WRONG.get(name, ()))
]
FLOATING = [(op, name) for op in ops.OPS for name in floating(op)]


@pytest.mark.parametrize(("op", "name", "value", "error", "message"), CASES)
def test_a_wrong_argument_is_named(op, name, value, error, message):
    with pytest.raises(error, match=f"^{name}: {message}"):
        ops.OPS[op](**(good_arguments(op) | {name: value}))


@pytest.mark.parametrize(("op", "name"), FLOATING)
def test_a_floating_tensor_of_another_kind_is_named(op, name):
    arguments = good_arguments(op)
    tensor = arguments[name]
    with pytest.raises(TypeError, match=rf"^{name}: got torch\.int64, expected a floating dtype"):
        ops.OPS[op](**(arguments | {name: tensor.long()}))
    if name not in ("temperature", "scale") and (op, name) != ("sigmoid_loss", "bias"):
        with pytest.raises(TypeError, match=f"^{name}: got list, expected a tensor"):
            ops.OPS[op](**(arguments | {name: tensor.tolist()}))
    # Of the first tensor the device is right, and that of the next is wrong; the same of its shape.
    with pytest.raises(ValueError, match=r"got device (meta|cpu), expected that of "):
        ops.OPS[op](**(arguments | {name: tensor.to("meta")}))
    with pytest.raises(ValueError, match=r": got shape \(.*\), expected "):
        ops.OPS[op](**(arguments | {name: tensor.new_zeros((*tensor.shape, 3, 3, 3, 3))}))


def test_the_table_covers_every_argument():
    taken = {name for function in ops.OPS.values() for name in inspect.signature(function).parameters}
    assert set(WRONG) | ELSEWHERE | {name for _, name in FLOATING} == taken


def test_explain_refuses_what_the_op_refuses():
    for op, name, value, error, _ in (case.values for case in CASES):
        with pytest.raises(error, match=f"^{name}: "):
            ops.explain(op, **(good_arguments(op) | {name: value}))


def test_what_none_means():
    assert _checks.given(a=None, b=NOT_INT64) == {"b": NOT_INT64}
    with pytest.raises(TypeError, match="a: got NoneType, expected a tensor"):
        _checks.floating(a=None)
