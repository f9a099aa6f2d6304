"""``linear_cross_entropy``: chunks on a CPU; the kernels in the interpreter (`make test` runs it) or on a GPU."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from op_testing import DEVICE, DTYPES, run_in_interpreter, thorough_except
from sclkern import reference
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.ops.linear_cross_entropy import linear_cross_entropy

MODULE = sys.modules["sclkern.ops.linear_cross_entropy"]
NAMES = ("loss", "hidden", "weight", "bias")
IGNORED = -100


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """The op, not the plain definition, at any size; all logits in one piece."""
    monkeypatch.setattr(MODULE, "MAX_EAGER_LOGITS", -1)


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_LOGITS", {"cuda": 300, "cpu": 300})
    monkeypatch.setattr(MODULE, "MIN_COLUMNS", 128)


def inputs(rows, vocabulary, width=12, dtype=torch.float32, bias=True, ignored=0.3):
    """hidden, weight, bias, labels of which some are ignored."""
    shape = rows if isinstance(rows, tuple) else (rows,)
    hidden = torch.randn(*shape, width).to(DEVICE, dtype)
    weight = torch.randn(vocabulary, width).to(DEVICE, dtype)
    bias = torch.randn(vocabulary).to(DEVICE, dtype) if bias else None
    labels = torch.randint(0, vocabulary, shape)
    labels[torch.rand(shape) < ignored] = IGNORED
    return hidden, weight, bias, labels.to(DEVICE)


def run(function, hidden, weight, bias, labels, dtype=None, upstream=None, **options):
    """Loss and the gradients of hidden, weight and bias."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight, bias)]
    loss = function(*leaves, labels, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    leaves = [leaf for leaf in leaves if leaf is not None]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def assert_as_good_as_eager(*arguments, **options):
    truth = run(reference.linear_cross_entropy, *arguments, dtype=torch.float64, **options)
    eager = run(reference.linear_cross_entropy, *arguments, **options)
    ours = run(linear_cross_entropy, *arguments, **options)
    hidden, weight = arguments[:2]
    logit = (hidden.double().abs() @ weight.double().abs().T).max().item() if hidden.numel() else 0.0
    for name, a, b, t in zip(NAMES, ours, eager, truth, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if not t.numel():
            continue
        # Eager rounds the sum with the bias, the op the product: as much, but not the same, hence the norms where the
        # dtype is that coarse, over which chance averages out.
        size = torch.Tensor.norm if hidden.dtype != torch.float32 else lambda x: x.abs().max()
        error, allowed, largest = (size(x).item() for x in (a - t, b - t, t))
        # Half a unit in the last place of the largest value, and the rounding of the largest logit in float32: the
        # loss moves by as much, and the gradients by that part of themselves.
        rounding = torch.finfo(a.dtype).eps / 2 * largest
        rounding += torch.finfo(torch.float32).eps * logit * max(largest, 1.0 if name == "loss" else 0.0)
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)
        if hidden.dtype == torch.float32:
            assert error <= (2e-5 if name == "loss" else 6e-5) * largest, (name, error, largest)


CASES = [(1, 129), (15, 17), (16, 128), (17, 63), (31, 16), (32, 325), (2, 1), (3, 8193), (65, 127)]  # rows, vocabulary
CASES = [(*case, torch.float32) for case in CASES]
CASES += [(32, 8193 if DEVICE == "cuda" else 65, dtype) for dtype in DTYPES[1:]]


@pytest.mark.parametrize("case", thorough_except([CASES[0], *CASES[-2:]], CASES), ids=str)
def test_error_is_at_most_that_of_eager(case):
    rows, vocabulary, dtype = case
    arguments = inputs(rows, vocabulary, dtype=dtype, bias=vocabulary % 2 == 1, ignored=0.1)
    reduction, upstream = ("mean", torch.tensor(0.7)) if dtype == torch.float32 else ("none", torch.randn(rows))
    assert_as_good_as_eager(*arguments, reduction=reduction, upstream=upstream.to(DEVICE))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_pieces(reduction, in_pieces):
    upstream = torch.randn(3, 7, device=DEVICE) if reduction == "none" else None
    assert_as_good_as_eager(*inputs((3, 7), 200, bias=reduction != "sum"), reduction=reduction, upstream=upstream)


def test_memory_is_that_of_a_piece(in_pieces):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if torch.is_tensor(t))])
            return out

    with Watch():
        run(linear_cross_entropy, *inputs(40, 700))
    # 128 columns in the backward, 1 row in the forward: the weight is larger.
    assert largest == 700 * 12


