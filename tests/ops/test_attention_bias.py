"""``attention`` with a bias of the scores: the definition, the CPU path, and the kernels in the interpreter or on a
GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from op_testing import BACKENDS, DEVICE, DTYPES, Calls, needs_kernels, run_in_interpreter, thorough_except
from sclkern import ops, reference
from sclkern.kernels.config import override
from sclkern.ops import attention
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted

NAMES = ("out", "query", "key", "value", "bias")
# Samples and heads of the bias of two samples and two heads.
FORMS = [(1, 1), (1, 2), (2, 1), (2, 2)]
LOWEST = torch.finfo(torch.float32).min
# (Lq, Lk, D): a tile of all keys, a tile of all queries, both kernels of the backward, and Swin's windows.
SIZES = [(17, 13, 32), (13, 40, 32), (50, 70, 64), (49, 49, 32)]
CASES = [(size, FORMS[(i + j) % 4], dtype) for i, size in enumerate(SIZES) for j, dtype in enumerate(DTYPES)]
EDGES = [CASES[len(DTYPES) * i + i % len(DTYPES)] for i in range(3)]
not_interpreted = pytest.mark.skipif(interpreted(), reason="the interpreter is not traced")


def inputs(queries=5, keys=7, head=32, form=(1, 2), dtype=torch.float32, batch=2, heads=2):
    """query, key, value, bias; a gradient."""
    tensors = [torch.randn(batch, length, heads, head) for length in (queries, keys, keys, queries)]
    query, key, value, grad = (tensor.to(DEVICE, dtype) for tensor in tensors)
    return [query, key, value, 2 * torch.randn(*form, queries, keys).to(DEVICE, dtype)], grad


def some_keys(keys, batch=2):
    mask = torch.rand(batch, keys) < 0.7
    mask[:, 0] = True
    return mask.to(DEVICE)


def run(tensors, grad, dtype=None, **options):
    """By name the output and the gradients of query, key, value and bias."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    out = attention(*leaves[:3], bias=leaves[3], **options)
    return dict(zip(NAMES, [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))], strict=True))


def double(form=(1, 2), batch=2, queries=3, keys=4):
    tensors, _ = inputs(queries, keys, 32, form, torch.float64, batch)
    return [tensor[..., :2].cpu().requires_grad_() for tensor in tensors[:3]], tensors[3].cpu().requires_grad_()


class TestDefinition:
    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_equals_torch(self, form):
        tensors, bias = double(form)
        mask = torch.tensor([[True, False, True, True], [True] * 4])
        out = reference.attention(*tensors, bias=bias, key_padding_mask=mask, softmax_scale=0.3)
        added = bias.expand(2, 2, 3, 4).masked_fill(~mask[:, None, None], -math.inf)
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), attn_mask=added, scale=0.3)
        weight = torch.randn_like(out)
        torch.testing.assert_close(out, expected.transpose(1, 2))
        leaves = [*tensors, bias]
        found, theirs = (
            torch.autograd.grad(o, leaves, w) for o, w in ((out, weight), (expected, weight.transpose(1, 2)))
        )
        for ours, other in zip(found, theirs, strict=True):
            torch.testing.assert_close(ours, other)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_gradients_of_both_orders(self, form):
        tensors, bias = double(form, queries=2, keys=3)
        mask = torch.tensor([[True, False, True], [True, True, True]])

        def function(query, key, value, bias):
            return reference.attention(query, key, value, bias=bias, key_padding_mask=mask)

        assert torch.autograd.gradcheck(function, (*tensors, bias))
        assert torch.autograd.gradgradcheck(function, (*tensors, bias))

    def test_half_precision_adds_in_float32(self):
        tensors, bias = double()
        half = [tensor.detach().half() for tensor in tensors]
        bias = bias.detach() + 6e4
        found = reference.attention(*half, bias=bias.float())
        assert found.dtype == torch.float16
        torch.testing.assert_close(
            found.double(), reference.attention(*(x.double() for x in half), bias=bias), atol=5e-3, rtol=5e-3
        )


