"""Every op at the shapes of the workload: errors against float64, and the same with NaN in fresh memory."""

import pytest
import torch

from op_testing import SHAPES, assert_op_as_exact, cast, evaluate, inputs_at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_that_of_eager(name, dtype):
    torch.manual_seed(0)
    op, shape = SHAPES[name]
    assert_op_as_exact(op, cast(op, inputs_at(op, shape), dtype, shape.float32), shape)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_depends_on_what_memory_held(name, poisoned_memory):
    assert torch.empty(1000, device="cuda").isnan().all() and torch.empty(2**24, device="cuda").isnan().all()
    torch.manual_seed(0)
    op, shape = SHAPES[name]
    arguments = cast(op, inputs_at(op, shape), torch.bfloat16, shape.float32)
    first = evaluate(op, arguments, backend="triton", **shape.kernel_options)
    torch.cuda.empty_cache()
    second = evaluate(op, arguments, backend="triton", **shape.kernel_options)
    for result, value in first.items():
        assert value.isfinite().all(), result
        assert torch.equal(value, second[result]), result
