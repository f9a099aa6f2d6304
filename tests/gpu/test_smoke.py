"""Every op once, small and in bfloat16: the first thing to run where nothing has run yet, and what checkers of memory
errors run over."""

import pytest
import torch

from op_testing import DIFFERENTIABLE, DRAWS, cast, evaluate, small_inputs
from sclkern import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_op_gives_what_eager_ops_give(name):
    torch.manual_seed(0)
    precise = ("temperature",)
    arguments = cast(name, small_inputs(name, 37), torch.bfloat16, precise)
    options = {"absorb": "keys"} if name == "cross_attention" else {}
    ours = evaluate(name, arguments, backend="triton", **options)
    truth = evaluate(name, cast(name, arguments, torch.float32, precise), backend="eager")
    for part, expected in truth.items():
        scale = expected.abs().max().clamp_min(1e-3)
        torch.testing.assert_close(ours[part].float() / scale, expected / scale, rtol=0, atol=0.05, msg=part)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_that_of_the_cpu(name):
    arguments = small_inputs(name, 37)
    on_cpu = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    on_cpu |= {"device": "cpu"} if "device" in on_cpu else {}
    ours, theirs = getattr(ops, name)(**arguments, backend="triton"), getattr(ops, name)(**on_cpu)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)), strict=True):
        assert torch.equal(a.cpu(), b)
