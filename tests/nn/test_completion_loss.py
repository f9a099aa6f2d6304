"""``nn.CompletionLoss``: the op with its options, and a temperature that cannot get lost."""

import copy
import threading

import pytest
import torch

from op_testing import DEVICE
from sclkern import nn, reference
from sclkern.ops.dispatch import interpreted


def features(dtype=torch.float64, shape=(6, 8)):
    return [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("directions", ["both", "recovered_to_complete"])
@pytest.mark.parametrize("learnable", [False, True])
def test_is_the_reference_with_its_options(learnable, directions, backend, dtype):
    loss = nn.CompletionLoss(
        0.1, learnable=learnable, directions=directions, reduction="sum", eps=1e-6, backend=backend
    )
    loss.to(DEVICE)
    inputs = features(dtype)
    valid = torch.arange(6, device=DEVICE) != 2
    temperature = torch.tensor(0.1, dtype=torch.float32).double().to(DEVICE).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.completion_loss(
        *exact,
        temperature=temperature if learnable else 0.1,
        directions=directions,
        reduction="sum",
        valid=valid,
        eps=1e-6,
    )
    out = loss(*inputs, valid)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    out.backward(), expected.backward()
    for x, y in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=6e-5, atol=6e-6)
    if learnable:
        torch.testing.assert_close(loss.temperature.grad.double(), temperature.grad, rtol=1e-5, atol=1e-5)


def test_further_columns_and_plain_products():
    recovered, complete = features(torch.float32)[0], torch.randn(9, 8, device=DEVICE)
    loss = nn.CompletionLoss(2.0, normalize=False)
    expected = reference.completion_loss(recovered, complete, temperature=2.0, normalize=False)
    torch.testing.assert_close(loss(recovered, complete), expected, rtol=1e-5, atol=1e-6)
    assert "normalize=False" in repr(loss)
    with pytest.raises(TypeError, match="normalize: got str, expected a bool"):
        nn.CompletionLoss(normalize="no")


@pytest.mark.parametrize(("stored", "used"), [(-0.2, 0.01), (0.02, 0.02), (3.0, 0.5)])
def test_a_temperature_outside_its_range_comes_back(stored, used):
    loss = nn.CompletionLoss(0.1, learnable=True).to(DEVICE)
    with torch.no_grad():
        loss.temperature.fill_(stored)
    recovered, complete = features()
    out = loss(recovered, complete)
    expected = reference.completion_loss(recovered, complete, temperature=used)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.backward()
    assert loss.temperature.grad.isfinite() and loss.temperature.grad != 0


def test_state_is_only_the_learnable_temperature():
    assert not nn.CompletionLoss().state_dict()
    loss = nn.CompletionLoss(0.2, learnable=True)
    assert list(loss.state_dict()) == ["temperature"] and loss.temperature.shape == ()
    copied = copy.deepcopy(loss)
    other = nn.CompletionLoss(learnable=True)
    other.load_state_dict(loss.state_dict(), strict=True)
    assert copied.temperature == other.temperature == 0.2 and copied.temperature is not loss.temperature
    assert "temperature=0.03, directions='both', reduction='mean', gather='exact'" in repr(nn.CompletionLoss())
    assert "learnable, temperature_range=(0.01, 0.5)" in repr(loss)


def test_a_copy_has_the_same_group():
    # A lock, like a process group, cannot be copied.
    pair = torch.nn.ModuleList([nn.CompletionLoss(0.2, learnable=True, group=threading.Lock())] * 2)
    copied = copy.deepcopy(pair)
    assert copied[0].group is pair[0].group and copied[0] is copied[1]
    assert copied[0].temperature is not pair[0].temperature and copied[0].temperature == 0.2


def test_autocast_keeps_the_loss_in_float32():
    loss = nn.CompletionLoss(0.1, learnable=True)
    recovered, complete = (x.detach().cpu().float() for x in features())
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(recovered, complete)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, loss(recovered, complete))


@pytest.mark.skipif(interpreted(), reason="the eager path")
def test_compiles_whole(run_module):
    loss = nn.CompletionLoss(0.1, learnable=True).to(DEVICE)
    inputs = features()
    plain = run_module(loss, *inputs)
    loss.compile(fullgraph=True, backend="aot_eager")
    for name, tensor in run_module(loss, *inputs).items():
        torch.testing.assert_close(tensor, plain[name], msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0, expected a positive number"),
        ({"temperature": 0.7, "learnable": True}, "temperature: got 0.7, expected a number from 0.01 to 0.5"),
        ({"temperature_range": (0.5, 0.1)}, r"temperature_range: got \(0.5, 0.1\), expected 0 < low <= high"),
        ({"directions": "rows"}, "directions: got 'rows', expected one of both"),
        ({"reduction": "max"}, "reduction: got 'max'"),
        ({"gather": "all"}, "gather: got 'all', expected one of exact, published, None"),
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nn.CompletionLoss(**options)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="complete: got shape"):
        nn.CompletionLoss()(torch.zeros(3, 4), torch.zeros(2, 4))
