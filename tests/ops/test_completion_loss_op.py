"""``completion_loss``, the op: tiles on a CPU; the kernels in the interpreter (`make test` runs it) or on a GPU."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from op_testing import DEVICE, DTYPES, KERNELS_RUN, needs_kernels, run_in_interpreter, thorough_except
from sclkern import reference
from sclkern.kernels import completion_loss_cpu
from sclkern.ops.completion_loss import completion_loss
from sclkern.ops.dispatch import interpreted

NAMES = ("loss", "recovered", "complete", "temperature")


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """Tiles at any size, and several of them."""
    monkeypatch.setattr(sys.modules["sclkern.ops.completion_loss"], "MAX_EAGER_ROWS", -1)
    monkeypatch.setattr(completion_loss_cpu, "TILE", 1000)


def features(shape, dtype=torch.float32):
    return [(3 * torch.randn(shape)).to(DEVICE, dtype).requires_grad_() for _ in range(2)]


def confident(dtype, rows, width, cosine):
    complete = F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=-1)
    noise = torch.randn(rows, width, dtype=torch.float64)
    noise = F.normalize(noise - (noise * complete).sum(-1, keepdim=True) * complete, dim=-1)
    recovered = cosine * complete + math.sqrt(1 - cosine**2) * noise
    return [x.to(DEVICE, dtype).requires_grad_() for x in (recovered, complete)]


def run(function, inputs, temperature=0.1, dtype=None, upstream=None, **options):
    """Loss and gradients of both features and the temperature."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    precise = torch.promote_types(leaves[0].dtype, torch.float32)
    leaves.append(torch.tensor(temperature, dtype=precise, device=DEVICE, requires_grad=True))
    loss = function(*leaves[:2], temperature=leaves[2], **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def assert_as_good_as_eager(inputs, temperature=0.1, **options):
    truth = run(reference.completion_loss, inputs, temperature, torch.float64, **options)
    eager = run(reference.completion_loss, inputs, temperature, **options)
    ours = run(completion_loss, inputs, temperature, **options)
    assert [x.dtype for x in ours[1:3]] == [x.dtype for x in inputs]
    for name, a, b, t in zip(NAMES, ours, eager, truth, strict=True):
        assert a.shape == b.shape
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        # Half a unit in the last place of the largest value, and the rounding of the similarities, whose largest is
        # 1 / temperature: the loss moves by as much, and the gradients by that part of themselves.
        eps, largest = torch.finfo(a.dtype).eps, t.abs().max().item()
        rounding = eps / 2 * largest + torch.finfo(torch.float32).eps / temperature * max(1.0, largest)
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)
        if a.dtype == torch.float32 and name != "temperature":
            assert error <= (2e-5 if name == "loss" else 6e-5) * largest, (name, error, largest)


