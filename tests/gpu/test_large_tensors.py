"""More elements than an int32 counts: each op on a tensor of more than 2^31 elements.

Its last samples are compared with the same samples computed separately.

The masking ops are left out: what they write is a few hundred numbers for each sample.
"""

import pytest
import torch

from op_testing import SEED
from sclkern import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 130 * 2**30:
    pytestmark.append(pytest.mark.skip(reason="tensors of 2^31 elements need 130 GiB of GPU memory"))
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}
LIMIT = 2**31


def large(*shape, **options):
    return torch.randn(shape, **BF16, **options)


def gradients(out, *leaves):
    """Of a fixed vector along the last dimension, the same for every sample."""
    weight = torch.randn(out.shape[-1], generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return torch.autograd.grad(out, leaves, weight.to(out.dtype).expand(out.shape))


def assert_near(ours, theirs):
    """Equal up to bfloat16 rounding: a batch of another size may be computed in tiles of another shape."""
    scale = theirs.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02 * scale)


def assert_the_last_are_right(function, tensors, rows):
    """``function`` gives the same for the last ``rows`` samples, within the batch and on their own."""
    assert max(t.numel() for t in tensors) > LIMIT
    whole = [t.requires_grad_() for t in tensors]
    out = function(*whole)
    last = [t[-rows:].clone() for t in (out.detach(), *gradients(out, *whole))]
    ends = [t.detach()[-rows:].clone().requires_grad_() for t in tensors]
    separate = function(*ends)
    for a, b in zip(last, (separate.detach(), *gradients(separate, *ends)), strict=True):
        assert_near(a, b)


def test_attention():
    tensors = [large(8640, 325, 12, 64) for _ in range(3)]
    assert_the_last_are_right(lambda *t: ops.attention(*t, backend="triton"), tensors, 2)


def test_attention_to_captions():
    tensors = [large(8640, length, 12, 64) for length in (325, 13, 13)]
    assert_the_last_are_right(lambda *t: ops.attention(*t, backend="triton"), tensors, 2)