@not_interpreted
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_on_a_cpu(form, masked):
    tensors, bias = double(form)
    mask = torch.tensor([[True, False, True, True], [True] * 4]) if masked else None
    assert ops.explain("attention", *tensors, bias=bias, key_padding_mask=mask).path == "sdpa"

    def function(query, key, value, bias):
        return attention(query, key, value, bias=bias, key_padding_mask=mask)

    assert torch.autograd.gradcheck(function, (*tensors, bias))


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
def test_a_cpu_takes_a_bias_in_float32_beside_halves(dtype, learned):
    tensors, _ = inputs(17, 29, dtype=dtype)
    tensors = [tensor.cpu() for tensor in tensors]
    bias = tensors[3].float().requires_grad_(learned)
    ours, theirs = (attention(*tensors[:3], bias=bias, backend=backend) for backend in ("auto", "eager"))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, **({} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}))


@needs_kernels
@pytest.mark.parametrize("case", thorough_except(EDGES, CASES), ids=str)
def test_error_is_at_most_that_of_eager(case):
    (queries, keys, head), form, dtype = case
    tensors, grad = inputs(queries, keys, head, form, dtype)
    # A learned bias in float32 beside halves, as under autocast, in two of the forms.
    if form[0] == 2:
        tensors[3] = tensors[3].float()
    ids = torch.tensor([2**40, 5], device=DEVICE)
    options = {"key_padding_mask": some_keys(keys), "dropout_p": 0.2, "seed": 2**40 + 5, "dropout_ids": ids}
    ours, eager = (run(tensors, grad, backend=backend, **options) for backend in ("triton", "eager"))
    truth = run(tensors, grad, torch.float64, backend="eager", **options)
    score = 12
    for name in NAMES:
        a, b, t = ours[name], eager[name], truth[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        rounding = (torch.finfo(a.dtype).eps + score * torch.finfo(torch.float32).eps) * t.abs().max().item()
        # The gradient of a score is a difference, of products that a kernel computes from the rounded output.
        rounding += torch.finfo(dtype).eps * t.abs().max().item() * (name != "out")
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lowest", [-math.inf, LOWEST])
def test_what_a_bias_excludes(backend, lowest):
    tensors, grad = inputs(17, 29)
    bias = tensors[3]
    bias[..., 1:, 5:11] = lowest
    bias[:, 1, 3] = lowest
    results = run(tensors, grad, backend=backend)
    assert all(result.isfinite().all() for result in results.values())
    # A query that all keys are excluded from.
    assert (results["out"][:, 3, 1] == 0).all() and (results["query"][:, 3, 1] == 0).all()
    assert (results["bias"][..., 1:, 5:11] == 0).all() and (results["bias"][:, 1, 3] == 0).all()
    _, lse = attention(*tensors[:3], bias=bias, return_lse=True, backend=backend)
    assert (lse[:, 1, 3] == -math.inf).all() and lse[:, 0].isfinite().all()
    scores = torch.einsum("bqhd,bkhd->bhqk", *(t.double() for t in tensors[:2])) / math.sqrt(32) + bias.double()
    expected = scores.masked_fill(bias == lowest, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_bias_of_padding_is_not_read(backend):
    tensors, grad = inputs(17, 29, form=(2, 2))
    mask = some_keys(29)
    clean = run(tensors, grad, backend=backend, key_padding_mask=mask)
    tensors[3] = tensors[3].masked_fill(~mask[:, None, None], math.nan)
    for name, found in run(tensors, grad, backend=backend, key_padding_mask=mask).items():
        assert torch.equal(found, clean[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_without_keys(backend):
    tensors, grad = inputs(17, 29, form=(2, 1))
    mask = some_keys(29)
    mask[1] = False
    for name, found in run(tensors, grad, backend=backend, key_padding_mask=mask).items():
        assert (found[1] == 0).all() and found.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_zero(backend):
    for queries, keys, batch in ((3, 0, 2), (0, 3, 2), (3, 3, 0)):
        tensors, grad = inputs(queries, keys, batch=batch)
        for name, found in run(tensors, grad, backend=backend).items():
            assert (found == 0).all(), name


def of_any_strides():
    """Biases (1 or 2, 2, 17, 29) of other strides than contiguous ones."""
    last = torch.randn(17, 29, 2, device=DEVICE).permute(2, 0, 1)[None]  # an embedding of positions, as T5's
    expanded = torch.randn(1, 1, 17, 29, device=DEVICE).expand(2, 2, -1, -1)
    part = torch.randn(1, 2, 20, 64, device=DEVICE)[:, :, 2:19, 1::2][..., :29]
    return [last, expanded, part, torch.randn(2, 2, 29, 17, device=DEVICE).transpose(2, 3)]


@needs_kernels
@pytest.mark.parametrize("which", range(4))
def test_any_strides(which):
    bias = of_any_strides()[which]
    tensors, grad = inputs(17, 29)
    ours = run([*tensors[:3], bias], grad, backend="triton")
    theirs = run([*tensors[:3], bias.contiguous()], grad, backend="triton")
    for name in NAMES:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("needs_bias", [False, True])
def test_a_bias_is_read_where_it_lies_and_has_a_gradient_where_it_is_wanted(needs_bias):
    from sclkern.kernels.launch import recorded
    from sclkern.ops._registration import LAUNCHERS

    tensors, grad = inputs(17, 29)
    for bias in of_any_strides():
        arguments = *tensors[:3], bias, None, None, None
        with recorded() as launches:
            out, lse = LAUNCHERS["attention_with_bias"](*arguments, 0.0, 0.2, 0)
            backward = LAUNCHERS["attention_with_bias_backward"]
            *_, grad_bias = backward(grad, *arguments, out, lse, 0.0, 0.2, 0, needs_bias)
        assert all(launch.arguments["bias_ptr"].data_ptr() == bias.data_ptr() for launch in launches)
        kernels = [launch.config.kernel for launch in launches]
        assert ("attention_backward_bias_kernel" in kernels) == needs_bias and len(kernels) > 1
        assert grad_bias.shape == (bias.shape if needs_bias else (0,))


@needs_kernels
def test_any_of_the_inputs_may_require_gradients():
    tensors, grad = inputs()
    full = run(tensors, grad, backend="triton")
    for wanted in (0, 0, 0, 0), (0, 0, 0, 1), (1, 1, 1, 0), (1, 0, 0, 1), (0, 1, 1, 1):
        leaves = [t.detach().requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
        out = attention(*leaves[:3], bias=leaves[3], backend="triton")
        assert out.requires_grad == any(wanted)
        names = [name for name, w in zip(NAMES[1:], wanted, strict=True) if w]
        if names:
            found = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad)
            assert all(torch.equal(a, full[name]) for name, a in zip(names, found, strict=True))


@needs_kernels
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_runs_are_equal_to_the_bit_and_sums_do_not_depend_on_programs(form):
    tensors, grad = inputs(17, 29, form=form, batch=2)
    options = {"dropout_p": 0.1, "seed": 2, "backend": "triton"}
    first, second = (run(tensors, grad, **options)["bias"] for _ in range(2))
    assert torch.equal(first, second)
    # One program a tile, and two where there are terms to share.
    for programs in (1, 4):
        with override(("attention_backward_bias_kernel",), PROGRAMS=programs, BLOCK_QUERIES=16, BLOCK_KEYS=32):
            torch.testing.assert_close(run(tensors, grad, **options)["bias"], first, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_dropout_drawn_once_is_the_same():
    tensors, grad = inputs(17, 29)
    options = {"dropout_p": 0.3, "seed": 2**40 + 3, "backend": "triton", "key_padding_mask": some_keys(29)}
    expected = run(tensors, grad, **options)
    with override(("attention_forward_kernel",), KEEP_BITS=1):
        found = run(tensors, grad, **options)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@needs_kernels
def test_parts_of_one_projection():
    tensors, grad = inputs(17, 17, form=(1, 2))
    packed = torch.stack(tensors[:3], 2).requires_grad_()
    bias = tensors[3].requires_grad_()
    out = attention(*packed.unbind(2), bias=bias, backend="triton")
    found = torch.autograd.grad(out, (packed, bias), grad)
    expected = run(tensors, grad, backend="triton")
    assert torch.equal(found[0], torch.stack([expected[name] for name in NAMES[1:4]], 2))
    assert torch.equal(found[1], expected["bias"])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_autocast_leaves_a_float32_bias(backend):
    half = torch.float16 if interpreted() else torch.bfloat16
    tensors, grad = inputs(17, 29)
    exact = run(tensors, grad, backend=backend)
    with torch.autocast(DEVICE, half):
        found = run(tensors, grad, backend=backend)
    assert found["out"].dtype == half and found["bias"].dtype == torch.float32
    for name in NAMES:
        torch.testing.assert_close(found[name], exact[name], rtol=0.05, atol=0.05, check_dtype=False)


@not_interpreted
def test_fifty_lengths_compile_once():
    counter = CompileCounterWithBackend("aot_eager")

    def function(query, key, value, bias):
        return attention(query, key, value, bias=bias).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for length in range(35, 85):
        leaves = [t.requires_grad_() for t in inputs(length, length + 100)[0]]
        compiled(*leaves).backward()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0] > 0
    found = [leaf.grad for leaf in leaves]
    for a, b in zip(found, torch.autograd.grad(function(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
@not_interpreted
@pytest.mark.parametrize("needs_bias", [False, True])
def test_registration(needs_bias):
    tensors, grad = inputs()
    leaves = [t.requires_grad_() for t in tensors[:3]], tensors[3].requires_grad_(needs_bias)
    with Calls() as calls:
        attention(*leaves[0], bias=leaves[1], backend="triton").backward(grad)
    assert {function._opname for function, _, _ in calls.found} == {
        "attention_with_bias", "attention_with_bias_backward",
    }  # fmt: skip
    for function, args, kwargs in calls.found:
        torch.library.opcheck(function, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args), kwargs)


@needs_kernels
def test_without_second_derivatives_the_kernel_names_the_eager_path():
    tensors, grad = inputs()
    leaves = [t.requires_grad_() for t in tensors]
    out = attention(*leaves[:3], bias=leaves[3], backend="triton")
    (found,) = torch.autograd.grad(out, leaves[3], grad, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r'^attention_with_bias: the kernel has no second derivative; backend="eager'
    ):
        found.square().sum().backward()


@needs_kernels
def test_offsets_beyond_32_bits():
    tensors, grad = inputs(3, 5, dtype=torch.float16, form=(2, 1), heads=1)
    memory = torch.Tensor.new_empty(grad, 2**31 + 8192)
    far = memory.as_strided(tensors[3].shape, (2**31 + 64, 64, 8, 1))
    far.copy_(tensors[3])
    assert torch.equal(
        attention(*tensors[:3], bias=far, backend="triton"), attention(*tensors[:3], bias=tensors[3], backend="triton")
    )


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(2, 2, 5, 7).long(), TypeError, r"got torch\.int64, expected a floating dtype"),
        (torch.zeros(2, 2, 5, 7).double(), TypeError, r"got torch\.float64, expected that of query, torch\.float32"),
        (torch.zeros(2, 2, 5, 7).half(), TypeError, r"got torch\.float16, expected that of query, torch\.float32"),
        ([[0.0]], TypeError, "got list, expected a tensor"),
        (torch.zeros(5, 7), ValueError, r"got shape \(5, 7\), expected \(B or 1, H or 1, Lq, Lk\) = \(2, 3, 5, 7\)"),
        (torch.zeros(3, 1, 5, 7), ValueError, r"got shape \(3, 1, 5, 7\), expected .* = \(2, 1, 5, 7\)"),
        (torch.zeros(1, 2, 5, 7), ValueError, r"got shape \(1, 2, 5, 7\), expected .* = \(1, 3, 5, 7\)"),
        (torch.zeros(1, 1, 1, 7), ValueError, r"got shape \(1, 1, 1, 7\), expected .* = \(1, 1, 5, 7\)"),
        (torch.zeros(1, 1, 5, 7, device="meta"), ValueError, "got device meta, expected that of query"),
    ],
)
def test_a_wrong_bias_is_named(bias, error, message):
    query, key = torch.randn(2, 5, 3, 32), torch.randn(2, 7, 3, 32)
    for function in (attention, lambda *args, **options: ops.explain("attention", *args, **options)):
        with pytest.raises(error, match=f"^bias: {message}"):
            function(query, key, key, bias=bias)


def test_flash_attn_adds_no_bias():
    from sclkern.libraries import flash

    assert any(problem.startswith("bias, which") for problem in flash.problems(query_device(), bias=torch.zeros(1)))
    query = torch.randn(2, 5, 3, 32)
    with pytest.raises(ValueError, match=r"backend='flash': cannot run: .*bias, which flash-attn does not add"):
        attention(query, query, query, bias=torch.zeros(1, 1, 5, 5), backend="flash")


def query_device():
    return torch.device(DEVICE)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
