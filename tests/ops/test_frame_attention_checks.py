"""``frame_attention``: what its kernel cannot take, and which input is refused."""

import math

import pytest
import torch

from op_testing import run_in_interpreter
from sclkern.ops import explain, frame_attention

Q = torch.zeros(2, 6, 1, 32)


def test_explains_what_it_cannot_do():
    assert str(explain("frame_attention", *[Q[..., :20]] * 3)).startswith("eager: head dim 20 has no kernel")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[0], Q, Q, 2), {}, ValueError, r"query: got shape \(6, 1, 32\), expected \(B, F \* \(1 \+ P\), H, D\)"),
        ((Q[:, :0],) * 3 + (2,), {}, ValueError, r"query: got shape \(2, 0, 1, 32\)"),
        ((Q.long(), Q, Q, 2), {}, TypeError, r"query: got torch\.int64"),
        ((Q, Q.half(), Q, 2), {}, TypeError, r"key: got torch\.float16, expected that of query, torch\.float32"),
        ((Q, Q[:, :3], Q, 2), {}, ValueError, r"key: got shape \(2, 3, 1, 32\), expected .* = \(2, 6, 1, 32\)"),
        ((Q, Q, Q.to("meta"), 2), {}, ValueError, r"value: got device meta, expected that of query, cpu"),
        ((Q, Q, Q, 4), {}, ValueError, r"num_frames: got 4 for a length of 6, expected a divisor"),
        ((Q, Q, Q, 0), {}, ValueError, r"num_frames: got 0, expected an int of at least 1"),
        ((Q, Q, Q, 2.0), {}, TypeError, r"num_frames: got float, expected an int"),
        ((Q, Q, Q, True), {}, TypeError, r"num_frames: got bool"),
        ((Q, Q, Q, 2), {"softmax_scale": math.inf}, ValueError, r"softmax_scale: got inf"),
        ((Q, Q, Q, 2), {"softmax_scale": "a"}, TypeError, r"softmax_scale: got str"),
        ((Q, Q, Q, 2), {"backend": "cuda"}, ValueError, r"backend: got 'cuda'"),
        ((*[Q[..., :20]] * 3, 2), {"backend": "triton"}, ValueError, r"head dim 20 has no kernel"),
        ((Q, Q, Q, 2), {"backend": "triton", "softmax_scale": -1.0}, ValueError, r"softmax_scale -1\.0 is not above 0"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        frame_attention(*arguments, **options)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