# The interpreter is slow: each width, and the lengths on one side of the edges of tiles.
LENGTHS = (1, 2, 16, 31, 65, 127) if interpreted() else (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
CASES = [(length, 5, torch.float32) for length in LENGTHS] + [(33, width, torch.float32) for width in (64, 96)]
CASES += [(length, width, dtype) for length, width in ((1, 5), (65, 96)) for dtype in DTYPES[1:]]


# One edge in each dtype.
@pytest.mark.parametrize("case", thorough_except([case for case in CASES if case[:1] == (65,)], CASES), ids=str)
def test_error_is_at_most_that_of_eager(case):
    length, width, dtype = case
    assert_as_good_as_eager(features((length, width), dtype), upstream=torch.tensor(0.7, device=DEVICE))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("directions", ["both", "recovered_to_complete"])
@pytest.mark.parametrize("groups", [(3,)] if interpreted() else [(), (3,)], ids=str)
def test_reductions_directions_groups_and_valid_rows(groups, directions, reduction):
    inputs = features((*groups, 21, 12), DTYPES[1] if reduction == "sum" else DTYPES[0])
    options = {"directions": directions, "reduction": reduction}
    if reduction == "none":
        options["upstream"] = torch.randn(*groups, 21, device=DEVICE)
    assert_as_good_as_eager(inputs, **options)
    valid = torch.rand(*groups, 21, device=DEVICE) > 0.4
    if groups:
        valid[1] = False
        valid[2] = torch.arange(21, device=DEVICE) == 4
    assert_as_good_as_eager(inputs, valid=valid, **options)


@pytest.mark.parametrize("directions", ["both", "recovered_to_complete"])
@pytest.mark.parametrize("groups", [(3,)] if interpreted() else [(), (3,)], ids=str)
def test_pairs_of_one_id_are_no_negatives(groups, directions):
    # The last row is the only negative of the others, in the second.
    several = torch.randint(-5, 5, (21,), device=DEVICE)
    for same in (several, torch.arange(21, device=DEVICE) // 20 + 2**40):
        options = {"same": same, "directions": directions, "reduction": "none"}
        options["upstream"] = torch.randn(*groups, 21, device=DEVICE)
        assert_as_good_as_eager(features((*groups, 21, 12)), **options)
        valid = torch.rand(*groups, 21, device=DEVICE) > 0.3
        assert_as_good_as_eager(features((*groups, 21, 12)), valid=valid, **options)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_a_row_whose_others_are_of_its_id_loses_nothing(temperature):
    inputs = confident(torch.float32, 40, 16, 0.9)
    ours = run(completion_loss, inputs, temperature, same=torch.full((40,), -7, device=DEVICE))
    assert all((x == 0).all() for x in ours)
    # Ids that differ in their upper halves alone.
    same = torch.arange(40, device=DEVICE) << 32
    different, without = (run(completion_loss, inputs, temperature, same=ids) for ids in (same, None))
    assert all(torch.equal(a, b) for a, b in zip(different, without, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_ids_and_half_precision(dtype):
    inputs = features((65, 24), dtype)
    assert_as_good_as_eager(inputs, same=torch.arange(65, device=DEVICE) // 2)


@pytest.mark.parametrize("directions", ["both", "recovered_to_complete"])
@pytest.mark.parametrize("cosine", [0.99, 0.9999])
def test_confident_positives_are_right(cosine, directions):
    inputs = confident(torch.float32, 40, 48, cosine)
    truth = run(reference.completion_loss, inputs, 0.03, torch.float64, directions=directions)
    ours = run(completion_loss, inputs, 0.03, directions=directions)
    for name, a, t in zip(NAMES, ours, truth, strict=True):
        assert (a - t).norm() <= 1e-3 * t.norm(), name


def test_confident_positives_do_not_vanish_in_float16():
    inputs = confident(torch.float16, 40, 64, 0.99)
    upstream = torch.tensor(2.0**16, device=DEVICE)  # as a loss scale: float16 could not hold the gradients otherwise
    truth = run(reference.completion_loss, inputs, 0.03, torch.float64, upstream=upstream)
    for name, a, t in zip(NAMES, run(completion_loss, inputs, 0.03, upstream=upstream), truth, strict=True):
        assert (a - t).norm() <= 4e-3 * t.norm(), name


@pytest.mark.parametrize("garbage", [0.0, 1e3, math.nan, math.inf])
def test_rows_that_are_not_valid_do_not_leak(garbage):
    valid = torch.arange(35, device=DEVICE) % 3 != 1
    clean = features((35, 20))
    inputs = [x.detach().masked_fill(~valid[:, None], garbage) for x in clean]
    expected = run(reference.completion_loss, [x[valid] for x in clean])
    ours = run(completion_loss, inputs, valid=valid)
    for a, b in zip(ours, expected, strict=True):
        if a.ndim:
            assert (a[~valid] == 0).all()
            a = a[valid]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_zero_and_tiny_rows_have_the_gradient_of_the_definition():
    inputs = [x.detach() for x in features((9, 6))]
    inputs[0][0] = inputs[1][3] = inputs[1][0] = 0
    inputs[0][5] = 1e-10
    truth = run(reference.completion_loss, inputs, dtype=torch.float64)
    for a, t in zip(run(completion_loss, inputs), truth, strict=True):
        assert a.isfinite().all()
        for ours, theirs in zip(a.reshape(-1, a.shape[-1]) if a.ndim else [a], t if a.ndim else [t], strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_sides_without_gradient_leave_the_others_as_they_are(wanted, learnable):
    inputs = features((18, 7))
    full = run(completion_loss, inputs)[1:]
    wanted = (*wanted, learnable)
    leaves = [*(x.detach() for x in inputs), torch.tensor(0.1, device=DEVICE)]
    leaves = [x.requires_grad_(flag) for x, flag in zip(leaves, wanted, strict=True)]
    loss = completion_loss(*leaves[:2], temperature=leaves[2] if learnable else 0.1)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for leaf, flag, expected in zip(leaves, wanted, full, strict=True):
        assert torch.equal(leaf.grad, expected) if flag else leaf.grad is None


def test_any_strides_and_expanded_gradients():
    recovered = torch.randn(12, 22, device=DEVICE).T[2:].requires_grad_()
    complete = torch.randn(12, device=DEVICE).expand(20, 12).requires_grad_()
    for function, grads in ((completion_loss, ours := []), (reference.completion_loss, theirs := [])):
        loss = function(recovered, complete, temperature=0.5, reduction="none")
        grads.extend(torch.autograd.grad(loss.sum(), (recovered, complete)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_runs_are_equal_to_the_bit():
    inputs = features((34, 17))
    first, second = (run(completion_loss, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_graph_is_good_for_two_backwards():
    inputs = features((9, 6))
    loss = completion_loss(*inputs, temperature=0.1)
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inference_mode():
    inputs = features((9, 6))
    plain = completion_loss(*inputs, temperature=0.1)
    with torch.inference_mode():
        assert torch.equal(completion_loss(*inputs, temperature=0.1), plain)


def test_a_second_derivative_names_the_backend_that_has_it():
    inputs = features((5, 4))
    first = torch.autograd.grad(completion_loss(*inputs, temperature=0.1), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r'completion_loss: .*backend="eager"'):
        torch.autograd.grad(first[0].sum(), inputs)


@given(data=st.data())
@settings(max_examples=5 if interpreted() else 25)
def test_any_shape_mask_and_dtype(data):
    groups, rows, width = (data.draw(st.integers(1, top)) for top in (2, 40, 20))
    dtype, both = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    inputs, valid = features((groups, rows, width), dtype), torch.rand(groups, rows, device=DEVICE) < 0.7
    options = {"valid": valid, "directions": "both" if both else "recovered_to_complete"}
    truth = run(reference.completion_loss, inputs, dtype=torch.float64, **options)
    for name, a, t in zip(NAMES, run(completion_loss, inputs, **options), truth, strict=True):
        precision = 6e-5 if dtype == torch.float32 or name == "loss" else 4 * torch.finfo(dtype).eps
        assert (a - t).abs().max() <= precision * t.abs().max() + 1e-5, name


@pytest.fixture
def small_workspaces():
    """In the kernels, sums of columns and weights of a few rows at a time."""
    if not KERNELS_RUN:
        yield
        return
    from sclkern.kernels.config import override

    statistics, weights = ["completion_loss_statistics_kernel"], ["completion_loss_weights_kernel"]
    with override(statistics, COLUMN_SUMS=300), override(weights, WORKSPACE=9000):
        yield


@pytest.mark.parametrize("with_same", [False, True])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.usefixtures("small_workspaces")
def test_a_window_has_its_part_of_the_whole(both, with_same):
    """What one rank computes."""
    groups, length, width = 2, 150, 5
    inputs, temperature = features((groups, length, width)), torch.tensor(0.1, device=DEVICE, requires_grad=True)
    valid, upstream = torch.rand(groups, length, device=DEVICE) < 0.8, torch.randn(groups, length, device=DEVICE)
    recovered, complete, tau = (x.detach() for x in (*inputs, temperature))
    leaves = [x.detach().double().requires_grad_() for x in (*inputs, temperature)]
    directions = "both" if both else "recovered_to_complete"
    same = torch.randint(40, (length,), device=DEVICE) if with_same else None
    options = {"valid": valid, "same": same, "directions": directions, "reduction": "none"}
    truth = reference.completion_loss(*leaves[:2], temperature=leaves[2], **options)
    gradients = torch.autograd.grad(truth, leaves, upstream.double())
    whole = both, True, True, 1e-8, 0, length, length, 0
    _, *saved = torch.ops.sclkern.completion_loss(recovered, complete, tau, valid, same, *whole)
    for offset, rows in ((0, length), (30, 70)):
        window, common = slice(offset, offset + rows), (recovered, complete, tau, valid, same)
        numbers = True, 1e-8, offset, rows, length, 0
        own = torch.ops.sclkern.completion_loss(*common, both, True, *numbers)
        torch.testing.assert_close(
            own[0].masked_fill(~valid[:, window], 0).double(), truth[:, window], rtol=1e-5, atol=1e-5
        )
        assert [x.shape[-1] for x in own] == [rows, length, rows, rows, length, length]
        found = torch.ops.sclkern.completion_loss_backward(upstream, *common, *saved, *numbers, True, True)
        for a, t in zip(found[:2], gradients[:2], strict=True):
            assert (a - t[:, window]).abs().max() <= 6e-5 * t.abs().max()
        torch.testing.assert_close(found[2].double(), gradients[2], rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="needs to count what the interpreter is given")
def test_a_detached_side_skips_its_work(monkeypatch):
    from sclkern.kernels import completion_loss_backward as kernels

    calls, original = [], kernels.completion_loss_gradient
    monkeypatch.setattr(kernels, "completion_loss_gradient", lambda *a: calls.append(a[0]) or original(*a))
    recovered, complete = features((6, 5))
    completion_loss(recovered, complete.detach(), temperature=0.1).backward()
    assert len(calls) == 1 and torch.equal(calls[0][0], recovered)


def test_one_row_has_no_loss():
    assert all((x == 0).all() for x in run(completion_loss, features((1, 8))))


def test_dtypes_are_promoted_and_the_loss_is_float32():
    recovered, complete = features((6, 8), torch.float16)
    loss = completion_loss(recovered, complete.float(), temperature=0.1)
    torch.testing.assert_close(loss, reference.completion_loss(recovered.float(), complete.float(), temperature=0.1))
    assert completion_loss(recovered, complete, temperature=0.1, backend="eager").dtype == torch.float32


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("with_valid", "with_same"), [(True, False), (False, False), (False, True)])
def test_registration(with_valid, with_same, both):
    recovered, complete = features((2, 6, 10))
    temperature = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    valid = torch.tensor([[True] * 5 + [False]] * 2, device=DEVICE) if with_valid else None
    same = torch.tensor([3, 1, 3, 4, 1, 5], device=DEVICE) if with_same else None
    arguments = (recovered, complete, temperature, valid, same, both, True, True, 1e-8, 0, 6, 6, 0)
    # Only the losses have a gradient; the statistics beside them are for the backward alone.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sclkern.completion_loss, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.sclkern.completion_loss, arguments, test_utils="test_autograd_registration")
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    losses, *saved = torch.ops.sclkern.completion_loss(*detached)
    torch.library.opcheck(
        torch.ops.sclkern.completion_loss_backward,
        (torch.ones_like(losses), *detached[:5], *saved, True, 1e-8, 0, 6, 6, 0, True, both),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    inputs = features((6, 20))

    def function(recovered, complete, temperature):
        shape = (1, *recovered.shape)
        losses = torch.ops.sclkern.completion_loss(
            2 * recovered.view(shape),
            complete.view(shape),
            temperature,
            None,
            None,
            True,
            True,
            True,
            1e-8,
            0,
            len(recovered),
            len(recovered),
            0,
        )[0]
        return losses.mean() + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(run(compiled, inputs), run(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="for the CPU path")
def test_autocast_does_not_round_the_similarities():
    inputs = features((6, 8))
    plain = run(completion_loss, inputs, 0.03)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(completion_loss, inputs, 0.03)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.skipif(KERNELS_RUN, reason="for the CPU path")
def test_float64_tiles_equal_the_definition():
    inputs = features((3, 50, 9), torch.float64)
    valid = torch.rand(3, 50) > 0.3
    truth = run(reference.completion_loss, inputs, valid=valid)
    for a, b in zip(run(completion_loss, inputs, valid=valid), truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 4, 9)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows(shape, masked, reduction):
    valid = torch.ones(shape[:-1], dtype=torch.bool, device=DEVICE) if masked else None
    for result in run(completion_loss, features(shape), valid=valid, reduction=reduction):
        assert result.numel() == 0 or (result.isfinite().all() and not result.any())


def test_in_the_interpreter():
    run_in_interpreter(__file__)
