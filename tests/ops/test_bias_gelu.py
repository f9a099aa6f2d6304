"""``bias_gelu``: the eager path here; the kernel in the interpreter (`make test` runs it) or on a GPU."""

import pytest
import torch

from op_testing import DEVICE, DTYPES, needs_kernels, run_in_interpreter, thorough_except
from sclkern import ops, reference
from sclkern.kernels.config import override

KINDS = ["none", "tanh", "quick"]
SHAPES = [(1, 1), (3, 17), (8, 256), (9, 257), (33, 768), (2, 3, 5, 40), (0, 8), (7, 0)]


def inputs(shape, dtype, bias_dtype=None, scale=3.0):
    x = (scale * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(shape[-1:]).to(DEVICE, bias_dtype or dtype).requires_grad_()
    return x, bias, torch.randn(shape).to(DEVICE, dtype)


def run(function, x, bias, grad, dtype=None, **options):
    x, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias))
    out = function(x, bias, **options)
    return [out, *torch.autograd.grad(out, (x, bias), grad.to(out.dtype))]


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", thorough_except([(9, 257), (33, 768)], SHAPES), ids=str)
def test_error_is_at_most_that_of_eager(shape, dtype, kind):
    x, bias, grad = inputs(shape, dtype)
    truth = run(reference.bias_gelu, x, bias, grad, torch.float64, approximate=kind)
    eager = run(reference.bias_gelu, x, bias, grad, approximate=kind)
    ours = run(ops.bias_gelu, x, bias, grad, approximate=kind, backend="triton")
    for name, a, b, t in zip(("out", "grad_x", "grad_bias"), ours, eager, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if not t.numel():
            continue
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        # Half a unit in the last place of the largest value: what rounding the exact result costs.
        rounding = torch.finfo(dtype).eps / 2 * t.abs().max().item()
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)


@needs_kernels
def test_float32_bias_beside_half_precision():
    x, bias, grad = inputs((5, 40), torch.float16, torch.float32)
    ours = run(ops.bias_gelu, x, bias, grad, backend="triton")
    truth = run(reference.bias_gelu, x.double(), bias.double(), grad)
    assert [t.dtype for t in ours] == [torch.float16, torch.float16, torch.float32]
    torch.testing.assert_close(ours[2].double(), truth[2], rtol=1e-3, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_large_inputs_stay_finite(kind):
    x = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=DEVICE, requires_grad=True)
    out = ops.bias_gelu(x, torch.zeros(7, device=DEVICE), approximate=kind, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out[0, :3].abs().max().item(), 0.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(out[0, 4:], x[0, 4:].detach())
    torch.testing.assert_close(grad[0, [0, 1, 2, 4, 5, 6]].cpu(), torch.tensor([0.0, 0, 0, 1, 1, 1]), atol=1e-6, rtol=0)


def sweep(dtype):
    """Rows that are dense over -14 to 14, denser near zero, of both signs."""
    tiny = torch.logspace(-30, -1, 8192, dtype=torch.float64)
    x = torch.cat([torch.linspace(-14, 14, 2**16, dtype=torch.float64), tiny, -tiny])
    return x.reshape(-1, 256).to(DEVICE, dtype)


@needs_kernels
@pytest.mark.parametrize("builtin", thorough_except([0], [0, 1]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_gelu_is_right_everywhere(dtype, builtin):
    x = sweep(dtype)
    zero, ones = torch.zeros(x.shape[1], device=DEVICE, dtype=dtype), torch.ones_like(x)
    with override(["bias_gelu_forward_kernel", "bias_gelu_backward_kernel"], BUILTIN_ERF=builtin):
        out, grad, _ = run(ops.bias_gelu, x, zero, ones, backend="triton")
    true_out, true_grad, _ = run(reference.bias_gelu, x, zero, ones, torch.float64)
    eps = torch.finfo(dtype).eps
    # What rounding to the dtype costs, and an error of the probability of 2 float32 units of 1.
    probability = 2 * torch.finfo(torch.float32).eps
    smallest = torch.finfo(dtype).smallest_normal
    assert ((out - true_out).abs() <= eps / 2 * true_out.abs() + probability * x.abs() + smallest * eps).all()
    assert ((grad - true_grad).abs() <= eps / 2 * true_grad.abs() + 2 * probability).all()
    # Near zero GELU is x / 2, to a rounding.
    near = x.double().abs() < 1e-8
    assert near.any() and ((out - x.double() / 2).abs() <= eps * x.abs() + smallest * eps)[near].all()


@needs_kernels
def test_what_is_not_finite_stays_so():
    x = torch.tensor([[float("inf"), float("nan")]], device=DEVICE)
    out = ops.bias_gelu(x, torch.zeros(2, device=DEVICE), backend="triton")
    assert out[0, 0] == float("inf") and out[0, 1].isnan()


@needs_kernels
def test_any_strides_and_expanded_gradients():
    base = torch.randn(12, 10, device=DEVICE)
    bias = torch.randn(20, device=DEVICE)[::2].requires_grad_()
    for x in (base.T.contiguous().T, base[1:], base[:, None].expand(-1, 3, -1)):
        x = x.detach().requires_grad_()
        ours, theirs = (
            torch.autograd.grad(f(x, bias).sum(), (x, bias))
            for f in (lambda *a: ops.bias_gelu(*a, backend="triton"), reference.bias_gelu)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@needs_kernels
def test_runs_are_equal_to_the_bit():
    x, bias, grad = inputs((50, 300), torch.float32)
    first, second = (run(ops.bias_gelu, x, bias, grad, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_registration(kind):
    x, bias, _ = inputs((6, 20), torch.float32)
    torch.library.opcheck(torch.ops.sclkern.bias_gelu, (x, bias, kind))
    torch.library.opcheck(torch.ops.sclkern.bias_gelu_backward, (x.detach(), x.detach(), bias.detach(), kind))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    x, bias, grad = inputs((6, 20), torch.float32)
    compiled = torch.compile(
        lambda x, bias: torch.ops.sclkern.bias_gelu(x * 2, bias, "none") + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    ours, truth = run(compiled, x, bias, grad), run(lambda x, b: reference.bias_gelu(x * 2, b) + 1, x, bias, grad)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_has_double_backward(kind):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda *a: ops.bias_gelu(*a, approximate=kind, backend="eager"), (x, bias))


@pytest.mark.parametrize(
    ("x", "bias", "options", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4), {}, ValueError, r"bias: got shape \(4,\), expected \(D,\) = \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(1, 3), {}, ValueError, r"bias: got shape \(1, 3\)"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(3),
            {},
            TypeError,
            r"x: got torch\.int64, expected",
        ),
        (
            torch.zeros(3),
            torch.zeros(3),
            {"approximate": "erf"},
            ValueError,
            r"approximate: got 'erf'",
        ),
        (torch.zeros(3), torch.zeros(3), {"backend": "cuda"}, ValueError, r"backend: got 'cuda', expected one of auto"),
        (
            torch.zeros(3),
            torch.zeros(3, device="meta"),
            {},
            ValueError,
            r"bias: got device meta, expected that",
        ),
    ],
)
def test_bad_input_is_named(x, bias, options, error, message):
    with pytest.raises(error, match=message):
        ops.bias_gelu(x, bias, **options)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
