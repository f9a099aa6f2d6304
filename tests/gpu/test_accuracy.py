"""Every op at the shapes of the workload: errors against float64, and the same with NaN in fresh memory."""

import pytest
import torch

from op_testing import SHAPES, cast, evaluate, inputs_at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_as_exact_as_eager(op, shape, dtype):
    """Root mean square and largest error are at most 1.5 times those of eager ops in the same dtype, plus rounding.

    Rounding is half a unit in the last place and a float32 unit of the largest intermediate value. The largest error
    gets two units in half precision and eight in float32, where sums in different orders meet.
    """
    arguments = cast(op, inputs_at(op, shape), dtype, shape.float32)
    exact = cast(op, arguments, torch.float64)
    form = {"absorb": "never"} if op == "cross_attention" else {}
    truth = evaluate(op, exact, backend="eager", **form)
    eager = evaluate(op, arguments, backend="eager", **form)
    ours = evaluate(op, arguments, backend="triton", **shape.kernel_options)
    failures = []
    for result, expected in truth.items():
        a, b = ours[result], eager[result]
        assert a.dtype == b.dtype and a.shape == b.shape, result
        eps, mean, largest = torch.finfo(a.dtype).eps, *sizes(expected)
        intermediate = torch.finfo(torch.float32).eps * shape.magnitude
        (mean_error, largest_error), (mean_allowed, largest_allowed) = (sizes(x - expected) for x in (a, b))
        if not mean_error <= 1.5 * mean_allowed + eps / 2 * mean + intermediate * max(mean, result == "out"):
            failures.append((result, "root mean square", mean_error, mean_allowed, mean))
        rounding = eps * (8 if a.dtype == torch.float32 else 2) * largest + intermediate * max(largest, result == "out")
        if not largest_error <= 1.5 * largest_allowed + rounding:
            failures.append((result, "largest", largest_error, largest_allowed, largest))
    assert not failures, failures


def sizes(x):
    """Root mean square and largest magnitude."""
    return x.double().square().mean().sqrt().item(), x.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_that_of_eager(name, dtype):
    torch.manual_seed(0)
    assert_as_exact_as_eager(*SHAPES[name], dtype)


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
