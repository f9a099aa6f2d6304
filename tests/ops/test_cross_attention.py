"""``cross_attention``: its forms against the definition here; the kernel in the interpreter or on a GPU."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from op_testing import BACKENDS, DEVICE, DTYPES, needs_kernels, run_in_interpreter, thorough_except
from sclkern.ops import cross_attention
from sclkern.reference.cross_attention import absorb_into_keys
from sclkern.reference.cross_attention import absorbed_attention as reference_core

NAMES = ("x", "context", "in_weight", "in_bias", "out_weight", "out_bias")
# B, Lq, Lk, W, H. Heads of 16 or 32 keys: one tile of columns, two (one of them half empty), and four.
SHAPES = [
    (2, 17, 13, 48, 6), (2, 1, 1, 16, 1), (1, 15, 16, 10, 2), (1, 63, 17, 16, 4), (1, 65, 31, 12, 3),
    (1, 33, 32, 16, 8), (1, 127, 15, 16, 2), (1, 325, 13, 8, 2),
]  # fmt: skip


def inputs(batch, queries, keys, width, dtype=torch.float32, share=0.7):
    """The six tensors, a mask that leaves the first key of each sample, a gradient."""
    shapes = (batch, queries, width), (batch, keys, width), (3 * width, width), (3 * width,), (width, width), (width,)
    # Scaled as trained weights are, so that scores stay within a few units.
    tensors = [torch.randn(shape) * (1 if index < 2 else width**-0.5) for index, shape in enumerate(shapes)]
    mask = torch.rand(batch, keys) < share
    mask[:, :1] = True
    grad = torch.randn(batch, queries, width)
    return [t.to(DEVICE, dtype) for t in tensors], mask.to(DEVICE), grad.to(DEVICE, dtype)


def run(tensors, grad, dtype=None, **options):
    """The output and the six gradients."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = cross_attention(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def compare_with_eager(tensors, grad, absorb="keys", **options):
    ours = run(tensors, grad, absorb=absorb, backend="triton", **options)
    eager = run(tensors, grad, absorb="never", backend="eager", **options)
    truth = run(tensors, grad, torch.float64, absorb="never", backend="eager", **options)
    for name, a, b, t in zip(("out", *NAMES), ours, eager, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if not t.numel():
            continue
        largest = t.abs().max().item()
        # A gradient that is zero in exact arithmetic (one key alone) has no scale of its own: eager's rounding is it.
        floor = (b.double() - t).abs().max().item()
        if a.dtype == torch.float32:
            bound = (2e-5 if name == "out" else 6e-5) * largest + 1.5 * floor
            assert (a.double() - t).abs().max().item() <= bound, name
        # Root mean square: the forms round different sums, and of few elements the largest error is chance.
        error, allowed = ((v.double() - t).square().mean().sqrt().item() for v in (a, b))
        assert error <= 1.5 * allowed + torch.finfo(a.dtype).eps / 4 * largest, (name, error, allowed)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", thorough_except(SHAPES[:1], SHAPES), ids=str)
@pytest.mark.parametrize("absorb", ["keys", "queries"])
def test_error_is_at_most_that_of_eager(absorb, shape, dtype):
    *sizes, heads = shape
    tensors, mask, grad = inputs(*sizes, dtype)
    options = {"num_heads": heads, "key_padding_mask": mask, "dropout_p": 0.2, "seed": 2**40 + 5}
    compare_with_eager(tensors, grad, absorb, **options)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", thorough_except([(2, 5, 325, 6)], [(2, 5, 325, 6), (1, 18, 1025, 8)]), ids=str)
def test_error_of_few_queries_is_at_most_that_of_eager(sizes, dtype):
    tensors, mask, grad = inputs(*sizes, dtype)
    options = {"num_heads": 2, "key_padding_mask": mask, "dropout_p": 0.2, "seed": 2**40 + 5}
    compare_with_eager(tensors, grad, "queries", **options)


@needs_kernels
@pytest.mark.parametrize("seed", [None, 0, -1, 2**63 - 1])
def test_without_a_mask_and_any_seed(seed):
    tensors, _, grad = inputs(2, 5, 20, 24)
    compare_with_eager(tensors, grad, num_heads=3, softmax_scale=-0.4, dropout_p=0.4 * (seed is not None), seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absorb", ["keys", "queries"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [(2, 5, 3), (2, 0, 3), (2, 4, 0), (0, 4, 3), (1, 3, 17)], ids=str)
def test_every_form_equals_the_definition(sizes, dropout_p, absorb, backend):
    exact = backend == "eager"
    tensors, mask, grad = inputs(*sizes, 24, torch.float64 if exact else torch.float32)
    # A sample without a valid key.
    mask[:1] = False
    for options in ({}, {"key_padding_mask": mask}):
        options |= {"num_heads": 3, "dropout_p": dropout_p, "seed": 4}
        ours = run(tensors, grad, absorb=absorb, backend=backend, **options)
        truth = run(tensors, grad, absorb="never", backend="eager", **options)
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 1e-5}
        for name, a, b in zip(("out", *NAMES), ours, truth, strict=True):
            torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absorb", ["never", "keys", "queries"])
def test_a_sample_without_keys_and_what_padding_holds(absorb, backend):
    if backend == "triton" and absorb == "never":
        pytest.skip("the kernel of attention")
    tensors, mask, grad = inputs(3, 5, 13, 24)
    mask[1] = False
    options = {"num_heads": 3, "key_padding_mask": mask, "dropout_p": 0.1, "seed": 3, "absorb": absorb}
    clean = run(tensors, grad, backend=backend, **options)
    torch.testing.assert_close(clean[0][1], tensors[-1].expand(5, -1), rtol=0, atol=0)
    assert all(result.isfinite().all() for result in clean)
    assert (clean[2][~mask] == 0).all()
    garbage = torch.tensor([math.nan, math.inf, -math.inf], device=DEVICE).repeat(8)
    tensors[1] = torch.where(mask[:, :, None], tensors[1], garbage)
    dirty = run(tensors, grad, backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))


