"""``dropout_add_layer_norm`` with ``return_sum``: the eager path here; the kernel in the interpreter or on a GPU."""

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
READERS = [("out", "sum"), ("out",), ("sum",)]


def inputs(shape, dtype=torch.float32, *, stream=None, parameters=None, x_bias=True, mean=0.0):
    """x, residual (of dtype ``stream``), weight, bias, x_bias by name, and gradients of norm and sum."""
    generator = torch.Generator().manual_seed(0)
    width = shape[-1:]
    values = [torch.randn(size, generator=generator) for size in (shape, shape, width, width, width)]
    values[1] += mean
    dtypes = [dtype, stream or dtype] + [parameters or dtype] * 3
    tensors = {n: v.to(DEVICE, d).requires_grad_() for n, v, d in zip(NAMES, values, dtypes, strict=True)}
    if not x_bias:
        del tensors["x_bias"]
    return tensors, {part: torch.randn(shape, generator=generator).to(DEVICE) for part in ("out", "sum")}


def run(function, tensors, grads, dtype=None, readers=("out", "sum"), **options):
    """The norm, the sum, and every gradient where ``readers`` of them alone have one, by name."""
    tensors = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    outputs = dict(zip(("out", "sum"), function(**tensors, return_sum=True, **options), strict=True))
    read = [outputs[name] for name in readers]
    given = [grads[name].to(outputs[name].dtype) for name in readers]
    found = torch.autograd.grad(read, list(tensors.values()), given, allow_unused=True, materialize_grads=True)
    return {name: out.detach() for name, out in outputs.items()} | dict(zip(tensors, found, strict=True))


def kernel(**options):
    return dropout_add_layer_norm(**options, backend="triton")


def assert_as_exact_as_eager(tensors, grads, **options):
    truth = run(reference.dropout_add_layer_norm, tensors, grads, torch.float64, **options)
    eager = run(reference.dropout_add_layer_norm, tensors, grads, **options)
    ours = run(kernel, tensors, grads, **options)
    assert_as_exact(ours, eager, truth)