@pytest.mark.parametrize("limit", [2**24, 300])
def test_confident_labels_are_right(limit, monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_LOGITS", {"cuda": limit, "cpu": limit})
    weight = torch.cat([torch.eye(16), 0.01 * torch.randn(150, 16)])
    arguments = [20 * torch.eye(5, 16), weight, 0.01 * torch.randn(166), torch.arange(5)]
    arguments = [t.to(DEVICE) for t in arguments]
    truth = run(reference.linear_cross_entropy, *arguments, dtype=torch.float64)
    eager = run(reference.linear_cross_entropy, *arguments)
    ours = run(linear_cross_entropy, *arguments)
    for name, a, b, t in zip(NAMES, ours, eager, truth, strict=True):
        a, b, t = (x if x.ndim == 0 else x[:5] for x in (a, b, t))  # of the bias, only the labels
        assert (a - t).norm() <= 1e-3 * t.norm(), name
        assert (b - t).norm() > 0.01 * t.norm(), "eager is right too, so that this shows nothing"


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_hits_count_the_first_of_equals(backend):
    logits = [[1.0, 5, 5], [1, 5, 5], [5, 5, 1], [-1, -2, -3], [0, 0, 0], [1, 2, 9], [1, 2, 9]]
    labels = torch.tensor([1, 2, 0, 0, 0, 2, IGNORED], device=DEVICE)
    hidden, weight = torch.tensor(logits, device=DEVICE), torch.eye(3, device=DEVICE)
    options = {"return_hits": True, "backend": backend}
    for reduction in ("mean", "none"):
        _, hits = linear_cross_entropy(hidden.requires_grad_(), weight, None, labels, reduction=reduction, **options)
        assert hits.dtype == torch.int64 and hits.ndim == 0 and not hits.requires_grad and hits == 5
    assert linear_cross_entropy(hidden, weight, None, labels.clamp_min(0), ignore_index=2, **options)[1] == 4


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_predict_is_zero_with_zero_gradients(rows, reduction):
    for backend in ("auto", "eager"):
        found = run(linear_cross_entropy, *inputs(rows, 19, ignored=1.1), reduction=reduction, backend=backend)
        assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_ignored_rows_do_not_leak(backend, garbage):
    hidden, weight, bias, labels = inputs(12, 40)
    used = labels != IGNORED
    expected = run(linear_cross_entropy, hidden[used], weight, bias, labels[used], backend=backend)
    hidden = hidden.masked_fill(~used[:, None], garbage)
    found = run(linear_cross_entropy, hidden, weight, bias, labels, backend=backend)
    assert (found[1][~used] == 0).all()
    found[1] = found[1][used]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_banned_tokens_take_no_part():
    hidden, weight, bias, labels = inputs(9, 30, ignored=0.0)
    bias[20:] = -math.inf
    labels %= 20
    found = run(linear_cross_entropy, hidden, weight, bias, labels)
    expected = run(linear_cross_entropy, hidden, weight[:20], bias[:20], labels)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[: len(b)] if a.ndim else a, b)
        assert not a.ndim or len(a) == len(b) or (a[20:] == 0).all()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("limit", [2**24, 300])
def test_inputs_without_gradient_leave_the_others_as_they_are(wanted, limit, monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_LOGITS", {"cuda": limit, "cpu": limit})
    *tensors, labels = inputs(6, 140)
    full = run(linear_cross_entropy, *tensors, labels)[1:]
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip(tensors, wanted, strict=True)]
    loss = linear_cross_entropy(*leaves, labels)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for leaf, flag, expected in zip(leaves, wanted, full, strict=True):
        assert torch.equal(leaf.grad, expected) if flag else leaf.grad is None


