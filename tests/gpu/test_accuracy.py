"""Every op at the shapes of the workload: errors against float64, and the same with NaN in fresh memory."""

import pytest
import torch
from whole_shapes import WHOLE, cast, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_as_exact_as_eager(whole, dtype):
    """Root mean square and largest error are at most 1.5 times those of eager ops in the same dtype, and rounding: half
    a unit in the last place, and a float32's of the largest number on the way; for the largest error two units in half
    precision and eight in float32, where other orders of summing meet."""
    arguments = cast(whole.op, whole.arguments(), dtype, whole.precise)
    exact = cast(whole.op, arguments, torch.float64)
    form = {"absorb": "never"} if whole.op == "cross_attention" else {}
    truth = run(whole.op, exact, backend="eager", **form)
    eager = run(whole.op, arguments, backend="eager", **form)
    ours = run(whole.op, arguments, backend="triton", **whole.kernel)
    failures = []
    for part, expected in truth.items():
        a, b = ours[part], eager[part]
        assert a.dtype == b.dtype and a.shape == b.shape, part
        eps, mean, largest = torch.finfo(a.dtype).eps, *sizes(expected)
        on_the_way = torch.finfo(torch.float32).eps * whole.largest
        (mean_error, largest_error), (mean_allowed, largest_allowed) = (sizes(x - expected) for x in (a, b))
        if not mean_error <= 1.5 * mean_allowed + eps / 2 * mean + on_the_way * max(mean, part == "out"):
            failures.append((part, "root mean square", mean_error, mean_allowed, mean))
        rounding = eps * (8 if a.dtype == torch.float32 else 2) * largest + on_the_way * max(largest, part == "out")
        if not largest_error <= 1.5 * largest_allowed + rounding:
            failures.append((part, "largest", largest_error, largest_allowed, largest))
    assert not failures, failures


def sizes(x):
    """Root mean square and largest magnitude."""
    return x.double().square().mean().sqrt().item(), x.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_error_is_at_most_that_of_eager(name, dtype):
    torch.manual_seed(0)
    assert_as_exact_as_eager(WHOLE[name], dtype)


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_depends_on_what_memory_held(name, poisoned_memory):
    assert torch.empty(1000, device="cuda").isnan().all() and torch.empty(2**24, device="cuda").isnan().all()
    torch.manual_seed(0)
    whole = WHOLE[name]
    arguments = cast(whole.op, whole.arguments(), torch.bfloat16, whole.precise)
    found = run(whole.op, arguments, backend="triton", **whole.kernel)
    torch.cuda.empty_cache()
    again = run(whole.op, arguments, backend="triton", **whole.kernel)
    for part, value in found.items():
        assert value.isfinite().all(), part
        assert torch.equal(value, again[part]), part
