"""What ``attention`` accepts, and which of its paths computes it."""

import importlib.util
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from op_testing import DEVICE
from sclkern.ops import attention, explain
from sclkern.ops.dispatch import interpreted


def inputs(queries, keys, head=32, dtype=torch.float32, batch=2, heads=2):
    """query, key, value, a mask that leaves the first key of each sample, a gradient."""
    tensors = [torch.randn(batch, length, heads, head) for length in (queries, keys, keys, queries)]
    query, key, value, grad = (tensor.to(DEVICE, dtype) for tensor in tensors)
    mask = torch.rand(batch, keys) < 0.7
    mask[:, :1] = True
    return query, key, value, mask.to(DEVICE), grad


@pytest.mark.parametrize("full", [False, True])
def test_the_registered_op_has_the_gradients_of_the_definition(full):
    query, key, value, mask, grad = inputs(5, 7)
    mask[1] = False
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    ids = torch.tensor([2**40, 3], device=DEVICE) if full else None
    extra = (mask, None, None, torch.tensor([5], device=DEVICE), ids) if full else (None,) * 5
    out, lse = torch.ops.sclkern.attention(*leaves, *extra, 0, 0, 0.25 * full, 0.2, 0)
    assert lse.shape == (2, 10) and not lse.requires_grad  # (H, B * Lq)
    options = {"key_padding_mask": mask, "dropout_p": 0.25, "seed": 5, "dropout_ids": ids} if full else {}
    expected = attention(*leaves, softmax_scale=0.2, backend="eager", **options)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def run(*tensors, grad, mask, dtype, backend="auto"):
    """out and the gradients of query, key and value."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out = attention(*leaves, key_padding_mask=mask, backend=backend)
    return out, *torch.autograd.grad(out, leaves, grad.to(dtype))


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cpu_takes_torchs_attention(dtype):
    query, key, value, mask, grad = (t.cpu() for t in inputs(17, 29))
    query, key, value, grad = (t.to(dtype) for t in (query, key, value, grad))
    mask[1] = False
    options = {"grad": grad, "mask": mask}
    clean = run(query, key, value, dtype=dtype, **options)
    eager = run(query, key, value, dtype=dtype, backend="eager", **options)
    truth = run(query, key, value, dtype=torch.float64, backend="eager", **options)
    for a, b, t in zip(clean, eager, truth, strict=True):
        allowed = 1.5 * (b.double() - t).abs().max() + 4 * torch.finfo(dtype).eps * t.abs().max()
        assert (a.double() - t).abs().max() <= allowed and (a[1] == 0).all()
    for tensor in (key, value):
        tensor.masked_fill_(~mask[:, :, None, None], math.nan)
    for a, b in zip(run(query, key, value, dtype=dtype, **options), clean, strict=True):
        assert torch.equal(a, b)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        attention(query, key, value, key_padding_mask=mask)
    assert "aten::scaled_dot_product_attention" in {event.key for event in profiler.key_averages()}


def test_without_a_seed_dropout_draws_from_torchs_generator():
    query, key, value, _, _ = inputs(5, 7)
    torch.manual_seed(1)
    first, second = (attention(query, key, value, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, attention(query, key, value, dropout_p=0.5)) and not torch.equal(first, second)


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
    out, _ = torch.ops.sclkern.attention(*leaves, *[None] * 5, 0, 0, 0.0, 0.2, 0)
    (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        torch.autograd.grad(first.sum(), leaves[0])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_tiles_fit_the_lengths():
    from sclkern.kernels import config_rules as kernels

    lengths = {1: 16, 13: 16, 17: 32, 50: 64, 65: 32, 128: 128, 325: 128, 0: 16}
    assert {length: kernels.tile(length, 128) for length in lengths} == lengths
    assert {kernels.tile(length, 64) for length in range(2000)} == {16, 32, 64}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_backward_has_few_configurations_each_of_one_group_of_warps_where_that_fits():
    from sclkern.kernels.config import select

    def plan(queries, keys, head=64, dtype=torch.bfloat16):
        configs = select("attention", "backward", dtype, "sm_90", queries=queries, keys=keys, head_dim=head)
        return [(c.kernel.split("_")[2], c["BLOCK_QUERIES"], c["BLOCK_KEYS"], c.num_warps) for c in configs]

    assert plan(325, 325) == [("query", 64, 32, 4), ("key", 32, 64, 4)]
    assert plan(325, 325, head=128) == [("query", 64, 32, 4), ("key", 32, 64, 8)]
    assert plan(325, 325, dtype=torch.float32) == [("query", 32, 32, 8), ("key", 32, 32, 8)]
    assert plan(65, 65) == [("query", 32, 32, 4), ("key", 32, 32, 4)]
    assert plan(18, 325) == [("query", 32, 64, 4)] and plan(40, 325) == [("query", 64, 64, 8)]
    assert plan(325, 13) == [("key", 64, 16, 4)] and plan(325, 18) == [("key", 64, 32, 8)]
    assert plan(18, 18) == [("key", 32, 32, 8)] and plan(13, 13) == [("key", 16, 16, 2)]
    # Each is compiled once more, with and without dropout: lengths themselves are no part of it.
    lengths = (*range(1, 140), 197, 325, 577, 2**15)
    assert len({launch for queries in lengths for keys in lengths for launch in plan(queries, keys)}) <= 20


Q = torch.zeros(2, 3, 1, 32)


def test_explains_what_it_cannot_do():
    assert str(explain("attention", Q[..., :20], Q[..., :20], Q[..., :20])).startswith(
        "eager: head dim 20 has no kernel"
    )


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
        ((Q, Q, Q), {"dropout_p": 1.5}, ValueError, r"dropout_p: got 1\.5, expected a finite number from 0 to 1"),
        ((Q, Q, Q), {"dropout_p": "a"}, TypeError, r"dropout_p: got str"),
        ((Q, Q, Q), {"softmax_scale": math.nan}, ValueError, r"softmax_scale: got nan"),
        ((Q, Q, Q), {"seed": 1.0}, TypeError, r"seed: got float"),
        ((Q, Q, Q), {"seed": torch.zeros(2)}, TypeError, r"seed: got torch\.float32, expected torch\.int64"),
        ((Q, Q, Q), {"backend": "cuda"}, ValueError, r"backend: got 'cuda'"),
        ((Q[..., :20],) * 3, {"backend": "triton"}, ValueError, r"head dim 20 has no kernel"),
        ((Q, Q, Q), {"backend": "triton", "softmax_scale": -1.0}, ValueError, r"softmax_scale -1\.0 is not above 0"),
        (
            (Q[:1].expand(1, 3, 1, 32), *[Q[:1, :1].expand(1, 2**19 + 1, 1, 32)] * 2),
            {"dropout_p": 0.1},
            ValueError,
            r"dropout_p: got 3 queries and 524289 keys, expected at most 65536 and 524288",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no parameters")
def test_no_length_is_in_a_compiled_kernel():
    from sclkern.kernels import attention as kernels
    from sclkern.kernels import attention_backward as backward

    shape = backward.attention_backward_query_kernel, backward.attention_backward_key_kernel
    for kernel in (kernels.attention_forward_kernel, *shape):
        found = {p.name: p for p in kernel.params}
        for name in ("queries", "keys", "query_rows", "key_rows", "heads"):
            assert found[name].do_not_specialize and not found[name].is_constexpr, (kernel, name)
        fixed = {"HEAD_DIM", "BLOCK_QUERIES", "BLOCK_KEYS", "SINGLE_TILE", "TRANSPOSED"}
        assert {name for name, p in found.items() if p.is_constexpr} <= fixed
