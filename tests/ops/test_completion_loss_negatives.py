"""``completion_loss`` with columns that belong to no row, and with plain products: the definition, tiles, kernels."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from op_testing import DEVICE, DTYPES, KERNELS_RUN, run_in_interpreter, thorough_except
from sclkern import ops, reference
from sclkern.kernels import completion_loss_cpu
from sclkern.ops.dispatch import interpreted

NAMES = ("loss", "recovered", "complete", "temperature")
DIRECTIONS = ["both", "recovered_to_complete"]
# Directions, and whether features are normalised; interpreted tests take one of each.
OPTIONS = [(directions, normalize) for directions in DIRECTIONS for normalize in (True, False)]
FEW_OPTIONS = thorough_except(OPTIONS[1:2], OPTIONS) if interpreted() else OPTIONS
ONE_OPTION = thorough_except(OPTIONS[:1], OPTIONS) if interpreted() else OPTIONS


@pytest.fixture
def tiled(monkeypatch):
    """Tiles at any size, and several of them; in the kernels, sums of columns and weights of a few rows at a time."""
    monkeypatch.setattr(sys.modules["sclkern.ops.completion_loss"], "MAX_EAGER_ROWS", -1)
    monkeypatch.setattr(completion_loss_cpu, "TILE", 1000)
    if not KERNELS_RUN:
        yield
        return
    from sclkern.kernels.config import override

    statistics, weights = ["completion_loss_statistics_kernel"], ["completion_loss_weights_kernel"]
    with override(statistics, COLUMN_SUMS=150), override(weights, WORKSPACE=9000):
        yield


def features(rows, columns, width, groups=(), dtype=torch.float32, scale=3.0):
    shapes = (*groups, rows, width), (*groups, columns, width)
    return [(scale * torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype) for shape in shapes]


def run(function, inputs, temperature=0.1, dtype=None, upstream=None, **options):
    """Loss and gradients of both features and the temperature."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    precise = torch.promote_types(leaves[0].dtype, torch.float32)
    leaves.append(torch.tensor(temperature, dtype=precise, device=DEVICE, requires_grad=True))
    loss = function(*leaves[:2], temperature=leaves[2], **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def written_out(recovered, complete, temperature, directions, valid, same, normalize):
    """The losses of rows of one group, of those that are valid, one exponential at a time."""
    if normalize:
        recovered, complete = (F.normalize(x, dim=-1) for x in (recovered, complete))
    rows, columns = len(recovered), len(complete)
    taken = [j for j in range(columns) if j >= rows or valid[j]]
    losses = []
    for i in range(rows):
        if not valid[i]:
            losses.append(recovered.new_zeros(()))
            continue
        of_row = [j for j in taken if j == i or same[i] != same[j]]
        of_column = [j for j in taken if j < rows and (j == i or same[i] != same[j])]
        loss = F.cross_entropy((complete[of_row] @ recovered[i] / temperature)[None], torch.tensor([of_row.index(i)]))
        if directions == "both":
            logits = recovered[of_column] @ complete[i] / temperature
            loss = loss + F.cross_entropy(logits[None], torch.tensor([of_column.index(i)]))
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.skipif(interpreted(), reason="of the definition")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_the_definition_is_the_formula_written_out(directions, normalize):
    inputs = [x.cpu() for x in features(5, 9, 4, dtype=torch.float64, scale=1.0)]
    same = torch.tensor([1, 2, 1, 4, 5, 6, 2, 6, 1])
    for valid in (torch.ones(5, dtype=torch.bool), torch.tensor([True, False, True, True, True])):
        ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        options = {"directions": directions, "same": same, "normalize": normalize}
        loss = reference.completion_loss(*ours, temperature=0.3, valid=valid, reduction="none", **options)
        expected = written_out(*theirs, 0.3, valid=valid, **options)
        torch.testing.assert_close(loss, expected)
        weight = torch.randn(5, dtype=torch.float64)
        gradients = (torch.autograd.grad(x, y, weight) for x, y in ((loss, ours), (expected, theirs)))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(interpreted(), reason="of the definition")
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_both_orders(normalize):
    shapes = (2, 2, 3), (2, 4, 3)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    log_scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def function(recovered, complete, log_scale):
        options = {"valid": torch.tensor([[True, False], [True, True]]), "same": torch.tensor([1, 2, 1, 3])}
        options |= {"normalize": normalize, "temperature": (-log_scale).exp()}
        return reference.completion_loss(recovered, complete, **options)

    assert torch.autograd.gradcheck(function, (*inputs, log_scale))
    assert torch.autograd.gradgradcheck(function, (*inputs, log_scale))


def assert_as_good_as_eager(inputs, temperature=0.1, **options):
    truth = run(reference.completion_loss, inputs, temperature, torch.float64, **options)
    eager = run(reference.completion_loss, inputs, temperature, **options)
    ours = run(ops.completion_loss, inputs, temperature, **options)
    largest_logit = 1 / temperature
    if not options.get("normalize", True):
        largest_logit *= (inputs[0].double() @ inputs[1].double().mT).abs().max().item()
    for name, a, b, t in zip(NAMES, ours, eager, truth, strict=True):
        assert a.shape == b.shape
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        eps, largest = torch.finfo(a.dtype).eps, t.abs().max().item()
        rounding = eps / 2 * largest + torch.finfo(torch.float32).eps * largest_logit * max(1.0, largest)
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("option", FEW_OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(33, 70)] if interpreted() else [(1, 2), (33, 165), (70, 71)])
def test_error_is_at_most_that_of_eager(rows, columns, option):
    directions, normalize = option
    inputs = features(rows, columns, 12, scale=1.0)
    temperature = 0.1 if normalize else 2.0
    options = {"directions": directions, "normalize": normalize, "reduction": "none"}
    assert_as_good_as_eager(inputs, temperature, upstream=torch.randn(rows, device=DEVICE), **options)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("option", FEW_OPTIONS, ids=str)