def test_packed_attention():
    def packed(*tensors):
        counts = [t.shape[0] // length for t, length in zip(tensors, (325, 13), strict=False)]
        ends = [
            torch.arange(n + 1, device="cuda", dtype=torch.int32) * length
            for n, length in zip(counts, (325, 13), strict=True)
        ]
        return ops.packed_attention(*tensors, *ends, 325, 13, backend="triton")

    tensors = [large(8640 * length, 12, 64) for length in (325, 13, 13)]
    whole = [t.requires_grad_() for t in tensors]
    out = packed(*whole)
    assert out.numel() > LIMIT
    last = (out.detach(), *gradients(out, *whole))
    ends = [t.detach()[-2 * n :].clone().requires_grad_() for t, n in zip(tensors, (325, 13, 13), strict=True)]
    separate = packed(*ends)
    for a, b in zip(last, (separate.detach(), *gradients(separate, *ends)), strict=True):
        assert_near(a[-b.shape[0] :], b)


def test_frame_attention():
    tensors = [large(3600, 4 * 197, 12, 64) for _ in range(3)]
    assert_the_last_are_right(lambda *t: ops.frame_attention(*t, 4, backend="triton"), tensors, 2)


def test_cross_attention():
    weights = [large(*shape) * 0.036 for shape in ((3 * 768, 768), (3 * 768,), (768, 768), (768,))]

    def cross(x, context):
        return ops.cross_attention(x, context, *weights, num_heads=12, absorb="keys", backend="triton")

    x, context = large(8640, 325, 768, requires_grad=True), large(8640, 13, 768, requires_grad=True)
    out = cross(x, context)
    assert out.numel() > LIMIT
    last = [t[-2:].clone() for t in (out.detach(), *gradients(out, x, context))]
    ends = [t.detach()[-2:].clone().requires_grad_() for t in (x, context)]
    separate = cross(*ends)
    for a, b in zip(last, (separate.detach(), *gradients(separate, *ends)), strict=True):
        assert_near(a, b)


def test_bias_gelu():
    x, bias = large(700_000, 3072, requires_grad=True), large(3072, requires_grad=True)
    assert x.numel() > LIMIT
    out = ops.bias_gelu(x, bias, backend="triton")
    grad_x, grad_bias = gradients(out, x, bias)
    end = x.detach()[-5:].clone().requires_grad_()
    separate = ops.bias_gelu(end, bias, backend="triton")
    assert_near(out.detach()[-5:], separate.detach())
    assert_near(grad_x[-5:], gradients(separate, end)[0])
    assert_near(grad_bias, grad_x.sum(0, dtype=torch.float32))


def test_dropout_add_layer_norm():
    rows, width = 2_900_000, 768
    x, residual = large(rows, width, requires_grad=True), large(rows, width, requires_grad=True)
    weight, bias = torch.ones(width, **BF16), torch.zeros(width, **BF16)
    assert x.numel() > LIMIT
    out = ops.dropout_add_layer_norm(
        x, residual, weight, bias, dropout_p=0.1, seed=torch.tensor([SEED], device="cuda"), backend="triton"
    )
    grad_x, grad_residual = gradients(out, x, residual)
    # Eight neighbouring columns share one draw: the mask of the first eight is that of rows of eight.
    keep = reference.feature_dropout_keep(rows, 8, 0.1, torch.tensor([SEED], device="cuda"))[-1000:]
    assert torch.equal(grad_x[-1000:, :8] != 0, keep & (grad_residual[-1000:, :8] != 0))
    assert abs((grad_x[-1000:] == 0).float().mean().item() - 0.1) < 0.01
    dropped = torch.where(grad_x[-1000:] != 0, x.detach()[-1000:].float() / 0.9, 0.0)
    expected = torch.nn.functional.layer_norm(residual.detach()[-1000:].float() + dropped, (width,))
    # An element whose gradient rounds to zero looks dropped; it is one in thousands.
    assert ((out[-1000:].float() - expected).abs() > 0.05).float().mean() < 0.01


def test_dropout_add_layer_norm_with_its_sum():
    x, residual = (large(2_900_000, 768, requires_grad=True) for _ in range(2))
    weight, bias = torch.ones(768, **BF16), torch.zeros(768, **BF16)
    assert x.numel() > LIMIT

    def call(x, residual):
        out, total = ops.dropout_add_layer_norm(x, residual, weight, bias, return_sum=True, backend="triton")
        return out, total, *torch.autograd.grad((out, total), (x, residual), (total.detach(), out.detach()))

    last = [t.detach()[-5:].clone() for t in call(x, residual)]
    ends = [t.detach()[-5:].clone().requires_grad_() for t in (x, residual)]
    for a, b in zip(last, call(*ends), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(45_000, 64, 50265), (2_900_000, 768, 40)])
def test_linear_cross_entropy(rows, width, vocabulary):
    assert max(rows * vocabulary, rows * width) > LIMIT
    hidden, weight = large(rows, width, requires_grad=True), (large(vocabulary, width) * 0.036).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    losses = ops.linear_cross_entropy(hidden, weight, None, labels, reduction="none", backend="triton")
    grad, grad_weight = torch.autograd.grad(losses.sum(), (hidden, weight))
    end = hidden.detach()[-100:].float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(end @ weight.detach().float().T, labels[-100:], reduction="none")
    assert_near(losses.detach()[-100:], expected.detach())
    assert_near(grad[-100:], torch.autograd.grad(expected.sum(), end)[0])
    assert grad_weight.isfinite().all() and grad_weight.abs().max() > 0


