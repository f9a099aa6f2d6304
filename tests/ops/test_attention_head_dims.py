"""Head dims that fill no tile: 72 of SigLIP so400m, 80 of ViT-H, 88 of ViT-g, 96, 104 of ViT-bigG."""

import math

import pytest
import torch

from op_testing import DEVICE, DTYPES, SEED, needs_kernels, run_in_interpreter, thorough_except
from sclkern import ops
from sclkern.kernels.config import select
from sclkern.ops._attention import HEAD_DIMS, contiguous_channels

NAMES = ("out", "grad_query", "grad_key", "grad_value")
FILLED = [head for head in HEAD_DIMS if head & (head - 1)]
# Both kernels of the backward; one tile of queries, of keys; keys as the rows of the products.
LENGTHS = [(65, 65), (13, 33), (70, 13), (13, 90), (33, 17)]
CASES = [(*lengths, head, dtype) for lengths, head in zip(LENGTHS, FILLED, strict=True) for dtype in DTYPES]
EDGES = [(65, 65, 72, DTYPES[-1]), (13, 33, 80, torch.float16)]


def inputs(queries, keys, head, dtype=torch.float32, batch=2):
    """query, key, value, a gradient; a mask that leaves the first key of each sample."""
    tensors = [torch.randn(batch, length, 2, head).to(DEVICE, dtype) for length in (queries, keys, keys, queries)]
    mask = torch.rand(batch, keys) < 0.7
    mask[:, :1] = True
    return tensors, mask.to(DEVICE)


def run(query, key, value, grad, dtype=None, backend="triton", **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (query, key, value)]
    out = ops.attention(*leaves, backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def test_the_head_dims():
    assert FILLED == [72, 80, 88, 96, 104]


@needs_kernels
@pytest.mark.parametrize("case", thorough_except(EDGES, CASES), ids=str)
def test_error_is_at_most_that_of_eager(case):
    queries, keys, head, dtype = case
    tensors, mask = inputs(queries, keys, head, dtype, batch=1)
    options = {"key_padding_mask": mask, "dropout_p": 0.2, "seed": SEED}
    ours, eager = (run(*tensors, backend=backend, **options) for backend in ("triton", "eager"))
    truth = run(*tensors, torch.float64, "eager", **options)
    for name, a, b, t in zip(NAMES, ours, eager, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error, allowed = ((v.double() - t).abs().max().item() for v in (a, b))
        rounding = 8 * torch.finfo(dtype).eps * t.abs().max().item()
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)


@needs_kernels
@pytest.mark.parametrize("head", FILLED)
def test_parts_of_one_projection(head):
    """As a fused model has them: query, key and value of one product, their gradients in one tensor."""
    packed = torch.randn(2, 17, 3, 2, head, device=DEVICE, requires_grad=True)
    grad = torch.randn(2, 17, 2, head, device=DEVICE)
    results = []
    for backend in ("triton", "eager"):
        out = ops.attention(*packed.unbind(2), backend=backend)
        results.append([out, *torch.autograd.grad(out, packed, grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("lengths", thorough_except([(13, 33)], [(13, 33), (33, 13), (65, 65)]), ids=str)
def test_bias(lengths):
    """One for both samples, whose gradient is the sum over them."""
    tensors, mask = inputs(*lengths, 72)
    bias = 2 * torch.randn(1, 2, *lengths, device=DEVICE)
    options = {"key_padding_mask": mask, "dropout_p": 0.2, "seed": SEED}
    results = []
    for backend in ("triton", "eager"):
        leaves = [tensor.clone().requires_grad_() for tensor in (*tensors[:3], bias)]
        out = ops.attention(*leaves[:3], bias=leaves[3], backend=backend, **options)
        results.append([out, *torch.autograd.grad(out, leaves, tensors[3])])
    for name, ours, theirs in zip((*NAMES, "grad_bias"), *results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@needs_kernels
def test_nan_beside_a_head_is_not_read():
    """The channels that fill a tile are those of the next head in memory."""
    tensors, mask = inputs(17, 21, 72)
    clean = run(*tensors, key_padding_mask=mask)
    wide = [torch.full((2, t.shape[1], 2, 80), math.nan, device=DEVICE) for t in tensors]
    for tensor, part in zip(wide, tensors, strict=True):
        tensor[..., :72] = part
    for name, a, b in zip(NAMES, run(*(t[..., :72] for t in wide), key_padding_mask=mask), clean, strict=True):
        assert torch.equal(a, b), name


@needs_kernels
def test_packed():
    ends = torch.tensor([0, 5, 5, 21], dtype=torch.int32, device=DEVICE)
    tensors = [torch.randn(24, 2, 80, device=DEVICE, requires_grad=True) for _ in range(3)]
    results = []
    for backend in ("triton", "eager"):
        out = ops.packed_attention(*tensors, ends, ends, 16, 16, dropout_p=0.1, seed=4, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (ours[21:] == 0).all()


def test_strides_that_the_kernels_take():
    """Offsets of heads are known to be multiples of 16 bytes only where 8 divides the strides."""
    even = torch.empty(2, 5, 3, 2, 72)[:, :, 0]
    odd = torch.empty(2, 5, 2, 76)[..., :72]
    assert contiguous_channels(even)[0] is even
    assert contiguous_channels(odd)[0].stride() == (720, 144, 72, 1)
    assert contiguous_channels(odd[..., :64])[0].stride() == odd.stride()


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_the_configuration_is_that_of_the_tile(pass_):
    lengths = {"queries": 325, "keys": 325}
    for arch in ("sm_80", "sm_90", "sm_100"):
        whole = select("attention", pass_, torch.bfloat16, arch, **lengths, head_dim=128)
        for one in FILLED:
            configs = select("attention", pass_, torch.bfloat16, arch, **lengths, head_dim=one)
            assert configs == whole or (pass_ == "forward" and configs[0]["BLOCK_QUERIES"] == 64)


def test_frame_attention_has_no_such_kernel():
    frames = torch.randn(1, 8, 2, 72)
    with pytest.raises(ValueError, match="head dim 72 has no kernel, 32, 64, 128 have"):
        ops.frame_attention(frames, frames, frames, 2, backend="triton")


def test_in_the_interpreter():
    run_in_interpreter(__file__)
