"""``dropout_add_layer_norm``: the eager path here; the kernel in the interpreter (`make test` runs it) or on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from op_testing import BACKENDS, DEVICE, DTYPES, assert_as_exact, needs_kernels, run_in_interpreter, thorough_except
from sclkern import reference
from sclkern.ops.dispatch import interpreted
from sclkern.ops.dropout_add_layer_norm import dropout_add_layer_norm

SHAPES = [(1, 1), (3, 17), (9, 257), (3, 768), (5, 7, 40), (0, 8), (7, 0)]
NAMES = ("x", "residual", "weight", "bias", "x_bias")


def inputs(shape, dtype=torch.float32, *, x_bias=True, mean=0.0, parameter_dtype=None, seed=0):
    """x, residual, weight, bias, x_bias by name, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1:]
    sizes = (shape, shape, width, width, width)
    values = [torch.randn(size, generator=generator) for size in sizes]
    values[1] += mean
    dtypes = [dtype, dtype] + [parameter_dtype or dtype] * 3
    tensors = {n: v.to(DEVICE, d).requires_grad_() for n, v, d in zip(NAMES, values, dtypes, strict=True)}
    if not x_bias:
        del tensors["x_bias"]
    return tensors, torch.randn(shape, generator=generator).to(DEVICE, dtype)


def run(function, tensors, grad, dtype=None, **options):
    """The output and every gradient, by name."""
    tensors = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    out = function(**tensors, **options)
    out.backward(grad.to(out.dtype))
    return {"out": out.detach()} | {n: t.grad for n, t in tensors.items()}


def assert_as_exact_as_eager(tensors, grad, **options):
    truth = run(reference.dropout_add_layer_norm, tensors, grad, torch.float64, **options)
    eager = run(reference.dropout_add_layer_norm, tensors, grad, **options)
    ours = run(dropout_add_layer_norm, tensors, grad, backend="triton", **options)
    assert_as_exact(ours, eager, truth)