@needs_kernels
def test_large_scores_stay_finite():
    tensors, mask, grad = inputs(2, 9, 13, 24)
    tensors[0] = 200 * tensors[0]
    # Padding scores 0, far above scores like these.
    tensors[3][:24], tensors[3][24:48] = -100.0, 100.0
    results = run(tensors, grad, num_heads=3, key_padding_mask=mask, absorb="keys", backend="triton")
    assert all(result.isfinite().all() for result in results)
    truth = run(tensors, grad, torch.float64, num_heads=3, key_padding_mask=mask, absorb="never", backend="eager")
    # Scores of some thousands are known to 1e-4 in float32.
    torch.testing.assert_close(results[0].double(), truth[0], rtol=5e-3, atol=5e-3)


@needs_kernels
def test_any_strides_and_expanded_gradients():
    tensors, mask, _ = inputs(2, 17, 13, 24)
    x, context, *parameters = tensors
    views = (
        [
            x.mT.contiguous().mT,
            context[:1].expand(2, -1, -1),
            *(p.mT.contiguous().mT if p.ndim > 1 else p[::1] for p in parameters),
        ],
        [torch.cat([x, x], 2)[..., 24:], torch.cat([context, context], 1)[:, ::2], *parameters],
        [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in tensors],
    )
    for view in views:
        leaves = [t.detach().requires_grad_() for t in view]
        options = {"num_heads": 3, "key_padding_mask": mask.T.contiguous().T}
        for reduce in (torch.sum, lambda out: out[:, ::2].transpose(1, 2).mul(2.0).sum((0, 1)).square().sum()):
            ours, theirs = (
                torch.autograd.grad(reduce(cross_attention(*leaves, absorb=a, backend=b, **options)), leaves)
                for a, b in (("keys", "triton"), ("never", "eager"))
            )
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@needs_kernels
def test_any_of_the_inputs_may_require_gradients():
    tensors, mask, grad = inputs(2, 5, 7, 24)
    options = {"num_heads": 3, "key_padding_mask": mask, "absorb": "keys", "backend": "triton"}
    full = run(tensors, grad, **options)[1:]
    one = [{index} for index in range(6)]
    for wanted in (set(), *one, *(set(range(6)) - alone for alone in one), {0, 1}, {0, 2}, {1, 4}):
        leaves = [t.detach().requires_grad_(index in wanted) for index, t in enumerate(tensors)]
        out = cross_attention(*leaves, **options)
        assert out.requires_grad == bool(wanted)
        if wanted:
            found = torch.autograd.grad(out, [leaves[index] for index in sorted(wanted)], grad)
            assert all(torch.equal(a, full[index]) for a, index in zip(found, sorted(wanted), strict=True))