def test_completion_loss_of_65536_rows_takes_memory_of_the_features():
    rows, width, temperature = 65536, 768, 0.05
    recovered, complete = large(rows, width, requires_grad=True), large(rows, width, requires_grad=True)
    assert rows * rows > LIMIT
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    options = {"temperature": temperature, "directions": "recovered_to_complete", "backend": "triton"}
    losses = ops.completion_loss(recovered, complete, reduction="none", **options)
    grads = torch.autograd.grad(losses.sum(), (recovered, complete))
    # The similarities would be 8 GiB in half precision.
    assert torch.cuda.max_memory_allocated() - held < 2 * 2**30
    unit = [torch.nn.functional.normalize(t.detach().float(), dim=-1) for t in (recovered, complete)]
    last = torch.arange(rows - 100, rows, device="cuda")
    expected = torch.nn.functional.cross_entropy(unit[0][-100:] @ unit[1].T / temperature, last, reduction="none")
    torch.testing.assert_close(losses.detach()[-100:], expected, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() and g[-100:].abs().max() > 0 for g in grads)


def test_completion_loss_of_many_groups():
    tensors = [large(43_800, 64, 768) for _ in range(2)]

    def losses(*tensors):
        return ops.completion_loss(*tensors, temperature=0.05, reduction="none", backend="triton")

    assert_the_last_are_right(losses, tensors, 2)


def test_completion_loss_of_65536_negatives_beside_few_rows():
    recovered, complete = large(4096, 768, requires_grad=True), large(69632, 768, requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    options = {"temperature": 0.05, "directions": "both", "backend": "triton"}
    losses = ops.completion_loss(recovered, complete, reduction="none", **options)
    grads = torch.autograd.grad(losses.sum(), (recovered, complete))
    assert torch.cuda.max_memory_allocated() - held < 2**30
    unit = [torch.nn.functional.normalize(t.detach().float(), dim=-1) for t in (recovered, complete)]
    last = torch.arange(4096 - 100, 4096, device="cuda")
    expected = torch.nn.functional.cross_entropy(unit[0][-100:] @ unit[1].T / 0.05, last, reduction="none")
    of_columns = unit[1][4096 - 100 : 4096] @ unit[0].T / 0.05
    expected += torch.nn.functional.cross_entropy(of_columns, last, reduction="none")
    torch.testing.assert_close(losses.detach()[-100:], expected, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() and g[-100:].abs().max() > 0 for g in grads)


def test_sigmoid_loss_of_65536_rows_takes_memory_of_the_features():
    rows, width = 65536, 768
    features = [torch.nn.functional.normalize(large(rows, width), dim=-1).requires_grad_() for _ in range(2)]
    assert rows * rows > LIMIT
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loss = ops.sigmoid_loss(*features, scale=10.0, bias=-10.0, backend="triton")
    grads = torch.autograd.grad(loss, features)
    # The logits would be 8 GiB in half precision.
    assert torch.cuda.max_memory_allocated() - held < 2 * 2**30
    exact = [x.detach().float() for x in features]
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    for start in range(0, rows, 4096):
        logits = 10.0 * exact[0][start : start + 4096] @ exact[1].T - 10.0
        logits.diagonal(start).neg_()
        total += torch.nn.functional.softplus(logits).sum(dtype=torch.float64)
    torch.testing.assert_close(loss.detach().double(), total / rows, rtol=1e-4, atol=1e-6)
    slopes = logits.sigmoid()
    slopes.diagonal(rows - 4096).neg_()
    expected = slopes[-100:] @ exact[1] * 10.0 / rows
    torch.testing.assert_close(grads[0][-100:].float(), expected, rtol=2e-2, atol=expected.abs().max().item() * 1e-2)
    assert all(g.isfinite().all() for g in grads)


def test_embed_patches():
    images, weight = large(8640, 1, 3, 288, 288), (large(768, 3, 16, 16) * 0.036).requires_grad_()
    position, cls = large(325, 768, requires_grad=True), large(768, requires_grad=True)
    out = ops.embed_patches(images, weight, position, cls, backend="triton")
    assert images.numel() > LIMIT and out.numel() > LIMIT
    separate = ops.embed_patches(images[-2:], weight, position, cls, backend="triton")
    assert_near(out.detach()[-2:], separate.detach())
    last = gradients(out, weight, position, cls)
    vector = torch.randn(768, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    # Every sample's gradient is the same vector: that of the CLS is as many times it as there are samples.
    assert_near(last[2], 8640 * vector.bfloat16().float())
    assert all(g.isfinite().all() for g in last)
