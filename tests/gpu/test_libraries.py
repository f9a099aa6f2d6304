"""flash-attn and apex where they are installed: they give what the definitions give."""

import pytest
import torch
import torch.nn.functional as F

from sclkern import ops
from sclkern.libraries import apex, flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require(problems):
    if problems:
        pytest.skip("; ".join(problems))


def heads(*shape):
    product = torch.randn(*shape, 3 * 4 * 64, device=DEVICE, dtype=torch.bfloat16)
    return [t.unflatten(-1, (4, 64)).requires_grad_() for t in product.chunk(3, -1)]


def assert_close_to_eager(op, tensors, *arguments, **options):
    """Output and gradients in bfloat16, against the definition in float32."""
    results = []
    for backend, dtype in (("flash", torch.bfloat16), ("eager", torch.float32)):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        out = getattr(ops, op)(*leaves, *arguments, **options, backend=backend)
        torch.manual_seed(1)
        grad = torch.randn(out.shape, device=DEVICE)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
    for name, ours, theirs in zip(("out", "query", "key", "value"), *results, strict=True):
        scale = theirs.abs().max().clamp_min(1e-3)
        torch.testing.assert_close(ours.float() / scale, theirs / scale, rtol=0, atol=0.03, msg=f"{op}: {name}")


def test_flash_attn():
    require(flash.problems(DEVICE))
    torch.manual_seed(0)
    assert_close_to_eager("attention", heads(3, 70))
    mask = torch.rand(3, 70, device=DEVICE) < 0.7
    mask[1] = False
    assert_close_to_eager("attention", heads(3, 70), key_padding_mask=mask)
    assert_close_to_eager("frame_attention", heads(2, 3 * 17), 3)
    # Sequences without queries, without keys, of 70, and tokens that belong to none.
    ends_q, ends_k = ([0, 3, 3, 60, 130], [0, 40, 110, 110, 115])
    lengths = [torch.tensor(ends, dtype=torch.int32, device=DEVICE) for ends in (ends_q, ends_k)]
    (query, _, _), (_, key, value) = heads(140), heads(130)
    assert_close_to_eager("packed_attention", (query, key, value), *lengths, 70, 70)


def test_flash_attns_dropout():
    require(flash.problems(DEVICE))
    query, key, value = heads(2, 200)
    value = torch.ones_like(value)

    def attend(seed):
        torch.manual_seed(seed)
        return ops.attention(query, key, value, dropout_p=0.1, backend="flash")

    assert torch.equal(attend(0), attend(0)) and not torch.equal(attend(0), attend(1))
    assert abs(attend(0).float().mean().item() - 1) < 0.02


def test_apexs_layer_norm():
    require(apex.layer_norm_problems(DEVICE))
    x, weight, bias = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((50, 768), (768,), (768,)))
    grad = torch.randn_like(x)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype != torch.float32):
            ours = apex.layer_norm(x.to(dtype), weight, bias, 1e-5)
        theirs = F.layer_norm(x.to(dtype).float(), (768,), weight, bias, 1e-5)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        gradients = (torch.autograd.grad(out, (x, weight, bias), grad) for out in (ours, theirs))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_apexs_adam():
    require(apex.adam_problems(DEVICE))
    start, gradients = torch.randn(1000, device=DEVICE), torch.randn(5, 1000, device=DEVICE)
    results = []
    for name in ("torch", "apex"):
        parameter = torch.nn.Parameter(start.clone())
        groups = [{"params": [parameter], "lr": 1e-2, "weight_decay": 0.1}]
        options = {"betas": (0.9, 0.98), "eps": 1e-8}
        build = torch.optim.AdamW if name == "torch" else lambda groups, **o: apex.build_adam(groups, DEVICE, **o)
        optimizer = build(groups, **options)
        for gradient in gradients:
            optimizer.zero_grad()
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