def test_any_strides_and_expanded_gradients():
    hidden = torch.randn(22, 2, 11, device=DEVICE).transpose(0, 2)[1:, :, ::2].requires_grad_()
    weight = torch.randn(12, 41, device=DEVICE).T[1:, 1:].requires_grad_()
    bias = torch.randn(1, device=DEVICE).expand(40).requires_grad_()
    labels = torch.randint(0, 40, (2, 10), device=DEVICE).T
    found = []
    for function in (linear_cross_entropy, reference.linear_cross_entropy):
        losses = function(hidden, weight, bias, labels, reduction="none")
        for loss in (losses.sum(), (losses[::2] * 3).sum()):
            found.append(torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True))
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_runs_and_second_backwards_are_equal_to_the_bit():
    *tensors, labels = inputs(12, 200)
    first, second = (run(linear_cross_entropy, *tensors, labels) for _ in range(2))
    leaves = [t.requires_grad_() for t in tensors]
    loss = linear_cross_entropy(*leaves, labels)
    third, fourth = ([loss, *torch.autograd.grad(loss, leaves, retain_graph=True)] for _ in range(2))
    for a, *others in zip(first, second, third, fourth, strict=True):
        assert all(torch.equal(a, b) for b in others)


def test_one_row_without_dimensions_and_inference():
    hidden, weight, bias, labels = inputs((), 9, ignored=0)
    expected = reference.linear_cross_entropy(hidden, weight, bias, labels)
    with torch.inference_mode():
        for reduction in ("none", "mean"):
            found = linear_cross_entropy(hidden, weight, bias, labels, reduction=reduction)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_autocast_with_float32_parameters_under_checkpointing(reentrant):
    dtype = torch.bfloat16
    hidden, weight, bias, labels = inputs(9, 50)
    rounded = [t.to(dtype).float() for t in (hidden, weight, bias)]
    expected = run(reference.linear_cross_entropy, *rounded, labels)

    def function(*leaves):
        with torch.autocast(DEVICE, dtype):
            return checkpoint(linear_cross_entropy, *leaves, use_reentrant=reentrant)

    leaves = [hidden.to(dtype).requires_grad_(), *(t.clone().requires_grad_() for t in (weight, bias))]
    loss = function(*leaves, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and leaves[0].grad.dtype == dtype and leaves[1].grad.dtype == torch.float32
    for a, b in zip([loss, *(leaf.grad for leaf in leaves)], expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("label", [-1, 70, 64, 2**40])
def test_a_label_that_is_none_matches_nothing_and_shows(label, monkeypatch):
    hidden, weight, bias, labels = inputs(3, 64, ignored=0)
    labels[1] = label
    monkeypatch.setenv("SCLKERN_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"labels: got {label}, expected 0 to 63 or -100"):
        linear_cross_entropy(hidden, weight, bias, labels)
    losses, hits = torch.ops.sclkern.linear_cross_entropy(hidden, weight, bias, labels, IGNORED, "none")[:2]
    assert losses.isnan().tolist() == [False, True, False] and hits <= 2
    loss = torch.ops.sclkern.linear_cross_entropy(hidden.requires_grad_(), weight, bias, labels, IGNORED, "sum")[0]
    assert torch.autograd.grad(loss, hidden)[0].isnan().any(1).tolist() == [False, True, False]


@settings(max_examples=4 if interpreted() else 20)
@given(st.integers(0, 33), st.integers(1, 300), st.integers(1, 20), st.booleans(), st.sampled_from(["mean", "sum"]))
def test_any_shape(rows, vocabulary, width, bias, reduction):
    assert_as_good_as_eager(*inputs(rows, vocabulary, width, bias=bias), reduction=reduction)


@pytest.mark.parametrize(("bias", "reduction"), [(True, "mean"), (False, "none")])
def test_registration(bias, reduction):
    *tensors, labels = inputs(6, 30, bias=bias)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.sclkern.linear_cross_entropy, (*leaves, labels, IGNORED, reduction))
    detached = [None if t is None else t.detach() for t in leaves]
    loss, _, *saved = torch.ops.sclkern.linear_cross_entropy(*detached, labels, IGNORED, reduction)
    arguments = (torch.ones_like(loss), *detached, labels, *saved, IGNORED, reduction, True, True, bias)
    torch.library.opcheck(torch.ops.sclkern.linear_cross_entropy_backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def function(hidden, *others):
        return linear_cross_entropy(2 * hidden, *others, return_hits=True)[0] + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for rows in (6, 7, 31) if dynamic else (6,):
        arguments = inputs(rows, 30)
        for a, b in zip(run(compiled, *arguments), run(function, *arguments), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_the_plain_definition_is_torchs_and_has_double_backward():
    hidden, weight, bias, labels = inputs((2, 3), 5, width=4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(*tensors, labels, backend="eager")
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(*tensors).flatten(0, 1), labels.flatten()))
    torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels, backend="eager"), tensors)
    torch.autograd.gradgradcheck(lambda *t: linear_cross_entropy(*t, labels, backend="eager"), tensors)


def test_float64_in_pieces_on_a_cpu(in_pieces):
    hidden, weight, bias, labels = inputs((2, 3), 150, width=4, dtype=torch.float64)
    tensors = [t.cpu().requires_grad_() for t in (hidden, weight, bias)]
    torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels.cpu()), tensors, fast_mode=True)


