"""``sigmoid_loss``: the definition against its formula, then tiles on a CPU and the kernels against the definition."""

import sys

import pytest
import torch
import torch.nn.functional as F

from op_testing import DEVICE, DTYPES, KERNELS_RUN, run_in_interpreter, thorough_except
from sclkern import ops, reference
from sclkern.kernels import sigmoid_loss_cpu
from sclkern.ops.dispatch import interpreted

NAMES = ("loss", "image", "text", "scale", "bias")


@pytest.fixture
def tiled(monkeypatch):
    """Tiles at any size, and several of them; in the kernels, slopes of a few rows at a time."""
    monkeypatch.setattr(sys.modules["sclkern.ops.sigmoid_loss"], "MAX_EAGER_ROWS", -1)
    monkeypatch.setattr(sigmoid_loss_cpu, "TILE", 1000)
    if not KERNELS_RUN:
        yield
        return
    from sclkern.kernels.config import override

    with override(["sigmoid_loss_slopes_kernel"], WORKSPACE=9000):
        yield


def features(rows, width, dtype=torch.float32):
    text = F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=-1)
    image = F.normalize(text + 0.1 * torch.randn(rows, width, dtype=torch.float64), dim=-1)
    return [x.to(DEVICE, dtype) for x in (image, text)]


