"""``attention``: the eager path here; the kernel in the interpreter (`make test` runs it) or on a GPU."""

import importlib.util
import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from op_testing import BACKENDS, DEVICE, DTYPES, needs_kernels, run_in_interpreter
from sclkern import reference
from sclkern.dispatch import interpreted
from sclkern.ops import attention, explain

# Lq, Lk, D.
SHAPES = [(q, k, 64 if (q + k) % 4 else 32) for q, k in itertools.product((1, 13, 17, 65), (1, 13, 16, 33))]
SHAPES += [(65, 70, 32), (13, 17, 128)]
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
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for dtype in DTYPES for shape in SHAPES[:: 3 if dtype == torch.float16 else 1]],
    ids=str,
)
def test_error_is_at_most_that_of_eager(shape, dtype):
    query, key, value, mask, grad = inputs(*shape, dtype, heads=2 if shape[0] == 13 else 1)
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
@pytest.mark.parametrize("shape", [(17, 13), (13, 33), (33, 40)])
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
    from sclkern.kernels import attention as kernels

    query, key, value, mask, grad = inputs(40, 40)
    value = torch.eye(40, 32, device=DEVICE).view(1, 40, 1, 32).expand(2, -1, 2, -1).contiguous()
    seed = torch.tensor([11], device=DEVICE)
    results = []
    for largest in ({4: ((16, 16),)}, {4: ((64, 64),)}):
        out, lse = kernels.attention_forward(query, key, value, mask, seed, 0.5, 0.2, largest)
        gradients = kernels.attention_backward(grad, query, key, value, mask, seed, out, lse, 0.5, 0.2, largest)
        results.append((out, lse, *gradients))
    assert torch.equal(results[0][0] != 0, results[1][0] != 0)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_place_keeps_its_draw_when_lengths_grow():
    small = reference.attention_dropout_mask(2, 3, 5, 9, dropout_p=0.3, seed=4)
    large = reference.attention_dropout_mask(3, 3, 8, 30, dropout_p=0.3, seed=4)
    assert torch.equal(small, large[:2, :, :5, :9])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.97])
