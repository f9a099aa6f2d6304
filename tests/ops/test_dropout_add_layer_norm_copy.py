"""``dropout_add_layer_norm`` with ``return_copy``: the eager path here; the kernel in the interpreter or on a GPU."""

import pytest
import torch

from op_testing import BACKENDS, DEVICE, DTYPES, assert_as_exact, needs_kernels, run_in_interpreter
from sclkern import reference
from sclkern.ops.dropout_add_layer_norm import dropout_add_layer_norm

HALF = DTYPES[-1]
NAMES = ("x", "residual", "weight", "bias", "x_bias")
READERS = [("out", "copy"), ("out",), ("copy",)]


def inputs(shape, dtype=HALF):
    """x in ``dtype``, the others in float32, and gradients of the norm and its copy."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape, shape, shape[-1:], shape[-1:], shape[-1:]
    tensors = {n: torch.randn(size, generator=generator).to(DEVICE) for n, size in zip(NAMES, sizes, strict=True)}
    tensors["x"] = tensors["x"].to(dtype)
    return tensors, {part: torch.randn(shape, generator=generator).to(DEVICE) for part in ("out", "copy")}


def run(function, tensors, grads, *, readers, dtype=None, **options):
    """Norm, copy, and every gradient where ``readers`` of them alone have one, by name."""
    tensors = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    outputs = dict(zip(("out", "copy"), function(**tensors, return_copy=True, **options), strict=True))
    given = [grads[name].to(HALF if name == "copy" else torch.float32).to(outputs[name].dtype) for name in readers]
    found = torch.autograd.grad([outputs[name] for name in readers], list(tensors.values()), given)
    return {name: out.detach() for name, out in outputs.items()} | dict(zip(tensors, found, strict=True))


@needs_kernels
@pytest.mark.parametrize("readers", READERS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5, 40), (3, 2, 257), (0, 8)], ids=str)
def test_error_is_at_most_that_of_eager(shape, dropout_p, readers):
    tensors, grads = inputs(shape)
    options = {"readers": readers, "dropout_p": dropout_p, "seed": 3}
    truth = run(reference.dropout_add_layer_norm, tensors, grads, dtype=torch.float64, **options)
    eager = run(reference.dropout_add_layer_norm, tensors, grads, **options)
    ours = run(dropout_add_layer_norm, tensors, grads, **options, backend="triton")
    assert_as_exact(ours, eager, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [torch.float32, HALF], ids=str)
def test_the_copy_is_the_norm_as_autocast_would_cast_it(backend, residual):
    tensors, _ = inputs((6, 33))
    tensors["residual"] = tensors["residual"].to(residual)
    out, copy = dropout_add_layer_norm(**tensors, dropout_p=0.2, seed=1, return_copy=True, backend=backend)
    alone = dropout_add_layer_norm(**tensors, dropout_p=0.2, seed=1, backend=backend)
    assert torch.equal(out, alone) and torch.equal(copy, alone.to(HALF))
    assert out.dtype == residual and copy.dtype == HALF


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dtype_needs_no_copy(backend):
    tensors, _ = inputs((6, 33), torch.float32)
    tensors["x"].requires_grad_()
    out, copy = dropout_add_layer_norm(**tensors, return_copy=True, backend=backend)
    assert copy is out or copy.data_ptr() == out.data_ptr()


@needs_kernels
def test_a_copy_that_is_read_once_leaves_gradients_to_the_bit():
    """The kernel adds in float32 what autograd would add in float32."""
    tensors, grads = inputs((6, 33))
    found = []
    for copied in (False, True):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = dropout_add_layer_norm(**leaves, dropout_p=0.2, seed=1, return_copy=copied, backend="triton")
        out, copy = out if copied else (out, out.to(HALF))
        torch.autograd.backward([out, copy], [grads["out"], grads["copy"].to(HALF)])
        found.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sum_and_copy_exclude_each_other():
    tensors, _ = inputs((2, 8))
    with pytest.raises(ValueError, match="return_copy: got True beside return_sum"):
        dropout_add_layer_norm(**tensors, return_sum=True, return_copy=True)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