@needs_kernels
def test_runs_are_equal_to_the_bit():
    tensors, mask, grad = inputs(2, 33, 20, 24)
    options = {"num_heads": 3, "key_padding_mask": mask, "dropout_p": 0.1, "seed": 2, "absorb": "keys"}
    first, second = (run(tensors, grad, backend="triton", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def short_and_long(dtype=torch.float32):
    """Arguments of the core: a sample of 16 keys, one of 17 to 20, one that attends to the last key alone, one to none;
    what the first and the last must not read is NaN."""
    tensors, _, grad = inputs(4, 17, 20, 48, dtype)
    absorbed = absorb_into_keys(*tensors[1:5], num_heads=6, scale=0.3, mask=None)
    mask = torch.zeros(4, 20, dtype=torch.bool, device=DEVICE)
    mask[0, 1:16], mask[1, ::3], mask[1, 18], mask[2, 19] = True, True, True, True
    absorbed = [tensor.clone() for tensor in absorbed]
    for tensor in absorbed:
        tensor[:, ::3, 16:] = math.nan
    seed, ids = torch.tensor([2**40 + 5], device=DEVICE), torch.tensor([3, 2**33, 0, 9], device=DEVICE)
    return (tensors[0], *absorbed), tensors[-1], (mask, seed, 0.2, ids), grad


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_few_keys_compute_half_of_the_columns(dtype):
    from sclkern.kernels.config import override
    from sclkern.kernels.cross_attention import cross_attention_backward, cross_attention_forward

    tensors, out_bias, rest, grad = short_and_long(dtype)
    out = cross_attention_forward(*tensors, out_bias, *rest)
    results = cross_attention_backward(grad, *tensors, *rest)
    assert all(result.isfinite().all() for result in (out, *results))
    # What the products over the queries read of the other keys.
    assert all((result.unflatten(-1, (2, 16))[::3, :, :, 1] == 0).all() for result in results[1:])
    whole = [tensor.nan_to_num() for tensor in tensors]
    with override(("cross_attention_forward_kernel", "cross_attention_backward_kernel"), SPLIT=0):
        expected = cross_attention_forward(*whole, out_bias, *rest)
        of_backward = cross_attention_backward(grad, *whole, *rest)
        assert cross_attention_forward(*tensors, out_bias, *rest).isnan().any()
    # Sums of the same numbers, and the same probabilities dropped.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for ours, theirs in zip((out, *results), (expected, *of_backward), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
    torch.testing.assert_close(out[3], out_bias.expand(17, -1), rtol=0, atol=0)


@needs_kernels
def test_samples_of_few_and_of_many_keys_equal_the_definition():
    tensors, _, grad = inputs(4, 33, 20, 48)
    mask = short_and_long()[2][0]
    compare_with_eager(tensors, grad, num_heads=6, key_padding_mask=mask, dropout_p=0.2, seed=2**40 + 5)


def core(dropout_p=0.0, masked=False):
    """Arguments of the op itself."""
    (x, context, in_weight, in_bias, out_weight, out_bias), mask, _ = inputs(2, 5, 7, 24)
    absorbed = absorb_into_keys(context, in_weight, in_bias, out_weight, num_heads=3, scale=0.3, mask=None)
    leaves = [t.detach().contiguous().requires_grad_() for t in (x, *absorbed, out_bias)]
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    ids = torch.tensor([2**40, 3], device=DEVICE) if masked else None
    return leaves, (mask if masked else None, seed, ids, dropout_p)


def test_registration():
    leaves, rest = core(0.25, True)
    saved = [leaf.detach() for leaf in leaves]
    # The dynamic dispatch of opcheck, the slow part, is in test_every_op.py.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sclkern.cross_attention, (*leaves, *rest), test_utils=utils)
    backward = torch.ops.sclkern.cross_attention_backward
    for needs_out_bias in (False, True):
        torch.library.opcheck(backward, (saved[0], *saved, *rest, needs_out_bias), test_utils=utils)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_registration_of_the_softmax_between_products(dropout_p):
    scores, mask = torch.randn(2, 3, 5, 7, device=DEVICE, requires_grad=True), torch.rand(2, 7, device=DEVICE) < 0.7
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    ids = torch.tensor([9, 2**40], device=DEVICE) if dropout_p else None
    rest = (mask, seed, ids, dropout_p)
    torch.library.opcheck(torch.ops.sclkern.cross_attention_softmax, (scores, *rest))
    grads = torch.randn(2, 3, 5, 7, device=DEVICE), torch.randn(2, 3, 5, device=DEVICE)
    torch.library.opcheck(torch.ops.sclkern.cross_attention_softmax_backward, (*grads, scores.detach(), *rest))


@pytest.mark.parametrize("full", [False, True])
def test_the_op_has_the_gradients_of_its_core(full):
    leaves, (mask, seed, ids, dropout_p) = core(0.25 * full, full)
    out = torch.ops.sclkern.cross_attention(*leaves, mask, seed, ids, dropout_p)
    truth = reference_core(*leaves, mask, dropout_p=dropout_p, seed=seed, dropout_ids=ids)
    torch.testing.assert_close(out, truth)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(truth, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    leaves, rest = core(0.25, True)

    def function(x, *others):
        return torch.ops.sclkern.cross_attention(x * 2, *others, *rest) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out, expected = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("absorb", ["never", "queries"])
def test_compiles_with_its_arguments_checked(absorb):
    tensors, mask, _ = inputs(2, 5, 7, 24)
    options = {"num_heads": 3, "key_padding_mask": mask, "absorb": absorb}
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, **options), cross_attention(*tensors, **options))


@pytest.mark.parametrize("absorb", ["never", "keys", "queries"])
def test_eager_has_double_backward(absorb):
    tensors, mask, _ = inputs(2, 2, 3, 4, torch.float64)
    mask[1] = False
    leaves = [t.requires_grad_() for t in tensors]
    options = {"num_heads": 2, "key_padding_mask": mask, "dropout_p": 0.3, "seed": 1, "absorb": absorb}
    torch.autograd.gradcheck(lambda *t: cross_attention(*t, backend="eager", **options), leaves)
    options["key_padding_mask"] = None
    small = [t[:1].detach().requires_grad_() if t.ndim == 3 else t for t in leaves]
    torch.autograd.gradgradcheck(lambda *t: cross_attention(*t, backend="eager", **options), small, fast_mode=True)


@needs_kernels
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_sizes(data):
    heads = data.draw(st.integers(1, 5), "heads")
    sizes = data.draw(st.tuples(st.integers(1, 2), st.integers(0, 40), st.integers(0, 32)), "B, Lq, Lk")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    tensors, mask, grad = inputs(*sizes, heads * data.draw(st.integers(1, 9), "D"), dtype, data.draw(st.floats(0, 1)))
    dropout_p = data.draw(st.sampled_from([0.0, 0.5]), "dropout_p")
    mask = data.draw(st.sampled_from([None, mask]), "mask")
    options = {"num_heads": heads, "key_padding_mask": mask, "dropout_p": dropout_p, "seed": 7}
    absorb = data.draw(st.sampled_from(["keys", "queries"]), "absorb")
    ours = run(tensors, grad, absorb=absorb, backend="triton", **options)
    truth = run(tensors, grad, torch.float64, absorb="never", backend="eager", **options)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for a, b in zip(ours, truth, strict=True):
        assert ((a.double() - b).abs() <= tolerance * max([1.0, *b.abs().flatten().tolist()])).all()


def test_autocast_computes_in_its_dtype():
    dtype = torch.bfloat16
    tensors, mask, grad = inputs(2, 33, 5, 24)
    options = {"num_heads": 3, "key_padding_mask": mask, "dropout_p": 0.1, "seed": 1}
    for absorb in ("never", "keys", "queries"):
        with torch.autocast(DEVICE, dtype):
            results = run(tensors, grad, absorb=absorb, **options)
        assert [t.dtype for t in results] == [dtype] + [torch.float32] * 6
        for a, b in zip(results, run(tensors, grad, absorb=absorb, **options), strict=True):
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def test_folding_projections_unpacks_what_it_saved_once():
    """A checkpoint recomputes what a backward unpacks, once."""
    from torch.utils.checkpoint import checkpoint

    from sclkern.kernels.cross_attention_keys import absorb_into_keys

    torch.manual_seed(0)
    shapes = (2, 3, 64), (192, 64), (192,), (64, 64)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def total(*tensors):
        return sum(tensor.square().sum() for tensor in absorb_into_keys(tensors, 2, 0.3, None))

    kept = torch.autograd.grad(total(*tensors), tensors)
    recomputed = torch.autograd.grad(checkpoint(total, *tensors, use_reentrant=False), tensors)
    for ours, theirs in zip(recomputed, kept, strict=True):
        assert torch.equal(ours, theirs)