def test_the_share_dropped_is_that_asked_for(dropout_p):
    draws = reference.attention_dropout_mask(2, 4, 100, 200, dropout_p=dropout_p, seed=9).double()
    assert abs(1 - draws.mean().item() - dropout_p) < 4.5 * math.sqrt(dropout_p * (1 - dropout_p) / draws.numel())
    # Each of the eight places that share one call of the generator.
    shares = 1 - draws.view(-1, 25, 8).mean((0, 1))
    assert (shares - dropout_p).abs().max() < 5 * math.sqrt(8 * dropout_p * (1 - dropout_p) / draws.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_everything(backend):
    query, key, value, _, grad = inputs(5, 7)
    assert all((result == 0).all() for result in run(query, key, value, grad, backend=backend, dropout_p=1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_no_seed_draws_from_the_generator_and_checkpointing_repeats_it(backend, reentrant):
    query, key, value, _, grad = inputs(5, 7)
    query.requires_grad_()

    def function(query):
        return attention(query, key, value, dropout_p=0.5, backend=backend)

    results = []
    for wrapped in (function, lambda q: checkpoint(function, q, use_reentrant=reentrant)):
        torch.manual_seed(1)
        out = wrapped(query)
        torch.rand(3, device=DEVICE)
        results.append((out, *torch.autograd.grad(out, query, grad)) if not reentrant else (out,))
        if reentrant:
            query.grad = None
            out.backward(grad)
            results[-1] += (query.grad,)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(function(query), function(query))


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
def test_runs_are_equal_to_the_bit():
    query, key, value, mask, grad = inputs(33, 40)
    options = {"key_padding_mask": mask, "dropout_p": 0.1, "seed": 2}
    first, second = (run(query, key, value, grad, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("full", [False, True])
def test_registration(full):
    query, key, value, mask, grad = inputs(5, 7)
    extra = (mask, torch.tensor([5], device=DEVICE)) if full else (None, None)
    numbers = (0.25 if full else 0.0, 0.2)
    out, lse = torch.ops.sclkern.attention(query, key, value, *extra, *numbers)
    torch.library.opcheck(torch.ops.sclkern.attention_backward, (grad, query, key, value, *extra, out, lse, *numbers))
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(torch.ops.sclkern.attention, (*leaves, *extra, *numbers))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    query, key, value, mask, grad = inputs(5, 7)
    seed = torch.tensor([5], device=DEVICE)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def function(query, key, value):
        return torch.ops.sclkern.attention(query * 2, key, value, mask, seed, 0.25, 0.2)[0] + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out, expected = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("full", [False, True])
def test_the_op_equals_eager_where_no_kernel_runs(full):
    query, key, value, mask, grad = inputs(5, 7)
    mask[1] = False
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    extra = (mask, torch.tensor([5], device=DEVICE)) if full else (None, None)
    out, lse = torch.ops.sclkern.attention(*leaves, *extra, 0.25 * full, 0.2)
    options = {"key_padding_mask": mask, "dropout_p": 0.25, "seed": 5} if full else {}
    expected, expected_lse = attention(*leaves, softmax_scale=0.2, return_lse=True, backend="eager", **options)
    torch.testing.assert_close((out, lse * math.log(2)), (expected, expected_lse))
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_with_its_arguments_checked():
    query, key, value, mask, _ = inputs(5, 7)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    options = {"key_padding_mask": mask, "dropout_p": 0.2, "seed": 4}
    torch.testing.assert_close(compiled(query, key, value, **options), attention(query, key, value, **options))


def test_eager_has_double_backward_and_the_kernel_says_so():
    query, key, value, _, _ = inputs(2, 3, head=2, dtype=torch.float64, batch=1, heads=1)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    torch.autograd.gradgradcheck(lambda *a: attention(*a, dropout_p=0.3, seed=1, backend="eager"), leaves)
    leaves = [t.requires_grad_() for t in inputs(2, 3)[:3]]
    out, _ = torch.ops.sclkern.attention(*leaves, None, None, 0.0, 0.2)
    (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        torch.autograd.grad(first.sum(), leaves[0])


def test_autocast_computes_in_its_dtype():
    query, key, value, _, _ = inputs(5, 7)
    dtype = torch.float16 if interpreted() else torch.bfloat16
    with torch.autocast(DEVICE, dtype):
        out = attention(query, key.to(dtype), value)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), attention(query, key, value), rtol=0.02, atol=0.02)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_tiles_fit_the_lengths():
    from sclkern.kernels import attention as kernels

    lengths = {1: 16, 13: 16, 17: 32, 50: 64, 65: 32, 128: 128, 325: 128, 0: 16}
    assert {length: kernels.tile(length, 128) for length in lengths} == lengths
    assert {kernels.tile(length, 64) for length in range(2000)} == {16, 32, 64}


Q = torch.zeros(2, 3, 1, 32)


def test_explains_what_it_cannot_do():
    assert explain("attention", Q[..., :20], Q[..., :20], Q[..., :20]).startswith("eager: head dim 20 has no kernel")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[0], Q, Q), {}, ValueError, r"query: got shape \(3, 1, 32\), expected \(B, Lq, H, D\)"),
        ((Q.long(), Q, Q), {}, TypeError, r"query: got torch\.int64"),
        ((Q, Q.half(), Q), {}, TypeError, r"key: got torch\.float16, expected that of query, torch\.float32"),
        ((Q, Q[:1], Q), {}, ValueError, r"key: got shape \(1, 3, 1, 32\), expected \(B, Lk, H, D\)"),
        ((Q, Q, Q[:, :2]), {}, ValueError, r"value: got shape \(2, 2, 1, 32\)"),
        ((Q, Q, Q.to("meta")), {}, ValueError, r"value: got device meta, expected that of query, cpu"),
        ((Q, Q, Q), {"key_padding_mask": torch.ones(2, 3)}, TypeError, r"key_padding_mask: got torch\.float32"),
        ((Q, Q, Q), {"key_padding_mask": torch.ones(3, 2) > 0}, ValueError, r"key_padding_mask: got shape \(3, 2\)"),
        ((Q, Q, Q), {"dropout_p": 1.5}, ValueError, r"dropout_p: got 1\.5, expected 0 to 1"),
        ((Q, Q, Q), {"dropout_p": "a"}, TypeError, r"dropout_p: got str"),
        ((Q, Q, Q), {"softmax_scale": math.nan}, ValueError, r"softmax_scale: got nan"),
        ((Q, Q, Q), {"seed": 1.0}, TypeError, r"seed: got float"),
        ((Q, Q, Q), {"seed": torch.zeros(2)}, TypeError, r"seed: got torch\.float32 of shape \(2,\)"),
        ((Q, Q, Q), {"backend": "cuda"}, ValueError, r"backend: got 'cuda'"),
        ((Q[..., :20],) * 3, {"backend": "triton"}, ValueError, r"head dim 20 has no kernel"),
        ((Q, Q, Q), {"backend": "triton", "softmax_scale": -1.0}, ValueError, r"softmax_scale -1\.0 is not above 0"),
        (
            (Q[:1].expand(1, 3, 1, 32), *[Q[:1, :1].expand(1, 2**19 + 1, 1, 32)] * 2),
            {"dropout_p": 0.1},
            ValueError,
            r"dropout_p: got 0\.1 with 3 queries and 524289 keys",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
