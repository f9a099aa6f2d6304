"""``frame_attention``: the eager path here; the kernel in the interpreter (`make test` runs it) or on a GPU."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from op_testing import BACKENDS, DEVICE, DTYPES, needs_kernels, run_in_interpreter, thorough_except
from sclkern import reference
from sclkern.ops import attention, frame_attention
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted

# F, 1 + P, D: around the tiles of float32 (32) and float16 (64), without patches, with one, and with many frames.
SHAPES = [
    (2, 1, 32), (3, 2, 64), (2, 15, 32), (3, 16, 32), (2, 17, 128), (3, 31, 32), (2, 32, 64), (2, 33, 32), (3, 34, 32),
    (2, 63, 32), (2, 64, 32), (3, 65, 32), (3, 66, 64), (2, 127, 32), (2, 129, 64), (5, 65, 32), (17, 2, 32),
]  # fmt: skip
CASES = [(shape, dtype) for dtype in DTYPES for shape in SHAPES[:: 1 if dtype == torch.float32 else 4]]
EDGES = [(SHAPES[13 if dtype == torch.float32 else 12], dtype) for dtype in DTYPES]
# The process that interprets kernels leaves the other paths to the usual one.
HERE = ["triton"] if interpreted() else [*BACKENDS, "auto"]
NAMES = ("out", "grad_query", "grad_key", "grad_value")


def inputs(frames=3, tokens=5, head=32, dtype=torch.float32, batch=1, heads=1):
    """query, key, value, a gradient."""
    return [torch.randn(batch, frames * tokens, heads, head).to(DEVICE, dtype) for _ in range(4)]


def run(query, key, value, grad, frames, dtype=None, backend="triton", **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (query, key, value)]
    out = frame_attention(*leaves, frames, backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def kernel(query, key, value, frames):
    """The registered op, with one frame too."""
    return torch.ops.sclkern.frame_attention(query, key, value, frames, query.shape[-1] ** -0.5)[0]


def magnitudes(query, key, value, grad, frames, *, softmax_scale=None):
    """Largest score; largest sums of the absolute terms whose differences are the gradients of query and key."""
    query, key, value, grad = (tensor.double() for tensor in (query, key, value, grad))
    scale = softmax_scale or query.shape[-1] ** -0.5
    mask = reference.frame_attention_mask(frames, query.shape[1] // frames, query.device)
    weights = reference.attention_probabilities(query, key, mask=mask, softmax_scale=scale)
    terms = weights * torch.einsum("bqhd,bkhd->bhqk", grad, value).abs() * scale
    by_query = torch.einsum("bhqk,bkhd->bqhd", terms, key.abs())
    by_key = torch.einsum("bhqk,bqhd->bkhd", terms, query.abs())
    score = torch.einsum("bqhd,bkhd->bhqk", query, key).abs().max().item() * scale
    return score, (0.0, by_query.max().item(), by_key.max().item(), 0.0)


def compare_with_eager(*arguments, **options):
    ours, eager = (run(*arguments, backend=backend, **options) for backend in ("triton", "eager"))
    truth = run(*arguments, torch.float64, "eager", **options)
    score, sums = magnitudes(*arguments, **options)
    for name, a, b, t, terms in zip(NAMES, ours, eager, truth, sums, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        largest = t.abs().max().item()
        # Half a unit in the last place of the largest value; that of the terms, which eager subtracts as it weighed
        # them and a kernel computes again from the rounded output; and that of a score in float32.
        rounding = torch.finfo(a.dtype).eps * (largest / 2 + terms)
        rounding += torch.finfo(torch.float32).eps * score * max(largest, terms)
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)
        if a.dtype == torch.float32:
            assert error <= (2e-5 if name == "out" else 6e-5) * largest + 1e-7, (name, error, largest)


@needs_kernels
@pytest.mark.parametrize("case", thorough_except(EDGES, CASES), ids=str)
def test_error_is_at_most_that_of_eager(case):
    shape, dtype = case
    compare_with_eager(*inputs(*shape, dtype), shape[0])


@needs_kernels
def test_samples_heads_and_a_scale():
    compare_with_eager(*inputs(3, 7, batch=2, heads=2), 3, softmax_scale=0.3)


@needs_kernels
def test_the_kernel_takes_one_frame_too():
    query, key, value, grad = inputs(1, 35)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out, expected = kernel(*leaves, 1), attention(*leaves, backend="eager")
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_one_frame_is_attention(backend):
    query, key, value, _ = inputs(1, 9)
    expected = attention(query, key, value, softmax_scale=0.2, backend=backend)
    assert torch.equal(frame_attention(query, key, value, 1, softmax_scale=0.2, backend=backend), expected)


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of keys that do not exist; their rows are not stored
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_large_scores(size):
    query, key, value, grad = inputs(2, 19)
    query = query * abs(size) / 3
    if size < 0:
        # Every score far below 0, where the 0 of a key that does not exist would overflow the exponential.
        query, key = query.abs(), -key.abs()
    ours = run(query, key, value, grad, 2)
    truth = run(query, key, value, grad, 2, torch.float64, "eager")
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=0, atol=1e-3 * max(1.0, t.abs().max().item()))


@needs_kernels
def test_log_sum_exp_has_base_two():
    query, key, value, _ = inputs(3, 40)
    _, lse = torch.ops.sclkern.frame_attention(query, key, value, 3, 0.2)
    mask = reference.frame_attention_mask(3, 40, DEVICE)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * 0.2
    expected = scores.masked_fill(~mask, -math.inf).logsumexp(-1) / math.log(2)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", HERE)
def test_nothing_reaches_another_frame_but_through_its_cls(backend):
    query, key, value, _ = inputs(3, 36)
    middle = torch.arange(108, device=DEVICE) // 36 == 1
    changed = [torch.where(middle[:, None, None], 50 * torch.randn_like(t), t) for t in (query, key, value)]
    outs = [frame_attention(*tensors, 3, backend=backend) for tensors in ((query, key, value), changed)]
    cls = torch.arange(108, device=DEVICE) % 36 == 0
    assert torch.equal((outs[0] != outs[1]).any(-1).flatten(), cls | middle)


@pytest.mark.parametrize("backend", HERE)
def test_no_samples(backend):
    for result in run(*inputs(2, 3, batch=0), 2, backend=backend):
        assert result.shape == (0, 6, 1, 32)


@needs_kernels
def test_results_do_not_depend_on_which_patches_share_a_tile(monkeypatch):
    from sclkern.kernels import frame_attention as kernels

    arguments = (*inputs(3, 37), 3)
    assert kernels.shared_patches(3, 37, 32, 32) == 4
    together = run(*arguments)
    monkeypatch.setattr(kernels, "shared_patches", lambda *_: 0)
    for a, b in zip(together, run(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
def test_patches_share_tiles_where_that_is_less_work():
    from sclkern.kernels import frame_attention as kernels

    expected = {(4, 197): 4, (8, 197): 4, (4, 50): 0, (4, 257): 0, (4, 325): 4, (16, 5): 4, (8, 1): 0}
    assert {shape: kernels.shared_patches(*shape, 64, 64) for shape in expected} == expected


@pytest.mark.parametrize("backend", HERE)
def test_any_strides_and_expanded_gradients(backend):
    packed = torch.randn(2, 12, 3, 2, 32, device=DEVICE)
    transposed = torch.randn(3, 2, 2, 12, 32, device=DEVICE).transpose(2, 3)
    channels_first = torch.randn(3, 2, 32, 2, 12, device=DEVICE).permute(0, 1, 4, 3, 2)
    expanded = torch.randn(3, 1, 12, 1, 32, device=DEVICE).expand(-1, 2, -1, 2, -1)
    offset = torch.randn(3 * 2 * 12 * 2 * 32 + 1, device=DEVICE)[1:].view(3, 2, 12, 2, 32)
    for tensors in (packed.unbind(2), transposed, channels_first, expanded, offset):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        for reduce in (torch.sum, lambda out: out[:, ::2].transpose(1, 2).mul(2.0).sum((0, 1)).square().sum()):
            ours, theirs = (
                torch.autograd.grad(reduce(frame_attention(*leaves, 4, backend=b)), leaves) for b in (backend, "eager")
            )
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=6e-5 * b.abs().max().item())


@needs_kernels
def test_any_of_the_inputs_may_require_gradients():
    query, key, value, grad = inputs()
    full = run(query, key, value, grad, 3)[1:]
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(w) for t, w in zip((query, key, value), wanted, strict=True)]
        out = frame_attention(*leaves, 3, backend="triton")
        assert out.requires_grad == any(wanted)
        chosen = [(leaf, g) for leaf, g in zip(leaves, full, strict=True) if leaf.requires_grad]
        if chosen:
            found = torch.autograd.grad(out, [leaf for leaf, _ in chosen], grad)
            assert all(torch.equal(a, g) for a, (_, g) in zip(found, chosen, strict=True))


@pytest.mark.parametrize("backend", HERE)
def test_runs_are_equal_to_the_bit(backend):
    query, key, value, grad = inputs(3, 38)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = frame_attention(*leaves, 3, backend=backend)
    first, again = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for _ in range(2))
    second = run(query, key, value, grad, 3, backend=backend)
    assert torch.equal(out, second[0])
    for a, b, c in zip(first, again, second[1:], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(backend, reentrant):
    query, key, value, grad = inputs()
    results = []
    function = functools.partial(frame_attention, num_frames=3, backend=backend)
    for wrapped in (function, functools.partial(checkpoint, function, use_reentrant=reentrant)):
        leaf = query.detach().requires_grad_()
        out = wrapped(leaf, key, value)
        out.backward(grad)
        results.append((out, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_kernels
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.integers(2, 4),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations(range(3)),
    step=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_shapes_strides_and_dtypes(frames, tokens, dtype, order, step, seed):
    sizes = (1, frames * tokens, 1)
    generator = torch.Generator().manual_seed(seed)

    def tensor():
        stored = torch.randn(*(sizes[i] * step for i in order), 32, generator=generator).to(DEVICE, dtype)
        return stored.permute(*(order.index(i) for i in range(3)), 3)[::step, ::step, ::step]

    compare_with_eager(*(tensor() for _ in range(4)), frames)


@pytest.mark.parametrize("frames", [2, 4])
def test_registration(frames):
    query, key, value, grad = inputs(4, 3)
    out, lse = torch.ops.sclkern.frame_attention(query, key, value, frames, 0.2)
    torch.library.opcheck(torch.ops.sclkern.frame_attention_backward, (grad, query, key, value, out, lse, frames, 0.2))
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(torch.ops.sclkern.frame_attention, (*leaves, frames, 0.2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    query, key, value, grad = inputs()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def function(query, key, value):
        return kernel(query * 2, key, value, 3) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out, expected = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_its_arguments_checked(dynamic):
    compiled = torch.compile(frame_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (4, 5):
        query, key, value, _ = inputs(3, tokens)
        torch.testing.assert_close(compiled(query, key, value, 3), frame_attention(query, key, value, 3))


@pytest.mark.skipif(interpreted() or DEVICE == "cuda", reason="a kernel runs here")
def test_the_op_equals_eager_where_no_kernel_runs():
    query, key, value, grad = inputs(3, 5, batch=2, heads=2)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    expected = run(*leaves, grad, 3, backend="eager")
    out = kernel(*leaves, 3)
    for a, b in zip((out, *torch.autograd.grad(out, leaves, grad)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(interpreted() or DEVICE == "cuda", reason="a kernel runs here")
@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (5, 7), (16, 17)], ids=str)
def test_a_cpu_takes_torch_s_attention_and_no_mask(shape, monkeypatch):
    arguments = (*inputs(*shape, batch=2, heads=3), shape[0])
    truth = run(*arguments, torch.float64, "eager")
    monkeypatch.setattr(reference, "frame_attention_mask", None)
    monkeypatch.setattr(reference, "frame_attention", None)
    for name, a, t in zip(NAMES, run(*arguments, backend="auto"), truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=0, atol=6e-5 * t.abs().max().item(), msg=name)


def test_eager_has_double_backward_and_the_kernel_says_so():
    query, key, value, _ = inputs(2, 2, head=2, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    torch.autograd.gradcheck(lambda *a: frame_attention(*a, 2, backend="eager"), leaves)
    torch.autograd.gradgradcheck(lambda *a: frame_attention(*a, 2, backend="eager"), leaves)
    leaves = [t.requires_grad_() for t in inputs()[:3]]
    (first,) = torch.autograd.grad(kernel(*leaves, 3).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        torch.autograd.grad(first.sum(), leaves[0])


def test_autocast_computes_in_its_dtype_and_inference_mode_runs():
    query, key, value, _ = inputs()
    dtype = torch.bfloat16
    with torch.autocast(DEVICE, dtype), torch.inference_mode():
        out = frame_attention(query, key.to(dtype), value, 3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), frame_attention(query, key, value, 3), rtol=0.02, atol=0.02)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
