"""``packed_attention``: every path against the padded form; the kernel in the interpreter or on a GPU."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from op_testing import BACKENDS, DEVICE, DTYPES, KERNELS_RUN, needs_kernels, run_in_interpreter, thorough_except
from sclkern.ops import attention, packed_attention
from sclkern.ops.dispatch import interpreted
from sclkern.reference.attention import pad_sequences

# Before memory is poisoned (conftest), which touches all of it.
EMPTY = torch.empty
TAIL = 3
# Lengths of queries, of keys, D: empty on either side or both, beside the edges of tiles, one tile for a side.
CASES = [
    ([0, 1, 15, 16, 17, 0], [3, 16, 1, 0, 31, 0], 32),
    ([33, 31, 64], [65, 63, 5], 32),
    ([5, 13], [129, 127], 64),
    ([70, 0, 128], [7, 4, 16], 32),
]
HALF_CASES = [([13, 5, 0], [90, 128, 3], 64), ([90, 70], [13, 0], 64), ([40, 50], [50, 33], 64), ([70], [65], 32)]
EVERY_CASE = [(case, dtype) for dtype in DTYPES for case in (CASES if dtype == torch.float32 else HALF_CASES)]
EDGES = [((CASES if dtype == torch.float32 else HALF_CASES)[0], dtype) for dtype in DTYPES]


def ends(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def inputs(queries, keys, head=32, dtype=torch.float32, heads=1, tail=TAIL):
    """query, key, value, a gradient, and the lengths as the op takes them; the tokens after the end are NaN."""
    tensors = []
    for lengths in (queries, keys, keys, queries):
        tokens = torch.randn(sum(lengths) + tail, heads, head)
        tokens[sum(lengths) :] = math.nan
        tensors.append(tokens.to(DEVICE, dtype))
    return *tensors, (ends(queries), ends(keys), max(queries, default=0), max(keys, default=0))


def run(query, key, value, grad, lengths, dtype=None, backend="triton", **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (query, key, value)]
    out = packed_attention(*leaves, *lengths, backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def padded(query, key, value, grad, lengths, dtype=None, backend="eager", **options):
    """What ``run`` returns, computed sample by sample of the padded form."""
    cu_q, cu_k, max_q, max_k = lengths
    results = [torch.zeros_like(t, dtype=dtype or t.dtype) for t in (query, key, value, query)]
    if cu_q.shape[0] == 1:
        return [results[3], *results[:3]]
    sides = ((query, cu_q, max_q), (key, cu_k, max_k), (value, cu_k, max_k), (grad, cu_q, max_q))
    leaves = [pad_sequences(t.to(dtype or t.dtype), cu, longest)[0].detach() for t, cu, longest in sides]
    mask = pad_sequences(key, cu_k, max_k)[1]
    leaves[:3] = [t.requires_grad_() for t in leaves[:3]]
    out = attention(*leaves[:3], key_padding_mask=mask, backend=backend, **options)
    found = [*torch.autograd.grad(out, leaves[:3], leaves[3]), out]
    for result, values, cu in zip(results, found, (cu_q, cu_k, cu_k, cu_q), strict=True):
        for sample, (start, end) in enumerate(itertools.pairwise(cu.tolist())):
            result[start:end] = values[sample, : end - start]
    return [results[3], *results[:3]]


@needs_kernels
@pytest.mark.parametrize("case", thorough_except(EDGES, EVERY_CASE), ids=str)
def test_error_is_at_most_that_of_eager(case):
    lengths, dtype = case
    arguments = inputs(*lengths, dtype)
    options = {"dropout_p": 0.2, "seed": 2**40 + 5}
    truth = padded(*arguments, torch.float64, **options)
    for a, b, t in zip(run(*arguments, **options), padded(*arguments, **options), truth, strict=True):
        error, allowed = ((x.double() - t).abs().max() for x in (a, b))
        # Gradients are differences of products, which the kernel computes again from the rounded output.
        assert error <= 1.5 * allowed + 8 * torch.finfo(dtype).eps * t.abs().max() * (1 if dtype.itemsize > 2 else 0.25)
        assert not a[-TAIL:].any()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_equals_the_padded_form(backend, dropout_p):
    arguments = inputs([3, 0, 5, 3, 17, 0], [4, 2, 0, 4, 20, 0], heads=2)
    options = {"dropout_p": dropout_p, "seed": 5, "softmax_scale": 0.3}
    results = run(*arguments, backend=backend, **options)
    assert all(not result[-TAIL:].any() for result in results)
    for a, b in zip(results, padded(*arguments, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    # A larger bound is as good.
    wider = (*arguments[4][:2], 20, 40)
    for a, b in zip(run(*arguments[:4], wider, backend=backend, **options), results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("case", [([17, 20], [33, 36]), ([5, 0, 9], [40, 3, 17]), ([40, 7], [13, 2])], ids=str)
def test_the_kernel_gives_the_bits_of_the_padded_form_every_time(case):
    arguments = inputs(*case)
    options = {"dropout_p": 0.3, "seed": 7}
    first, second = run(*arguments, **options), run(*arguments, **options)
    for a, b, c in zip(first, second, padded(*arguments, backend="triton", **options), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", [([], []), ([0], [0]), ([2, 1], [0, 0]), ([0, 0], [3, 1]), ([0], [2])], ids=str)
@pytest.mark.parametrize("tail", [0, 2])
def test_nothing_to_attend_to(backend, case, tail):
    arguments = inputs(*case, tail=tail)
    results = run(*arguments, backend=backend, dropout_p=0.0 if tail else 0.3)
    for result, like in zip(results, (arguments[0], *arguments[:3]), strict=True):
        assert result.shape == like.shape and not result.any()


@needs_kernels
def test_any_strides_and_expanded_gradients():
    stacked = torch.randn(20, 3, 2, 32, device=DEVICE)
    turned = torch.randn(3, 32, 2, 20, device=DEVICE).permute(0, 3, 2, 1)
    expanded = torch.randn(3, 20, 1, 32, device=DEVICE).expand(-1, -1, 2, -1)
    offset = torch.randn(3 * 20 * 2 * 32 + 1, device=DEVICE)[1:].view(3, 20, 2, 32)
    lengths = (ends([13, 7]), ends([2, 17]), 13, 17)
    for tensors in (stacked.unbind(1), turned, expanded, offset):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        ours, theirs = (
            torch.autograd.grad(packed_attention(*leaves, *lengths, backend=backend)[::2].sum(), leaves)
            for backend in ("triton", "eager")
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_offsets_beyond_32_bits():
    *near, lengths = inputs([3, 15], [9, 9], dtype=torch.float16, tail=0)
    # Rows 2**27 elements apart; memory that is not touched takes no room on a CPU.
    memory = EMPTY(2**31 + 2**29, dtype=torch.float16, device=DEVICE)
    far = [memory.as_strided(t.shape, (2**27, 32, 1), 512 * i) for i, t in enumerate(near)]
    for there, here in zip(far, near, strict=True):
        there.copy_(here)
    assert all(torch.equal(a, b) for a, b in zip(run(*far, lengths), run(*near, lengths), strict=True))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_any_inputs_may_require_gradients_and_a_graph_serves_twice(backend):
    query, key, value, grad, lengths = inputs([5, 3], [7, 2])
    full = run(query, key, value, grad, lengths, backend=backend)[1:]
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(w) for t, w in zip((query, key, value), wanted, strict=True)]
        out = packed_attention(*leaves, *lengths, backend=backend)
        assert out.requires_grad == any(wanted)
        chosen = [(leaf, g) for leaf, g in zip(leaves, full, strict=True) if leaf.requires_grad]
        for _ in range(2 if chosen else 0):
            found = torch.autograd.grad(out, [leaf for leaf, _ in chosen], grad, retain_graph=True)
            assert all(torch.equal(a, g) for a, (_, g) in zip(found, chosen, strict=True))
    with torch.inference_mode():
        again = packed_attention(query, key, value, *lengths, backend=backend)
    torch.testing.assert_close(again, out.detach())


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 18), st.integers(0, 18)), min_size=1, max_size=4),
    st.sampled_from((0.0, 0.5)),
    st.integers(0, 2),
)
def test_any_lengths(pairs, dropout_p, tail):
    arguments = inputs(*map(list, zip(*pairs, strict=True)), tail=tail)
    options = {"dropout_p": dropout_p, "seed": 3}
    expected = padded(*arguments, **options)
    for backend in ["auto", *BACKENDS]:
        for a, b in zip(run(*arguments, backend=backend, **options), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
def test_a_cpu_computes_equal_lengths_together():
    tensors = [torch.randn(32, 2, 32) for _ in range(3)]
    lengths = torch.tensor([0, 5, 8, 13, 16, 32], dtype=torch.int32)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        packed_attention(*tensors, lengths, lengths, 16, 16)
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["aten::scaled_dot_product_attention"] == 3


@pytest.mark.parametrize("shared", [0, 2, 3])
def test_registration(shared):
    query, key, value, grad, lengths = inputs([5, 0, 3], [7, 2, 0])
    if shared == 3:
        key, value, lengths = query.clone(), query.clone(), [lengths[0], lengths[0], lengths[2], lengths[2]]
    tensors = (query, key, value, None, *lengths[:2], torch.tensor([5], device=DEVICE), torch.arange(3, device=DEVICE))
    numbers = (*lengths[2:], 0.25, 0.2, shared)
    out, lse = torch.ops.sclkern.attention(*tensors, *numbers)
    assert lse.shape == (1, 8 + TAIL)
    if KERNELS_RUN and shared < 3:
        assert (lse[:, -TAIL:] == -math.inf).all() and (lse[:, 5:8] == -math.inf).all() and lse[:, :5].isfinite().all()
    torch.library.opcheck(torch.ops.sclkern.attention_backward, (grad, *tensors, out, lse, *numbers))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    torch.library.opcheck(torch.ops.sclkern.attention, (*leaves, *tensors[3:], *numbers))
    out, _ = torch.ops.sclkern.attention(*leaves, *tensors[3:], *numbers)
    (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        torch.autograd.grad(first.sum(), leaves[0])


@pytest.mark.skipif(interpreted(), reason="lengths of the kernel are tested where it is compiled")
def test_fifty_lengths_compile_once():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(packed_attention, fullgraph=True, backend=count, dynamic=True)
    for length in range(2, 52):
        query, key, value, _, lengths = inputs([length, 3], [2, length + 1], tail=2)
        out = compiled(query, key, value, *lengths, dropout_p=0.0)
        if length % 10 == 2:
            torch.testing.assert_close(out, packed_attention(query, key, value, *lengths))
    assert len(graphs) == 1


def test_eager_has_double_backward():
    query, key, value, _, lengths = inputs([2, 0, 1], [1, 2, 2], head=2, dtype=torch.float64, tail=0)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    options = {"dropout_p": 0.3, "seed": 1, "backend": "eager"}
    torch.autograd.gradcheck(lambda *a: packed_attention(*a, *lengths, **options), leaves)
    torch.autograd.gradgradcheck(lambda *a: packed_attention(*a, *lengths, **options), leaves)


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_on_a_gpu_no_value_is_read_back(backend, monkeypatch):
    with FakeTensorMode():
        query, key = (torch.empty(length, 2, 32, device="cuda") for length in (9, 14))
        lengths = torch.zeros(3, dtype=torch.int32, device="cuda")
        options = {"dropout_p": 0.1, "seed": 3, "backend": backend}
        assert packed_attention(query, key, key, lengths, lengths, 5, 7, **options).shape == query.shape
        monkeypatch.setenv("SCLKERN_DEBUG", "1")
        with pytest.raises(DataDependentOutputException):
            packed_attention(query, key, key, lengths, lengths, 5, 7, **options)


Q, CU = torch.zeros(3, 1, 32), torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": Q[0]}, ValueError, r"query: got shape \(1, 32\), expected \(Tq, H, D\)"),
        ({"query": Q.long()}, TypeError, r"query: got torch\.int64"),
        ({"key": Q.half()}, TypeError, r"key: got torch\.float16, expected that of query"),
        ({"value": Q[:2]}, ValueError, r"value: got shape \(2, 1, 32\), expected \(Tk, H, D\) = \(3, 1, 32\)"),
        ({"key": Q[0]}, ValueError, r"key: got shape \(1, 32\)"),
        ({"value": Q.to("meta")}, ValueError, r"value: got device meta"),
        ({"cu_seqlens_q": CU.long()}, TypeError, r"cu_seqlens_q: got torch\.int64, expected torch\.int32"),
        (
            {"cu_seqlens_k": CU[:2]},
            ValueError,
            r"cu_seqlens_k: got shape \(2,\), expected \(B \+ 1,\) = \(3,\)",
        ),
        ({"cu_seqlens_k": CU[None]}, ValueError, r"cu_seqlens_k: got shape \(1, 3\), expected \(B \+ 1,\)"),
        ({"cu_seqlens_q": CU[:0]}, ValueError, r"cu_seqlens_q: got shape \(0,\), expected \(B \+ 1,\)"),
        ({"cu_seqlens_q": CU.to("meta")}, ValueError, r"cu_seqlens_q: got device meta"),
        ({"cu_seqlens_q": CU + 1}, ValueError, r"cu_seqlens_q: got \[1, 3, 4\], expected 0, then ascending"),
        ({"cu_seqlens_k": CU * 2}, ValueError, r"cu_seqlens_k: got \[0, 4, 6\], expected .* at most 3"),
        ({"cu_seqlens_k": CU.flip(0) - 3}, ValueError, r"cu_seqlens_k: got \[0, -1, -3\]"),
        ({"max_seqlen_q": 1}, ValueError, r"max_seqlen_q: got 1, expected at least the longest sequence, 2"),
        ({"max_seqlen_k": 2.0}, TypeError, r"max_seqlen_k: got float, expected an int"),
        ({"max_seqlen_k": -1}, ValueError, r"max_seqlen_k: got -1, expected an int of at least 0"),
        ({"dropout_p": 2}, ValueError, r"dropout_p: got 2, expected a finite number from 0 to 1"),
        ({"dropout_p": 0.1, "max_seqlen_q": 2**17}, ValueError, r"dropout_p: got 131072 queries"),
        ({"seed": "a"}, TypeError, r"seed: got str"),
        ({"backend": "cuda"}, ValueError, r"backend: got 'cuda'"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    arguments = {"query": Q, "key": Q, "value": Q, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(error, match=message):
        packed_attention(**arguments | {"max_seqlen_q": 2, "max_seqlen_k": 2} | changed)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