@needs_kernels
@pytest.mark.parametrize(("dropout_p", "x_bias"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", thorough_except([(9, 257), (3, 768)], SHAPES), ids=str)
def test_error_is_at_most_that_of_eager(shape, dtype, dropout_p, x_bias):
    tensors, grads = inputs(shape, dtype, x_bias=x_bias)
    assert_as_exact_as_eager(tensors, grads, dropout_p=dropout_p, seed=11)


@needs_kernels
@pytest.mark.parametrize("readers", READERS, ids=str)
@pytest.mark.parametrize(("dropout_p", "x_bias"), [(0.0, False), (0.0, True), (0.3, False), (0.3, True)])
def test_either_output_may_have_no_reader(readers, dropout_p, x_bias):
    tensors, grads = inputs((5, 40), x_bias=x_bias)
    assert_as_exact_as_eager(tensors, grads, readers=readers, dropout_p=dropout_p, seed=1)


@needs_kernels
@pytest.mark.parametrize("readers", READERS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(("branch", "stream"), [(DTYPES[-1], torch.float32), (torch.float32, DTYPES[-1])], ids=str)
def test_the_stream_may_be_wider_or_narrower(branch, stream, dropout_p, readers):
    tensors, grads = inputs((5, 40), branch, stream=stream, parameters=torch.float32)
    assert_as_exact_as_eager(tensors, grads, readers=readers, dropout_p=dropout_p, seed=1)
    out, total = kernel(**tensors, dropout_p=dropout_p, seed=1, return_sum=True)
    assert out.dtype == branch and total.dtype == torch.float32


@needs_kernels
def test_a_large_mean_of_the_rows_costs_no_accuracy():
    tensors, grads = inputs((6, 96), mean=1e3)
    assert_as_exact_as_eager(tensors, grads, dropout_p=0.1, seed=3)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_that_of_torch_and_the_norm_that_of_the_sum(dtype):
    (x, residual, weight, bias), _ = (list(t.values()) for t in inputs((9, 100), dtype, x_bias=False))
    out, total = dropout_add_layer_norm(x, residual, weight, bias, return_sum=True, backend="triton")
    assert torch.equal(total, residual + x)
    expected = F.layer_norm(total.double(), (100,), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_without_the_sum_it_is_the_same(backend, dropout_p):
    tensors, _ = inputs((6, 33))
    options = {"dropout_p": dropout_p, "seed": 5, "backend": backend}
    assert torch.equal(
        dropout_add_layer_norm(**tensors, **options, return_sum=True)[0], dropout_add_layer_norm(**tensors, **options)
    )


def test_eager_is_torchs_own_to_the_bit():
    tensors, grads = inputs((6, 33), x_bias=False)

    def plain(x, residual, weight, bias, **_):
        return F.layer_norm(residual + x, (33,), weight, bias), residual + x

    ours, theirs = run(dropout_add_layer_norm, tensors, grads, backend="eager"), run(plain, tensors, grads)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_a_product_reads_the_bits_that_it_would_have_read(backend):
    (x, residual, weight, bias), _ = (
        list(t.values())
        for t in inputs((4, 16), DTYPES[-1], stream=torch.float32, parameters=torch.float32, x_bias=False)
    )
    with torch.autocast(DEVICE, dtype=DTYPES[-1]):
        out, total = dropout_add_layer_norm(x, residual, weight, bias, return_sum=True, backend=backend)
        wide = dropout_add_layer_norm(x, residual, weight, bias, backend=backend)
    assert wide.dtype == total.dtype == torch.float32
    assert torch.equal(out, wide.to(DTYPES[-1])) and torch.equal(total, x + residual)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_drops_the_same(backend, reentrant):
    tensors, grads = inputs((6, 24))

    def call(x, residual, weight, bias, x_bias):
        options = {"x_bias": x_bias, "dropout_p": 0.5, "return_sum": True, "backend": backend}
        return dropout_add_layer_norm(x * 1, residual, weight, bias, **options)

    def total(tensors, function):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        out = function(*tensors)
        # The reentrant form knows backward() alone.
        torch.autograd.backward(out, list(grads.values()))
        return [*out, *(tensor.grad for tensor in tensors)]

    results = []
    for function in (call, lambda *t: checkpoint(call, *t, use_reentrant=reentrant)):
        torch.manual_seed(1)
        results.append(total(tensors, function))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_any_strides_and_expanded_gradients(dropout_p):
    tensors, _ = inputs((7, 3, 20))
    tensors["x"] = torch.randn(20, 3, 7, device=DEVICE).permute(2, 1, 0)
    tensors["residual"] = torch.randn(8, 20, device=DEVICE)[1:, None].expand(-1, 3, -1)
    tensors["weight"] = torch.randn(40, device=DEVICE)[::2]
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    gradients = []
    for function in (kernel, reference.dropout_add_layer_norm):
        out, total = function(**tensors, dropout_p=dropout_p, seed=4, return_sum=True)
        loss = out.sum() + total.sum() + (out * total).mean()
        gradients.append(torch.autograd.grad(loss, list(tensors.values()), retain_graph=True))
        # Both expanded from one number.
        gradients[-1] += torch.autograd.grad(out.sum() + 2 * total.sum(), list(tensors.values()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_kernels
def test_runs_are_equal_to_the_bit():
    tensors, grads = inputs((70, 50))
    first, second = (run(kernel, tensors, grads, dropout_p=0.2, seed=1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight", "x_bias"), ("bias",)], ids=str)
def test_any_inputs_may_be_frozen(wanted, backend):
    tensors, grads = inputs((5, 12))
    options = {"dropout_p": 0.2, "seed": 1, "backend": backend}
    whole = run(dropout_add_layer_norm, tensors, grads, **options)
    some = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    out = dropout_add_layer_norm(**some, **options, return_sum=True)
    # The parameters of the norm do not reach the sum.
    given = [(o, g) for o, g in zip(out, grads.values(), strict=True) if o.requires_grad]
    found = torch.autograd.grad([o for o, _ in given], [some[n] for n in wanted], [g for _, g in given])
    for name, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, whole[name]), name


@needs_kernels
def test_no_second_derivative_through_the_kernel():
    tensors, _ = inputs((4, 12))
    out, total = kernel(**tensors, return_sum=True)
    (first,) = torch.autograd.grad((out * total).sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        first.sum().backward()


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize(("dropout_p", "x_bias"), [(0.0, False), (0.25, True)])
@pytest.mark.parametrize("half", [False, True])
def test_registration(dropout_p, x_bias, read, half):
    tensors, grads = inputs((6, 20), x_bias=x_bias)
    if half:
        tensors["x"] = tensors["x"].detach().half().requires_grad_()
    seed = torch.tensor([3], device=DEVICE) if dropout_p else None
    ids = torch.arange(2**40, 2**40 + 6, device=DEVICE) if half and dropout_p else None
    arguments = (*(tensors.get(name) for name in NAMES), seed, ids, dropout_p, 1e-5, True, False)
    torch.library.opcheck(torch.ops.sclkern.dropout_add_layer_norm, arguments)
    out, total, mean, rstd = (t.detach() for t in torch.ops.sclkern.dropout_add_layer_norm(*arguments))
    gradients = grads["out"].to(out.dtype), grads["sum"] if read else None
    parameters = [tensors[name].detach() if name in tensors else None for name in ("weight", "x_bias")]
    saved = (*gradients, None, None, total, *parameters, seed, ids, mean, rstd)
    rest = dropout_p, tensors["x"].dtype, tensors["residual"].dtype
    torch.library.opcheck(torch.ops.sclkern.dropout_add_layer_norm_backward, (*saved, *rest))


@pytest.mark.parametrize("readers", READERS, ids=str)
@pytest.mark.parametrize(("dropout_p", "dynamic"), [(0.0, False), (0.25, False), (0.25, True)])
def test_compiles_whole(dropout_p, dynamic, readers):
    tensors, grads = inputs((6, 20))
    seed = torch.tensor([3], device=DEVICE) if dropout_p else None

    def call(x, residual, weight, bias, x_bias, **_):
        op = torch.ops.sclkern.dropout_add_layer_norm
        out, total, *_ = op(x * 2, residual, weight, bias, x_bias, seed, None, dropout_p, 1e-5, True, False)
        return out + 1, total * 2

    def truth(x, **others):
        out, total = reference.dropout_add_layer_norm(x * 2, **others, dropout_p=dropout_p, seed=seed)
        return out + 1, total * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, exact = (run(function, tensors, grads, readers=readers) for function in (compiled, truth))
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_eager_has_double_backward(dropout_p):
    tensors, _ = inputs((2, 5))
    tensors = [tensor.detach().double().requires_grad_() for tensor in tensors.values()]

    def call(*t):
        options = {"x_bias": t[4], "dropout_p": dropout_p, "seed": 5, "return_sum": True, "backend": "eager"}
        return dropout_add_layer_norm(*t[:4], **options)

    torch.autograd.gradcheck(call, tensors)
    torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_a_return_sum_that_is_no_bool_is_named(wrong):
    x, weight = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(TypeError, match=rf"return_sum: got {type(wrong).__name__}, expected a bool"):
        dropout_add_layer_norm(x, x, weight, weight, return_sum=wrong)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
