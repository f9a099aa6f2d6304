"""Every op once, small and in bfloat16: the first thing to run where nothing has run yet, and what checkers of memory
errors run over."""

import pytest
import torch
from op_cases import CASES
from whole_shapes import cast, run

from sclkern import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DRAWS = ("mask_text", "select_patches", "select_tokens")


@pytest.mark.parametrize("name", [name for name in CASES if name not in DRAWS])
def test_an_op_gives_what_eager_ops_give(name):
    torch.manual_seed(0)
    precise = ("temperature",)
    arguments = cast(name, CASES[name].arguments(37), torch.bfloat16, precise)
    options = {"absorb": "keys"} if name == "cross_attention" else {}
    ours = run(name, arguments, backend="triton", **options)
    truth = run(name, cast(name, arguments, torch.float32, precise), backend="eager")
    for part, expected in truth.items():
        scale = expected.abs().max().clamp_min(1e-3)
        torch.testing.assert_close(ours[part].float() / scale, expected / scale, rtol=0, atol=0.05, msg=part)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_that_of_the_cpu(name):
    arguments = CASES[name].arguments(37)
    on_cpu = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    on_cpu |= {"device": "cpu"} if "device" in on_cpu else {}
    ours, theirs = getattr(ops, name)(**arguments, backend="triton"), getattr(ops, name)(**on_cpu)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)), strict=True):
        assert torch.equal(a.cpu(), b)
