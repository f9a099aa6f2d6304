"""``attention``: the eager path here; the kernel in the interpreter (`make test` runs it) or on a GPU."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from op_testing import BACKENDS, DEVICE, DTYPES, needs_kernels, run_in_interpreter, thorough_except
from sclkern import reference
from sclkern.ops import attention

# (Lq, Lk, D). Every length occurs on both sides: beside the edges of tiles, and the real ones.
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
SHAPES = [(q, LENGTHS[(5 * i + 9) % 13], 32) for i, q in enumerate(LENGTHS)] + [(13, 13, 64), (65, 33, 64)]
SHAPES += [(13, 325, 64), (325, 13, 64), (17, 20, 128), (1, 1, 64)]
# In half precision, where few rows on one side turn the products around (see ``GROUP_ROWS``).
HALF_SHAPES = [(13, 325, 64), (325, 13, 64), (50, 50, 64), (20, 70, 32), (65, 65, 64), (13, 17, 128), (90, 97, 64)]
CASES = [(shape, dtype) for dtype in DTYPES for shape in (SHAPES if dtype == torch.float32 else HALF_SHAPES)]
EDGES = [((65, 33, 64), torch.float32), *(((65, 65, 64), dtype) for dtype in DTYPES[1:])]
# Before memory is poisoned (conftest), which touches all of it.
EMPTY = torch.empty
NAMES = ("out", "grad_query", "grad_key", "grad_value")


def inputs(queries, keys, head=32, dtype=torch.float32, batch=2, heads=2):
    """query, key, value, a mask that leaves the first key of each sample, a gradient."""
    tensors = [torch.randn(batch, length, heads, head) for length in (queries, keys, keys, queries)]
    query, key, value, grad = (tensor.to(DEVICE, dtype) for tensor in tensors)
    mask = torch.rand(batch, keys) < 0.7
    mask[:, :1] = True
    return query, key, value, mask.to(DEVICE), grad


def run(query, key, value, grad, dtype=None, backend="triton", **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (query, key, value)]
    out = attention(*leaves, backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def magnitudes(query, key, value, grad, *, key_padding_mask=None, dropout_p=0.0, softmax_scale=None, **_):
    """Largest score; largest sums of the absolute terms whose differences are the gradients of query and key."""
    query, key, value, grad = (tensor.double() for tensor in (query, key, value, grad))
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None]
    scale = softmax_scale or query.shape[-1] ** -0.5
    weights = reference.attention_probabilities(query, key, mask=mask, softmax_scale=scale)
    terms = weights * torch.einsum("bqhd,bkhd->bhqk", grad, value).abs() * scale / (1 - dropout_p)
    by_query = torch.einsum("bhqk,bkhd->bqhd", terms, key.abs())
    by_key = torch.einsum("bhqk,bqhd->bkhd", terms, query.abs())
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    scores = scores if mask is None else scores.masked_fill(~mask, 0.0)
    return scores.abs().max().item(), (0.0, by_query.max().item(), by_key.max().item(), 0.0)


def compare_with_eager(*arguments, **options):
    ours, eager = (run(*arguments, backend=backend, **options) for backend in ("triton", "eager"))
    truth = run(*arguments, torch.float64, "eager", **options)
    score, sums = magnitudes(*arguments, **options)
    for name, a, b, t, terms in zip(NAMES, ours, eager, truth, sums, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        # Half a unit in the last place of the largest value: what rounding the exact result costs.
        rounding = torch.finfo(a.dtype).eps / 2 * t.abs().max().item()
        # Eager subtracts the same products it weighed; a kernel computes them again, from the rounded output.
        rounding += torch.finfo(a.dtype).eps * terms
        # A score in float32 is known to half a unit only, and so is its log-sum-exp.
        rounding += torch.finfo(torch.float32).eps * score * max(t.abs().max().item(), terms)
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)


@needs_kernels
@pytest.mark.parametrize("case", thorough_except(EDGES, CASES), ids=str)
def test_error_is_at_most_that_of_eager(case):
    shape, dtype = case
    batch, heads = (1, 1) if max(shape) > 100 else (2, 2 if shape[0] == 13 else 1)
    query, key, value, mask, grad = inputs(*shape, dtype, batch, heads)
    options = {"key_padding_mask": mask, "dropout_p": 0.2, "seed": 2**40 + 5}
    compare_with_eager(query, key, value, grad, **options)


@needs_kernels
@pytest.mark.parametrize("shape", [(17, 33, 64), (33, 65, 32)], ids=str)
def test_without_mask_and_dropout_with_a_scale(shape):
    query, key, value, _, grad = inputs(*shape)
    compare_with_eager(query, key, value, grad, softmax_scale=0.3)


@needs_kernels
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_large_scores(size):
    query, key, value, mask, grad = inputs(17, 33)
    query = query * abs(size) / 3
    if size < 0:
        # Every score far below 0, where a padded key's score of 0 would overflow the exponential.
        query, key = query.abs(), -key.abs()
    key_bad = key.masked_fill(~mask[:, :, None, None], math.nan)
    ours, truth = (
        attention(*(x.to(t) for x in (query, key_bad, value)), key_padding_mask=mask, return_lse=True, backend=b)[1]
        for t, b in ((torch.float32, "triton"), (torch.float64, "eager"))
    )
    assert truth.abs().max() > 500
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
    compare_with_eager(query, key, value, grad, key_padding_mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exp(backend):
    query, key, value, mask, _ = inputs(17, 33)
    mask[1] = False
    query.requires_grad_()
    _, lse = attention(query, key, value, key_padding_mask=mask, return_lse=True, backend=backend)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / math.sqrt(32)
    expected = scores.masked_fill(~mask[:, None, None], -math.inf).logsumexp(-1)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    torch.testing.assert_close(lse.double(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lengths_of_zero(backend, dropout_p):
    for queries, keys, batch in ((3, 0, 2), (0, 3, 2), (0, 0, 2), (3, 3, 0)):
        query, key, value, mask, grad = inputs(queries, keys, batch=batch)
        results = run(query, key, value, grad, backend=backend, key_padding_mask=mask, dropout_p=dropout_p)
        for name, result, like in zip(NAMES, results, (query, query, key, value), strict=True):
            assert result.shape == like.shape and (result == 0).all(), (name, result)
        _, lse = attention(query, key, value, backend=backend, return_lse=True)
        assert lse.shape == (batch, 2, queries) and (keys > 0 or (lse == -math.inf).all())


@needs_kernels
@pytest.mark.parametrize("shape", [(17, 13), (13, 33), (33, 36)])
def test_a_sample_without_keys_and_what_padding_holds(shape):
    query, key, value, mask, grad = inputs(*shape)
    mask[1] = False
    options = {"key_padding_mask": mask, "dropout_p": 0.1, "seed": 3}
    clean = run(query, key, value, grad, **options)
    for name, result in zip(NAMES, clean, strict=True):
        assert (result[1] == 0).all() and result.isfinite().all(), name
    garbage = torch.tensor([math.nan, math.inf, -math.inf, math.nan], device=DEVICE).repeat(8)
    dirty = (torch.where(mask[:, :, None, None], t, garbage) for t in (key, value))
    for name, a, b in zip(NAMES, run(query, *dirty, grad, **options), clean, strict=True):
        assert torch.equal(a, b), name


def dropped(backend, seed, queries=17, keys=29, **options):
    """(B, H, Lq, Lk): the probabilities left by dropout, shown by an identity as the value."""
    query, key, _, _, _ = inputs(queries, keys)
    value = torch.eye(keys, 32, device=DEVICE).view(1, keys, 1, 32).expand(2, -1, 2, -1)
    out = attention(query, key, value, dropout_p=0.4, seed=seed, backend=backend, **options)
    return out[..., :keys].transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1])
def test_drops_what_the_mask_says(backend, seed):
    keep = reference.attention_dropout_mask(2, 2, 17, 29, dropout_p=0.4, seed=seed, device=DEVICE)
    assert torch.equal(dropped(backend, seed) != 0, keep)
    assert torch.equal(dropped(backend, torch.tensor(seed, device=DEVICE)) != 0, keep)


@needs_kernels
def test_dropout_and_results_do_not_depend_on_tiles():
    from sclkern.kernels.attention import attention_forward
    from sclkern.kernels.attention_backward import attention_backward
    from sclkern.kernels.config import LaunchConfig

    query, key, value, mask, grad = inputs(40, 40, heads=1)
    value = torch.eye(40, 32, device=DEVICE).view(1, 40, 1, 32).expand(2, -1, -1, -1).contiguous()
    seed = torch.tensor([11], device=DEVICE)
    results = []
    for block in (16, 64):
        tiles = {"BLOCK_QUERIES": block, "BLOCK_KEYS": block, "num_warps": 4}
        config = LaunchConfig.of("attention_forward_kernel", TRANSPOSED=0, KEEP_BITS=0, **tiles)
        out, lse = attention_forward(query, key, value, mask, seed, 0.5, 0.2, config=config)
        # A tile of 64 holds all 40 keys, so that their kernel runs alone.
        single = int(block == 64)
        by_key = LaunchConfig.of("attention_backward_key_kernel", TRANSPOSED=1, SINGLE_TILE=single, **tiles)
        by_query = LaunchConfig.of("attention_backward_query_kernel", TRANSPOSED=0, SINGLE_TILE=0, **tiles)
        configs = (by_key,) if single else (by_query, by_key)
        gradients = attention_backward(grad, query, key, value, mask, seed, out, lse, 0.5, 0.2, config=configs)
        results.append((out, lse, *gradients))
    assert torch.equal(results[0][0] != 0, results[1][0] != 0)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_place_keeps_its_draw_when_lengths_grow():
    small = reference.attention_dropout_mask(2, 3, 5, 9, dropout_p=0.3, seed=4)
    large = reference.attention_dropout_mask(3, 3, 8, 30, dropout_p=0.3, seed=4)
    assert torch.equal(small, large[:2, :, :5, :9])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.97])
def test_the_dropped_share_is_dropout_p(dropout_p):
    draws = reference.attention_dropout_mask(2, 4, 100, 200, dropout_p=dropout_p, seed=9).double()
    assert abs(1 - draws.mean().item() - dropout_p) < 4.5 * math.sqrt(dropout_p * (1 - dropout_p) / draws.numel())
    # Each of the eight places that share one call of the generator.
    shares = 1 - draws.view(-1, 25, 8).mean((0, 1))
    assert (shares - dropout_p).abs().max() < 5 * math.sqrt(8 * dropout_p * (1 - dropout_p) / draws.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_everything(backend):
    query, key, value, _, grad = inputs(5, 7)
    assert all((result == 0).all() for result in run(query, key, value, grad, backend=backend, dropout_p=1.0))


@needs_kernels
def test_any_strides_and_expanded_gradients():
    packed = torch.randn(2, 17, 3, 2, 32, device=DEVICE)
    transposed = torch.randn(3, 2, 2, 17, 32, device=DEVICE).transpose(2, 3)
    channels_first = torch.randn(3, 2, 32, 2, 17, device=DEVICE).permute(0, 1, 4, 3, 2)
    expanded = torch.randn(3, 1, 17, 1, 32, device=DEVICE).expand(-1, 2, -1, 2, -1)
    offset = torch.randn(3 * 2 * 17 * 2 * 32 + 1, device=DEVICE)[1:].view(3, 2, 17, 2, 32)
    mask = (torch.rand(17, 2, device=DEVICE) < 0.8).T
    for tensors in (packed.unbind(2), transposed, channels_first, expanded, offset):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        for reduce in (torch.sum, lambda out: out[:, ::2].transpose(1, 2).mul(2.0).sum((0, 1)).square().sum()):
            ours, theirs = (
                torch.autograd.grad(reduce(attention(*leaves, key_padding_mask=mask, backend=backend)), leaves)
                for backend in ("triton", "eager")
            )
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_any_of_the_inputs_may_require_gradients():
    query, key, value, mask, grad = inputs(5, 7)
    full = run(query, key, value, grad, key_padding_mask=mask)[1:]
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(w) for t, w in zip((query, key, value), wanted, strict=True)]
        out = attention(*leaves, key_padding_mask=mask, backend="triton")
        assert out.requires_grad == any(wanted)
        chosen = [(leaf, g) for leaf, g in zip(leaves, full, strict=True) if leaf.requires_grad]
        if chosen:
            found = torch.autograd.grad(out, [leaf for leaf, _ in chosen], grad)
            assert all(torch.equal(a, g) for a, (_, g) in zip(found, chosen, strict=True))


@needs_kernels
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shapes_masks_strides_and_dtypes(data):
    draw = data.draw
    lengths, batch, heads = st.integers(0, 40), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, keys, head = draw(lengths), draw(lengths), draw(st.sampled_from((32, 64)))
    dtype = draw(st.sampled_from(DTYPES))
    tensors = []
    for length in (queries, keys, keys, queries):
        order = draw(st.permutations(range(4)))
        sizes = [(batch, length, heads, head)[axis] for axis in order]
        laid_out = torch.randn(sizes, device=DEVICE).to(dtype).permute([order.index(axis) for axis in range(4)])
        step = draw(st.sampled_from((1, 2)))
        tensors.append(laid_out.repeat_interleave(step, 1)[:, ::step])
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * keys, max_size=batch * keys)), dtype=torch.bool)
    options = {"key_padding_mask": mask.view(batch, keys).to(DEVICE)} if draw(st.booleans()) else {}
    options |= {"dropout_p": 0.3, "seed": draw(st.integers(-(2**63), 2**63 - 1))} if draw(st.booleans()) else {}
    if queries and keys:
        compare_with_eager(*tensors, **options)
    else:
        assert all((result == 0).all() for result in run(*tensors, **options))


@needs_kernels
def test_offsets_beyond_32_bits():
    query, key, value, _, grad = inputs(3, 5, dtype=torch.float16, heads=1)
    # Two samples more than 2**31 elements apart; memory that is not touched takes no room on a CPU.
    memory = EMPTY(2**31 + 8192, dtype=torch.float16, device=DEVICE)
    near = query, key, value, grad
    far = [memory.as_strided(t.shape, (2**31 + 64, 32, 32, 1), 512 * i) for i, t in enumerate(near)]
    for there, here in zip(far, near, strict=True):
        there.copy_(here)
    assert all(torch.equal(a, b) for a, b in zip(run(*far), run(*near), strict=True))


@needs_kernels
def test_runs_are_equal_to_the_bit():
    query, key, value, mask, grad = inputs(17, 33, heads=1)
    options = {"key_padding_mask": mask, "dropout_p": 0.1, "seed": 2}
    first, second = (run(query, key, value, grad, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_the_interpreter():
    run_in_interpreter(__file__)