@needs_kernels
@pytest.mark.parametrize(("dropout_p", "x_bias"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", thorough_except([(9, 257), (3, 768)], SHAPES), ids=str)
def test_error_is_at_most_that_of_eager(shape, dtype, dropout_p, x_bias):
    tensors, grad = inputs(shape, dtype, x_bias=x_bias)
    assert_as_exact_as_eager(tensors, grad, dropout_p=dropout_p, seed=11)


@needs_kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_large_mean_of_the_rows_costs_no_accuracy(dropout_p):
    tensors, grad = inputs((6, 96), mean=1e3)
    assert_as_exact_as_eager(tensors, grad, dropout_p=dropout_p, seed=3)
    ours = run(dropout_add_layer_norm, tensors, grad, dropout_p=dropout_p, seed=3, backend="triton")
    truth = run(reference.dropout_add_layer_norm, tensors, grad, torch.float64, dropout_p=dropout_p, seed=3)
    for name, exact in truth.items():
        # The inputs' own unit in the last place at 1e3 is 6e-5.
        torch.testing.assert_close(ours[name].double(), exact, atol=1e-3, rtol=1e-3)


@needs_kernels
@pytest.mark.parametrize("x_bias", [False, True])
def test_dtypes_may_differ(x_bias):
    tensors, grad = inputs((5, 40), torch.float16, x_bias=x_bias, parameter_dtype=torch.float32)
    tensors["residual"] = tensors["residual"].detach().float().requires_grad_()
    for dropout_p in (0.0, 0.2):
        ours = run(dropout_add_layer_norm, tensors, grad, dropout_p=dropout_p, seed=1, backend="triton")
        truth = run(reference.dropout_add_layer_norm, tensors, grad, torch.float64, dropout_p=dropout_p, seed=1)
        assert ours["out"].dtype == torch.float32
        for name, exact in truth.items():
            assert ours[name].dtype == tensors.get(name, ours["out"]).dtype
            torch.testing.assert_close(ours[name].double(), exact, atol=2e-3, rtol=2e-3)


def masks(rows, columns, dropout_p, seed, backend):
    """What the op drops: where the gradient of x is zero and that of residual is not."""
    tensors, grad = inputs((rows, columns), x_bias=False)
    result = run(dropout_add_layer_norm, tensors, grad, dropout_p=dropout_p, seed=seed, backend=backend)
    assert (result["residual"] != 0).all()
    return result["x"] != 0


@needs_kernels
@pytest.mark.parametrize("columns", [7, 8, 200])
def test_eager_and_kernel_drop_the_same_elements(columns):
    kept = [masks(9, columns, 0.4, -5, backend) for backend in BACKENDS]
    expected = reference.feature_dropout_keep(9, columns, 0.4, torch.tensor([-5], device=DEVICE))
    assert all(torch.equal(mask, expected) for mask in kept)


@needs_kernels
def test_mask_does_not_depend_on_the_tile():
    from sclkern.kernels.config import override

    kernels = ("dropout_add_layer_norm_forward_kernel", "dropout_add_layer_norm_backward_kernel")
    first = masks(20, 24, 0.5, 2**40 + 1, "triton")
    for changed in ({"BLOCK_ROWS": 2}, {"BLOCK_COLUMNS": 128, "BLOCK_ROWS": 8}):
        with override(kernels, **changed):
            assert torch.equal(first, masks(20, 24, 0.5, 2**40 + 1, "triton"))


def test_mask_of_a_place_does_not_depend_on_the_shape():
    seed = torch.tensor([9])
    small, large = (reference.feature_dropout_keep(*size, 0.5, seed) for size in ((5, 13), (9, 50)))
    assert torch.equal(small, large[:5, :13])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_fraction_dropped_and_its_independence(dropout_p):
    keep = reference.feature_dropout_keep(500, 403, dropout_p, torch.tensor([123]))
    deviation = (dropout_p * (1 - dropout_p) / keep.numel()) ** 0.5
    assert abs((~keep).double().mean().item() - dropout_p) < 4.5 * deviation
    for other in (keep.roll(1, 0), keep.roll(1, 1), keep.roll(8, 1)):
        both = (~keep & ~other).double().mean().item()
        assert abs(both - dropout_p**2) < 4.5 * (dropout_p**2 * (1 - dropout_p**2) / keep.numel()) ** 0.5
    assert not torch.equal(keep, reference.feature_dropout_keep(500, 403, dropout_p, torch.tensor([124])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_is_layer_norm_and_draws_nothing(backend):
    tensors, grad = inputs((6, 33), x_bias=False)
    state = torch.get_rng_state()
    ours = run(dropout_add_layer_norm, tensors, grad, backend=backend)
    assert torch.equal(state, torch.get_rng_state())
    truth = run(lambda x, residual, weight, bias: F.layer_norm(residual + x, (33,), weight, bias), tensors, grad)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropping_everything_leaves_the_residual(backend):
    tensors, grad = inputs((4, 20))
    tensors["x"].data.fill_(torch.nan)
    ours = run(dropout_add_layer_norm, tensors, grad, dropout_p=1.0, seed=0, backend=backend)
    truth = F.layer_norm(tensors["residual"], (20,), tensors["weight"], tensors["bias"])
    torch.testing.assert_close(ours["out"], truth.detach(), atol=2e-5, rtol=1e-5)
    assert not ours["x"].any() and not ours["x_bias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_is_an_integer_a_tensor_or_drawn(backend):
    tensors, _ = inputs((6, 24))

    def call(seed):
        return dropout_add_layer_norm(**tensors, dropout_p=0.5, seed=seed, backend=backend)

    assert torch.equal(call(2**64 - 3), call(torch.tensor(-3, device=DEVICE)))
    torch.manual_seed(0)
    drawn = call(None)
    assert not torch.equal(drawn, call(None))
    torch.manual_seed(0)
    assert torch.equal(drawn, call(None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_drops_the_same(backend, reentrant):
    tensors, grad = inputs((6, 24))

    def call(x, residual, weight, bias, x_bias):
        return dropout_add_layer_norm(x * 1, residual, weight, bias, x_bias=x_bias, dropout_p=0.5, backend=backend)

    def again(**tensors):
        return checkpoint(call, *tensors.values(), use_reentrant=reentrant)

    results = []
    for function in (call, again):
        torch.manual_seed(1)
        results.append(run(function, tensors, grad))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@needs_kernels
def test_any_strides_and_expanded_gradients():
    tensors, _ = inputs((7, 3, 20))
    tensors["x"] = torch.randn(20, 3, 7, device=DEVICE).permute(2, 1, 0)
    tensors["residual"] = torch.randn(8, 20, device=DEVICE)[1:, None].expand(-1, 3, -1)
    tensors["weight"] = torch.randn(40, device=DEVICE)[::2]
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    for dropout_p in (0.0, 0.3):
        out = [
            f(**tensors, dropout_p=dropout_p, seed=4)
            for f in (lambda **o: dropout_add_layer_norm(**o, backend="triton"), reference.dropout_add_layer_norm)
        ]
        ours, theirs = (torch.autograd.grad((o * 2).sum() + o[:, 1].sum(), list(tensors.values())) for o in out)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_kernels
def test_runs_are_equal_to_the_bit():
    tensors, grad = inputs((70, 50))
    first, second = (
        run(dropout_add_layer_norm, tensors, grad, dropout_p=0.2, seed=1, backend="triton") for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight", "x_bias"), ("bias",), ("x_bias",)], ids=str)
def test_any_inputs_may_be_frozen(wanted, backend):
    tensors, grad = inputs((5, 12))
    whole = run(dropout_add_layer_norm, tensors, grad, dropout_p=0.2, seed=1, backend=backend)
    some = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    out = dropout_add_layer_norm(**some, dropout_p=0.2, seed=1, backend=backend)
    for name, gradient in zip(wanted, torch.autograd.grad(out, [some[n] for n in wanted], grad), strict=True):
        assert torch.equal(gradient, whole[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_no_dtype(backend):
    tensors, _ = inputs((4, 12), torch.float16, parameter_dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = dropout_add_layer_norm(**tensors, backend=backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, dropout_add_layer_norm(**tensors, backend=backend))


@needs_kernels
def test_no_second_derivative_through_the_kernel():
    tensors, _ = inputs((4, 12))
    out = dropout_add_layer_norm(**tensors, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        first.sum().backward()


@pytest.mark.parametrize(("dropout_p", "x_bias"), [(0.0, False), (0.25, True)])
def test_registration(dropout_p, x_bias):
    tensors, grad = inputs((6, 20), x_bias=x_bias)
    seed = torch.tensor([3], device=DEVICE) if dropout_p else None
    x, residual, weight, bias, bias_of_x = (tensors.get(name) for name in NAMES)
    arguments = (x, residual, weight, bias, bias_of_x, seed, None, dropout_p, 1e-5, False, False)
    torch.library.opcheck(torch.ops.sclkern.dropout_add_layer_norm, arguments)
    _, _, mean, rstd = torch.ops.sclkern.dropout_add_layer_norm(*arguments)
    tensors = grad, None, x, residual, None, weight, bias_of_x, seed, None, mean, rstd
    saved = [None if t is None else t.detach() for t in tensors]
    rest = dropout_p, x.dtype, residual.dtype
    torch.library.opcheck(torch.ops.sclkern.dropout_add_layer_norm_backward, (*saved, *rest))


@pytest.mark.parametrize(("dropout_p", "dynamic"), [(0.0, False), (0.25, False), (0.25, True)])
def test_compiles_whole(dropout_p, dynamic):
    tensors, grad = inputs((6, 20))
    seed = torch.tensor([3], device=DEVICE) if dropout_p else None

    def call(x, residual, weight, bias, x_bias):
        op = torch.ops.sclkern.dropout_add_layer_norm
        return op(x * 2, residual, weight, bias, x_bias, seed, None, dropout_p, 1e-5, False, False)[0] + 1

    def truth(x, **others):
        return reference.dropout_add_layer_norm(x * 2, **others, dropout_p=dropout_p, seed=seed) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, exact = run(compiled, tensors, grad), run(truth, tensors, grad)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_eager_has_double_backward(dropout_p):
    tensors, _ = inputs((2, 5))
    tensors = [tensor.detach().double().requires_grad_() for tensor in tensors.values()]

    def call(*t):
        return dropout_add_layer_norm(*t[:4], x_bias=t[4], dropout_p=dropout_p, seed=5, backend="eager")

    torch.autograd.gradgradcheck(call, tensors)


def test_a_row_too_wide_for_the_kernel_takes_the_eager_path():
    x, weight = torch.ones(1, 4097, device=DEVICE), torch.ones(4097, device=DEVICE)
    assert dropout_add_layer_norm(x, x, weight, weight).shape == (1, 4097)
    with pytest.raises(ValueError, match=r"backend='triton': cannot run: rows of 4097 columns, .* at most 4096"):
        dropout_add_layer_norm(x, x, weight, weight, backend="triton")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"x: got torch\.int64, expected a floating dtype"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: got shape \(\), expected \(\.\.\., D\)"),
        ({"residual": torch.zeros(3)}, ValueError, r"residual: got shape \(3,\), expected \(\.\.\., D\) = \(2, 3\)"),
        ({"weight": torch.zeros(1)}, ValueError, r"weight: got shape \(1,\), expected \(D,\) = \(3,\)"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, r"bias: got device meta, expected that of x"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p: got 1\.5, expected a finite number from 0 to 1"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p: got nan"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p: got str, expected a number"),
        ({"eps": -1e-5}, ValueError, r"eps: got -1e-05, expected a finite number of at least 0"),
        ({"seed": 1.0}, TypeError, r"seed: got float, expected an int, an int64 tensor of one element or None"),
        ({"seed": torch.zeros(1)}, TypeError, r"seed: got torch\.float32, expected torch\.int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed: got shape \(2,\), expected one element"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, r"seed: got device meta"),
        ({"backend": "cuda"}, ValueError, r"backend: got 'cuda', expected one of auto"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    good = {"x": torch.zeros(2, 3), "residual": torch.zeros(2, 3), "weight": torch.zeros(3), "bias": torch.zeros(3)}
    with pytest.raises(error, match=message):
        dropout_add_layer_norm(**(good | changed))


def test_in_the_interpreter():
    run_in_interpreter(__file__)
