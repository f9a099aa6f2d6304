"""``completion_loss``, the op: tiles on a CPU; the kernels in the interpreter (`make test` runs it) or on a GPU."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from op_testing import DEVICE, DTYPES, KERNELS_RUN, run_in_interpreter
from sclkern import reference
from sclkern.dispatch import interpreted
from sclkern.ops.completion_loss import completion_loss

NAMES = ("loss", "recovered", "complete", "temperature")


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """Tiles at any size, and several of them."""
    module = sys.modules["sclkern.ops.completion_loss"]
    monkeypatch.setattr(module, "PLAIN_ROWS", -1)
    monkeypatch.setattr(module, "TILE", 1000)


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


CASES = [(length, width, torch.float32) for length in (1, 2, 17, 33, 64, 65, 130) for width in (5, 64, 96)]
if interpreted():
    # The interpreter is slow: each length and each width, but few pairs of them.
    CASES = [case for case in CASES if case[1] == 5 or case[0] == 33]
CASES += [(length, width, dtype) for length, width in ((1, 5), (65, 96)) for dtype in DTYPES[1:]]


@pytest.mark.parametrize(("length", "width", "dtype"), CASES, ids=str)
def test_error_is_at_most_that_of_eager(length, width, dtype):
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


def test_one_row_has_no_loss_and_no_row_is_as_the_definition_says():
    assert all((x == 0).all() for x in run(completion_loss, features((1, 8))))
    empty = features((0, 8))
    assert completion_loss(*empty, temperature=0.1).isnan()
    assert completion_loss(*empty, temperature=0.1, valid=torch.zeros(0, dtype=torch.bool, device=DEVICE)) == 0


def test_dtypes_are_promoted_and_the_loss_is_float32():
    recovered, complete = features((6, 8), torch.float16)
    loss = completion_loss(recovered, complete.float(), temperature=0.1)
    torch.testing.assert_close(loss, reference.completion_loss(recovered.float(), complete.float(), temperature=0.1))
    assert completion_loss(recovered, complete, temperature=0.1, backend="eager").dtype == torch.float32


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


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.skipif(KERNELS_RUN, reason="for the CPU path")
def test_nothing_of_n_by_n_on_a_cpu(monkeypatch):
    module = sys.modules["sclkern.ops.completion_loss"]
    monkeypatch.setattr(module, "TILE", 2**20)
    # Seen only from inside the op: a dispatch mode that is active outside does not look into it.
    n, (recovered, complete) = 6000, (x.detach() for x in features((6000, 4)))
    temperature = torch.tensor(0.1)
    with Largest() as largest:
        losses, *saved = module._tiled_forward(recovered[None], complete[None], temperature, None, True, True, 1e-8)
        positive, lse, _, rnorm = saved
        sides = module._tiled_backward(
            torch.ones_like(losses), recovered[None], complete[None], temperature, None, positive, lse, rnorm, 1e-8,
            (True, True),
        )  # fmt: skip
    assert all(side.isfinite().all() for side in (losses, *sides))
    assert n < largest.elements <= 2**20 < n * n


def test_eager_by_name_has_double_backward():
    inputs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    function = lambda *a: completion_loss(*a, temperature=0.7, backend="eager")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("groups", [(), (2,)], ids=str)
def test_rows_of_other_ranks_join_along_n(groups, monkeypatch):
    # Two ranks, of which the other holds the same rows in reverse; gather itself is tested in test_distributed.py.
    module = sys.modules["sclkern.ops.completion_loss"]
    monkeypatch.setattr(module, "gather_rows", lambda x, group, mode: torch.cat([x, x.flip(0)]))
    inputs, valid = features((*groups, 5, 6)), torch.rand(*groups, 5, device=DEVICE) > 0.3
    expected = reference.completion_loss(
        *(torch.cat([x, x.flip(-2)], -2) for x in inputs), temperature=0.1, valid=torch.cat([valid, valid.flip(-1)], -1)
    )
    torch.testing.assert_close(completion_loss(*inputs, temperature=0.1, valid=valid), expected)
    alone = completion_loss(*inputs, temperature=0.1, valid=valid, gather=None)
    torch.testing.assert_close(alone, reference.completion_loss(*inputs, temperature=0.1, valid=valid))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("with_valid", [True, False])
def test_registration(with_valid, both):
    recovered, complete = features((2, 6, 10))
    temperature = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    valid = torch.tensor([[True] * 5 + [False]] * 2, device=DEVICE) if with_valid else None
    arguments = (recovered, complete, temperature, valid, both, True, 1e-8)
    # Only the losses have a gradient; the statistics beside them are for the backward alone.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sclkern.completion_loss, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.sclkern.completion_loss, arguments, test_utils="test_autograd_registration")
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    losses, *saved = torch.ops.sclkern.completion_loss(*detached)
    torch.library.opcheck(
        torch.ops.sclkern.completion_loss_backward,
        (torch.ones_like(losses), *detached[:4], *saved, 1e-8, True, both),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    inputs = features((6, 20))

    def function(recovered, complete, temperature):
        shape = (1, *recovered.shape)
        losses = torch.ops.sclkern.completion_loss(
            2 * recovered.view(shape), complete.view(shape), temperature, None, True, True, 1e-8
        )[0]
        return losses.mean() + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(run(compiled, inputs), run(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recovered": X.long()}, TypeError, r"recovered: got torch\.int64, expected a floating"),
        ({"recovered": X[0]}, ValueError, r"recovered: got shape \(3,\), expected \(N, D\) or \(G, N, D\)"),
        ({"complete": X[:3]}, ValueError, r"complete: got shape \(3, 3\), expected that of recovered, \(4, 3\)"),
        ({"complete": X.to("meta")}, ValueError, r"complete: got device meta, expected that of recovered"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0\.0, expected a positive number"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature: got shape \(1,\), expected a 0-d tensor"),
        ({"temperature": torch.tensor(1)}, TypeError, r"temperature: got torch\.int64"),
        ({"valid": torch.ones(4)}, TypeError, r"valid: got torch\.float32, expected torch\.bool"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, r"valid: got shape \(3,\), expected \(4,\)"),
        ({"eps": 0.0}, ValueError, r"eps: got 0\.0, expected a positive number"),
        ({"directions": "reference"}, ValueError, r"directions: got 'reference', expected one of both"),
        ({"reduction": "max"}, ValueError, r"reduction: got 'max', expected one of mean"),
        ({"gather": "all"}, ValueError, r"gather: got 'all', expected one of exact"),
        ({"backend": "cuda"}, ValueError, r"backend: got 'cuda', expected one of auto"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        completion_loss(**{"recovered": X, "complete": X, "temperature": 0.1} | changes)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