def test_groups_valid_rows_and_ids(option):
    directions, normalize = option
    inputs = features(21, 50, 8, groups=(3,), scale=1.0)
    valid = torch.rand(3, 21, device=DEVICE) > 0.4
    valid[1] = False
    valid[2] = torch.arange(21, device=DEVICE) == 4
    options = {"directions": directions, "normalize": normalize, "valid": valid}
    options["same"] = torch.randint(40, (50,), device=DEVICE)
    assert_as_good_as_eager(inputs, **options)
    # What is not valid does not leak.
    clean = run(ops.completion_loss, inputs, **options)
    inputs[0][~valid] = math.nan
    inputs[1][:, :21][~valid] = math.inf
    for a, b in zip(run(ops.completion_loss, inputs, **options), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision(dtype, normalize):
    # Unnormalised, as logits of a model before its scale; float16 needs a loss scale.
    inputs = features(40, 90, 24, dtype=dtype, scale=1.0)
    upstream = torch.tensor(64.0, device=DEVICE)
    assert_as_good_as_eager(inputs, 0.1 if normalize else 3.0, normalize=normalize, upstream=upstream)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("option", ONE_OPTION, ids=str)
def test_confident_positives_are_right(option):
    directions, normalize = option
    complete = F.normalize(torch.randn(90, 48, dtype=torch.float64), dim=-1)
    recovered = F.normalize(complete[:40] + 0.01 * torch.randn(40, 48, dtype=torch.float64), dim=-1)
    inputs = [x.to(DEVICE, torch.float32) for x in (recovered, complete)]
    options = {"directions": directions, "normalize": normalize}
    truth = run(reference.completion_loss, inputs, 0.03, torch.float64, **options)
    for name, a, t in zip(NAMES, run(ops.completion_loss, inputs, 0.03, **options), truth, strict=True):
        assert (a - t).norm() <= 1e-3 * t.norm(), name


@pytest.mark.usefixtures("tiled")
@pytest.mark.skipif(interpreted(), reason="takes long in the interpreter")
def test_normalised_features_need_no_normalising():
    inputs = [F.normalize(x, dim=-1) for x in features(20, 30, 16)]
    plain, cosine = (run(ops.completion_loss, inputs, normalize=flag) for flag in (False, True))
    torch.testing.assert_close(plain[0], cosine[0])
    torch.testing.assert_close(plain[3], cosine[3], rtol=1e-4, atol=1e-6)
    # The gradient of normalised features has no part along them.
    for grad, other, x in zip(plain[1:3], cosine[1:3], inputs, strict=True):
        torch.testing.assert_close(grad - (grad * x).sum(-1, keepdim=True) * x, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_plain_products_of_any_size(scale):
    """Also where exponentials of a dot product are no numbers of float32."""
    inputs = features(12, 20, 8, scale=scale)
    truth = run(reference.completion_loss, inputs, 1.0, torch.float64, normalize=False)
    for a, t in zip(run(ops.completion_loss, inputs, 1.0, normalize=False), truth, strict=True):
        assert (a - t).abs().max() <= 1e-3 * t.abs().max() + 1e-6


@pytest.mark.usefixtures("tiled")
def test_further_columns_alone_are_negatives():
    """One row is in no batch, and has negatives all the same; without rows further columns have gradient 0."""
    inputs = features(1, 4, 6, dtype=torch.float32)
    losses = run(ops.completion_loss, inputs, directions="recovered_to_complete")
    assert losses[0] > 0 and losses[2][1:].abs().sum(-1).all()
    for result in run(ops.completion_loss, features(0, 4, 6)):
        assert not result.any()


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_side_without_gradient_leaves_the_other_as_it_is(wanted):
    inputs = features(18, 31, 7)
    full = run(ops.completion_loss, inputs)[1:3]
    leaves = [x.clone().requires_grad_(flag) for x, flag in zip(inputs, wanted, strict=True)]
    ops.completion_loss(*leaves, temperature=0.1).backward()
    side = wanted.index(True)
    assert torch.equal(leaves[side].grad, full[side]) and leaves[1 - side].grad is None


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize(
    ("same", "both"), [(True, True)] if interpreted() else [(True, True), (False, True), (False, False)]
)
def test_a_window_has_its_part_of_the_whole(both, same):
    """What one rank computes: its rows, their columns, and further columns of its own."""
    groups, length, columns, width = 2, 60, 90, 5
    recovered, complete = features(length, columns, width, groups=(groups,))
    tau, upstream = torch.tensor(0.1, device=DEVICE), torch.randn(groups, length, device=DEVICE)
    valid = torch.rand(groups, length, device=DEVICE) < 0.8
    ids = torch.randint(30, (columns,), device=DEVICE) if same else None
    common = recovered, complete, tau, valid, ids
    op, backward = torch.ops.sclkern.completion_loss, torch.ops.sclkern.completion_loss_backward
    whole = True, 1e-8, 0, length, length, columns - length
    losses, *saved = op(*common, both, True, *whole)
    expected = backward(upstream, *common, *saved, *whole, True, True)
    window = True, 1e-8, 20, 20, length + 10, 10
    own = op(*common, both, True, *window)
    torch.testing.assert_close(
        own[0].masked_fill(~valid[:, 20:40], 0), losses[:, 20:40].masked_fill(~valid[:, 20:40], 0)
    )
    found = backward(upstream, *common, *saved, *window, True, True)
    of_columns = torch.cat([expected[1][:, 20:40], expected[1][:, 70:80]], 1)
    for a, b in zip(found[:2], (expected[0][:, 20:40], of_columns), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_many_columns_take_tiles():
    recovered, complete = torch.zeros(4, 2), torch.zeros(4000, 2)
    choice = ops.explain("completion_loss", recovered, complete, temperature=0.1)
    assert choice.path == ("triton" if interpreted() else "tiled")
    assert interpreted() or "columns" in choice.reasons[-1]


@pytest.mark.usefixtures("tiled")
@pytest.mark.skipif(interpreted(), reason="of the fake functions, which are those of every backend")
def test_registration():
    recovered, complete = features(6, 8, 10, groups=(2,))
    temperature = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    leaves = recovered.requires_grad_(), complete.requires_grad_(), temperature
    arguments = (*leaves, None, None, True, True, False, 1e-8, 0, 6, 6, 2)
    torch.library.opcheck(torch.ops.sclkern.completion_loss, arguments, test_utils=("test_schema", "test_faketensor"))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    losses, *saved = torch.ops.sclkern.completion_loss(*detached)
    numbers = False, 1e-8, 0, 6, 6, 2
    backward = torch.ones_like(losses), *detached[:5], *saved, *numbers, True, True
    torch.library.opcheck(torch.ops.sclkern.completion_loss_backward, backward)


@pytest.mark.usefixtures("tiled")
@pytest.mark.skipif(KERNELS_RUN, reason="one graph for the CPU path is one for all")
def test_compiles_whole():
    function = torch.compile(ops.completion_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for columns in (9, 14):
        inputs = features(7, columns, 6)
        plain = run(ops.completion_loss, inputs, normalize=False)
        for a, b in zip(run(function, inputs, normalize=False), plain, strict=True):
            torch.testing.assert_close(a, b)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