def test_second_derivatives_of_the_op_name_the_backend_that_has_them():
    *tensors, labels = inputs(4, 9)
    leaves = [t.requires_grad_() for t in tensors]
    (grad,) = torch.autograd.grad(linear_cross_entropy(*leaves, labels), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        grad.sum().backward()


@pytest.mark.skipif(interpreted() or not TRITON_INSTALLED, reason="nothing is compiled")
def test_no_length_is_in_a_compile_key():
    from sclkern.kernels import linear_cross_entropy as kernels

    for kernel in {entry["kernel"] for entry in kernels.ahead_of_time("sm_90")}:
        for parameter in kernel.params:
            if parameter.name in ("rows", "columns", "first_column"):
                assert parameter.do_not_specialize and not parameter.is_constexpr


H, W, B, L = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": H.long()}, TypeError, r"hidden: got torch\.int64, expected a floating dtype"),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden: got shape \(\), expected \(\.\.\., D\)"),
        ({"weight": W.half()}, TypeError, r"weight: got torch\.float16, expected that of hidden, torch\.float32"),
        ({"weight": W.T}, ValueError, r"weight: got shape \(3, 5\), expected \(V, D\) = \(any, 3\)"),
        ({"weight": W[:0]}, ValueError, r"weight: got shape \(0, 3\), expected \(V, D\) with V of at least 1"),
        ({"weight": W.to("meta")}, ValueError, r"weight: got device meta, expected that of hidden, cpu"),
        ({"bias": B.double()}, TypeError, r"bias: got torch\.float64, expected that of hidden"),
        ({"bias": B[:3]}, ValueError, r"bias: got shape \(3,\), expected \(V,\) = \(5,\)"),
        ({"labels": L.int()}, TypeError, r"labels: got torch\.int32, expected torch\.int64"),
        ({"labels": L[:1]}, ValueError, r"labels: got shape \(1,\), expected \(...\) = \(2,\)"),
        ({"labels": L + 5}, ValueError, r"labels: got 5, expected 0 to 4 or -100"),
        ({"ignore_index": 0.5}, TypeError, r"ignore_index: got float, expected an int"),
        ({"reduction": "max"}, ValueError, r"reduction: got 'max', expected one of mean"),
        ({"backend": "cuda"}, ValueError, r"backend: got 'cuda', expected one of auto"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"hidden": H, "weight": W, "bias": B, "labels": L} | changes)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