def run(function, inputs, scale=10.0, bias=-10.0, dtype=None, upstream=1.0, **options):
    """Loss and gradients of features, scale and bias."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    precise = torch.promote_types(leaves[0].dtype, torch.float32)
    leaves += [torch.tensor(x, dtype=precise, device=DEVICE, requires_grad=True) for x in (scale, bias)]
    loss = function(*leaves[:2], scale=leaves[2], bias=leaves[3], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(upstream).to(loss))]


@pytest.mark.skipif(interpreted(), reason="of the definition")
def test_the_definition_is_the_formula_written_out():
    image, text = (x.cpu() for x in features(4, 5, torch.float64))
    expected = 0.0
    for i in range(4):
        for j in range(4):
            z = 1.0 if i == j else -1.0
            expected -= F.logsigmoid(z * (7.0 * image[i] @ text[j] - 3.0)) / 4
    torch.testing.assert_close(reference.sigmoid_loss(image, text, scale=7.0, bias=-3.0), expected)


@pytest.mark.skipif(interpreted(), reason="of the definition")
def test_gradients_of_both_orders():
    inputs = [x.cpu().requires_grad_() for x in features(3, 2, torch.float64)]
    inputs += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0)]

    def function(image, text, scale, bias):
        return ops.sigmoid_loss(image, text, scale=scale, bias=bias, backend="eager")

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def assert_as_good_as_eager(inputs, **options):
    truth = run(reference.sigmoid_loss, inputs, dtype=torch.float64, **options)
    eager, ours = (run(ops.sigmoid_loss, inputs, backend=backend, **options) for backend in ("eager", "auto"))
    for name, a, b, t in zip(NAMES, ours, eager, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        # A unit in the last place of the largest value, and the rounding of the logits.
        eps, largest = torch.finfo(a.dtype).eps, t.abs().max().item()
        rounding = eps * largest + torch.finfo(torch.float32).eps * options.get("scale", 10.0) * largest
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)


LENGTHS = (1, 33, 150) if interpreted() else (1, 2, 31, 64, 65, 150)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("rows", LENGTHS)
def test_error_is_at_most_that_of_eager(rows):
    assert_as_good_as_eager(features(rows, 20), upstream=0.7)


# Where SigLIP starts, and where it ends.
SCALES = [(10.0, -10.0), (118.0, -13.0)]


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("numbers", thorough_except(SCALES[1:], SCALES))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision(dtype, numbers):
    # float16 needs a loss scale.
    scale, bias = numbers
    assert_as_good_as_eager(features(70, 24, dtype), scale=scale, bias=bias, upstream=1024.0)


@pytest.mark.usefixtures("tiled")
def test_pairs_that_are_told_apart_keep_their_gradient():
    """Losses of 1e-9 a pair, where 1 + exp(logit) is 1 in float32."""
    inputs = [torch.eye(24, device=DEVICE), torch.eye(24, device=DEVICE)]
    truth = run(reference.sigmoid_loss, inputs, 42.0, -21.0, dtype=torch.float64)
    for name, a, t in zip(NAMES, run(ops.sigmoid_loss, inputs, 42.0, -21.0), truth, strict=True):
        assert (a - t).norm() <= 1e-4 * t.norm(), name


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize(
    "wanted", [(True, False, False, False), (False, True, False, True), (False, False, True, False)]
)
def test_what_needs_no_gradient_leaves_the_others_as_they_are(wanted):
    inputs = features(18, 7)
    full = run(ops.sigmoid_loss, inputs, 3.0, -2.0)[1:]
    leaves = [*inputs, torch.tensor(3.0, device=DEVICE), torch.tensor(-2.0, device=DEVICE)]
    leaves = [x.clone().requires_grad_(flag) for x, flag in zip(leaves, wanted, strict=True)]
    ops.sigmoid_loss(*leaves[:2], scale=leaves[2], bias=leaves[3]).backward()
    for leaf, flag, expected in zip(leaves, wanted, full, strict=True):
        assert torch.equal(leaf.grad, expected) if flag else leaf.grad is None


@pytest.mark.usefixtures("tiled")
def test_runs_are_equal_to_the_bit_and_any_strides_are_taken():
    inputs = features(34, 17)
    first, second = (run(ops.sigmoid_loss, inputs) for _ in range(2))
    strided = run(ops.sigmoid_loss, [x.T.contiguous().T for x in inputs])
    for a, b, c in zip(first, second, strided, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.usefixtures("tiled")
def test_a_window_has_its_part_of_the_whole():
    """What one rank computes."""
    image, text = features(90, 9)
    numbers = [torch.tensor(x, device=DEVICE) for x in (10.0, -4.0)]
    op, backward = torch.ops.sclkern.sigmoid_loss, torch.ops.sclkern.sigmoid_loss_backward
    whole = op(image, text, *numbers, 0, 90)
    windows = [(0, 30), (30, 60)]
    for total, *parts in zip(whole, *(op(image, text, *numbers, *window) for window in windows), strict=True):
        torch.testing.assert_close(sum(parts), total)
    grad = torch.tensor(2.0, device=DEVICE)
    expected = backward(grad, image, text, *numbers, *whole[1:], 0, 90, True, True)
    for side in (0, 1):
        parts = [backward(grad, image, text, *numbers, *whole[1:], *window, True, True)[side] for window in windows]
        torch.testing.assert_close(torch.cat(parts), expected[side])


@pytest.mark.usefixtures("tiled")
def test_floats_and_promoted_dtypes():
    image, text = features(6, 8, torch.float16)
    loss = ops.sigmoid_loss(image, text.float(), scale=5.0, bias=-1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference.sigmoid_loss(image.float(), text.float(), scale=5.0, bias=-1))


@pytest.mark.usefixtures("tiled")
def test_no_rows():
    assert all(not x.any() for x in run(ops.sigmoid_loss, features(0, 5)))


def test_a_second_derivative_names_the_backend_that_has_it():
    inputs = [x.requires_grad_() for x in features(5, 4)]
    loss = ops.sigmoid_loss(*inputs, scale=2.0, bias=-1.0)
    if loss.grad_fn.name().startswith("Function"):
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match=r'sigmoid_loss: .*backend="eager"'):
            torch.autograd.grad(first[0].sum(), inputs)


@pytest.mark.skipif(KERNELS_RUN, reason="of the CPU path")
def test_paths_of_a_cpu():
    few, many = torch.zeros(4, 2), torch.zeros(4000, 2)
    assert ops.explain("sigmoid_loss", few, few, scale=1.0, bias=0.0).path == "eager"
    assert ops.explain("sigmoid_loss", many, many, scale=1.0, bias=0.0).path == "tiled"


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": X.long()}, TypeError, r"image: got torch\.int64, expected a floating"),
        ({"image": X[None]}, ValueError, r"image: got shape \(1, 4, 3\), expected \(N, D\)"),
        ({"text": X[:3]}, ValueError, r"text: got shape \(3, 3\), expected \(N, D\) = \(4, 3\)"),
        ({"text": X.to("meta")}, ValueError, r"text: got device meta, expected that of image"),
        ({"scale": torch.ones(1)}, ValueError, r"scale: got shape \(1,\), expected \(\)"),
        ({"bias": torch.tensor(1)}, TypeError, r"bias: got torch\.int64, expected a floating"),
        ({"bias": None}, TypeError, r"bias: got NoneType, expected a number"),
        ({"gather": "all"}, ValueError, r"gather: got 'all', expected one of exact"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        ops.sigmoid_loss(**{"image": X, "text": X, "scale": 1.0, "bias": 0.0} | changes)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
