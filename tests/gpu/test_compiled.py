"""Under torch.compile's default backend, in modules under autocast, and on a device that is not the current one."""

import pytest
import torch

from op_testing import cast, small_inputs
from sclkern import nn, ops
from sclkern.tools.specs import SPECS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
several_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("name", SPECS)
def test_inductor_compiles_an_op_whole(name):
    arguments = cast(name, small_inputs(name, 40), torch.bfloat16, ("temperature",))
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]

    def call(function):
        out = function(**arguments)
        if not leaves:
            return list(out) if isinstance(out, tuple) else [out]
        # Something for the compiler to fuse around the op.
        return [out.detach(), *torch.autograd.grad((out.float() * 2).sum(), leaves)]

    function = getattr(ops, name)
    for a, b in zip(call(torch.compile(function, fullgraph=True)), call(function), strict=True):
        if b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
        else:
            assert torch.equal(a, b)


def modules():
    """Each module, its tensors, and its further arguments."""
    x, memory = torch.randn(4, 33, 128, device="cuda"), torch.randn(4, 13, 128, device="cuda")
    labels = torch.arange(33, device="cuda").expand(4, -1)
    return {
        "CompletionLoss": (nn.CompletionLoss(0.3), (x[:, 0], x[:, 1]), {}),
        "DropoutAddLayerNorm": (nn.DropoutAddLayerNorm(128), (x, x.clone()), {}),
        "LinearCrossEntropy": (nn.LinearCrossEntropy(128, 50), (x, labels), {}),
        "LinearGELU": (nn.LinearGELU(128, 256), (x,), {}),
        "MultiheadAttention": (
            nn.MultiheadAttention(128, 2, batch_first=True), (x, memory, memory), {"need_weights": False},
        ),
        "TransformerEncoderLayer": (nn.TransformerEncoderLayer(128, 2, 256, 0.0, batch_first=True), (x,), {}),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in nn.__all__ if name != "TransformerEncoder"])
def test_a_module_with_float32_parameters_under_autocast(name, dtype):
    torch.manual_seed(0)
    module, tensors, options = modules()[name]
    module.cuda()
    outputs, gradients = [], []
    for enabled in (False, True):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        with torch.autocast("cuda", dtype, enabled=enabled):
            out = module(*leaves, **options)
        out = (out[0] if isinstance(out, tuple) else out).float()
        wanted = [t for t in leaves if t.requires_grad] + list(module.parameters())
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out.square().sum(), wanted))
    truth, ours = outputs
    torch.testing.assert_close(ours, truth, rtol=0, atol=0.05 * truth.abs().max().item())
    scale = max(g.abs().max().item() for g in gradients[0])
    for truth, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=0.05 * scale)


def test_inductor_compiles_a_norm_with_its_sum():
    x, residual = (torch.randn(40, 24, device="cuda", requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(24, device="cuda"), torch.randn(24, device="cuda")

    def block(x, residual):
        out, total = ops.dropout_add_layer_norm(2 * x, residual, weight, bias, return_sum=True)
        return (out + total).relu()

    def call(function):
        out = function(x, residual)
        return out, *torch.autograd.grad(out.sum(), (x, residual))

    for a, b in zip(call(torch.compile(block, fullgraph=True)), call(block), strict=True):
        torch.testing.assert_close(a, b)


@several_devices
@pytest.mark.parametrize("name", SPECS)
def test_an_op_runs_on_the_device_of_its_tensors(name):
    arguments = cast(name, small_inputs(name, 20), torch.float32)
    moved = {
        key: value.detach().to("cuda:1").requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in arguments.items()
    }
    moved |= {"device": "cuda:1"} if "device" in moved else {}
    assert torch.cuda.current_device() == 0
    ours, theirs = (getattr(ops, name)(**given) for given in (moved, arguments))
    ours, theirs = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
    assert ours.device.index == 1
    torch.testing.assert_close(ours.cpu(), theirs.cpu())
    if leaves := [t for t in moved.values() if isinstance(t, torch.Tensor) and t.requires_grad]:
        assert all(g.isfinite().all() for g in torch.autograd.grad(ours.sum(), leaves))


def test_two_ops_compile_into_one_graph():
    x, bias = torch.randn(40, 24, device="cuda"), torch.randn(24, device="cuda")

    def block(x, bias):
        return ops.dropout_add_layer_norm(ops.bias_gelu(x, bias), x * 2, bias, bias)

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x, bias), block(x, bias))
