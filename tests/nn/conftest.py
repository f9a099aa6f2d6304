"""What the tests of modules share: two modules with one set of weights, compared in all they compute."""

import pytest
import torch

from op_testing import DEVICE, KERNELS_RUN
from sclkern.ops.dispatch import interpreted

# Backend and dtype of the module under test; torch's always computes in float64. The process that interprets kernels
# need not repeat the eager path.
SETTINGS = [("auto", torch.float64), ("eager", torch.float64)] * (not interpreted())
SETTINGS += [("triton", torch.float32)] * KERNELS_RUN


def pytest_generate_tests(metafunc):
    if {"backend", "dtype"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("backend", "dtype"), SETTINGS, ids=[backend for backend, _ in SETTINGS])


def run_module(module, *inputs, **options):
    """Output, then the gradient of every floating input that requires one and of every parameter, by name."""
    module.zero_grad()
    leaves = {}
    for tensor in inputs:
        if torch.is_tensor(tensor) and tensor.requires_grad and id(tensor) not in leaves:
            leaves[id(tensor)] = tensor.detach().requires_grad_()
    inputs = [leaves.get(id(tensor), tensor) for tensor in inputs]
    out = module(*inputs, **options)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out.backward(weight.to(out))
    found = {"out": out.detach()} | {f"input {i}": leaf.grad for i, leaf in enumerate(leaves.values())}
    return found | {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(ours, theirs, *inputs, dtype, **options):
    """``ours`` in ``dtype`` computes what ``theirs`` does in float64, forward and backward; strict both ways.

    float32 is for the kernels, on the device where they run; float64 stays on the CPU.
    """
    device = DEVICE if dtype == torch.float32 else "cpu"
    ours.to(device, dtype).load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.to(device, torch.float64)

    def cast(wanted):
        made = {}
        for tensor in inputs:
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                made[id(tensor)] = tensor.detach().to(device, wanted).requires_grad_(tensor.requires_grad)
            elif torch.is_tensor(tensor):
                made[id(tensor)] = tensor.to(device)
        return [made.get(id(tensor), tensor) for tensor in inputs]

    found, truth = run_module(ours, *cast(dtype), **options), run_module(theirs, *cast(torch.float64), **options)
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        if expected is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == expected.shape and found[name].dtype == dtype, name
        relative = 1e-11 if dtype == torch.float64 else 2e-5 if name == "out" else 6e-5
        error = (found[name].double() - expected).abs().max()
        # A bias of the keys has no gradient but rounding.
        assert error <= relative * expected.abs().max().clamp_min(1.0), (name, error)


@pytest.fixture(name="assert_same")
def _assert_same():
    return assert_same


@pytest.fixture(name="run_module")
def _run_module():
    return run_module
