"""The dropout mask of attention drawn once, KEEP_BITS: the same numbers to the bit as where each kernel draws it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from op_testing import BACKENDS, DEVICE, needs_kernels, run_in_interpreter
from sclkern import ops
from sclkern.kernels.config import override, select
from sclkern.ops import attention, packed_attention
from sclkern.ops.dispatch import TRITON_INSTALLED

OPTIONS = {"dropout_p": 0.3, "seed": 2**40 + 3, "backend": "triton"}
# Queries, keys, head dim: one tile of keys, one of queries, both kernels of the backward, keys that end within a word.
SIZES = [(17, 13, 32), (40, 5, 32), (9, 80, 32), (70, 100, 64), (1, 1, 32)]


def drawn_once():
    return override(("attention_forward_kernel",), KEEP_BITS=1)


def results(function, tensors: list[Tensor], *args, **options) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, *args, **OPTIONS | options)
    grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def padded(queries: int, keys: int, head_dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, length, 2, head_dim, device=DEVICE) for length in (queries, keys, keys)]


def packed(head_dim: int = 32) -> tuple[list[Tensor], list]:
    """Sequences of 20, 0, 5 and 3 queries and 7, 4, 0 and 50 keys, and rows after the last."""
    torch.manual_seed(0)
    ends = [torch.tensor([0, *of], device=DEVICE).cumsum(0).int() for of in ((20, 0, 5, 3), (7, 4, 0, 50))]
    tensors = [torch.randn(length, 2, head_dim, device=DEVICE) for length in (31, 66, 66)]
    return tensors, [*ends, 20, 50]


@needs_kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padded_attention_is_equal_to_the_bit(size):
    tensors = padded(*size)
    mask = torch.rand(2, size[1], device=DEVICE) < 0.7
    ids = torch.tensor([2**40, 5], device=DEVICE)
    for options in ({}, {"key_padding_mask": mask, "dropout_ids": ids}):
        expected = results(attention, tensors, **options)
        with drawn_once():
            found = results(attention, tensors, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        # The other mask of another seed, so that there is something to be equal.
        assert size == (1, 1, 32) or not torch.equal(results(attention, tensors, **options, seed=4)[0], found[0])


@needs_kernels
def test_packed_attention_is_equal_to_the_bit():
    tensors, packing = packed()
    expected = results(packed_attention, tensors, *packing)
    with drawn_once():
        found = results(packed_attention, tensors, *packing)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernels
def test_the_definition_has_the_same_mask():
    tensors = padded(17, 40, 32)
    with drawn_once():
        found = results(attention, tensors)
    expected = results(attention, tensors, backend="eager")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_the_log_sum_exp_is_what_it_was():
    tensors = padded(9, 40, 32)
    expected = attention(*tensors, return_lse=True, **OPTIONS)[1]
    with drawn_once():
        found = attention(*tensors, return_lse=True, **OPTIONS)[1]
    assert torch.equal(found, expected)


@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("op", ["attention", "packed_attention"])
def test_one_launch_draws_and_the_others_read(op):
    from sclkern.kernels.launch import recorded
    from sclkern.tools.specs import SPECS

    spec = SPECS[op]
    inputs = spec.inputs(spec.sizes[0].values, torch.bfloat16, "meta")
    for keep, dropout_p in ((0, 0.1), (1, 0.1), (1, 0.0)):
        seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
        with override(("attention_forward_kernel",), KEEP_BITS=keep), recorded() as launches:
            spec.launch(inputs, dropout_p, seed)()
        drawing = keep and dropout_p
        names = [launch.config.kernel for launch in launches]
        assert names.count("attention_dropout_kernel") == bool(drawing)
        readers = [launch.arguments["bits_ptr"] for launch in launches if "drop" not in launch.config.kernel]
        assert len(readers) > 1 and all((bits is not None) == bool(drawing) for bits in readers)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend == "triton"])
def test_registration(backend):
    tensors, (ends_q, ends_k, *lengths) = packed()
    seed = torch.tensor([5], device=DEVICE)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    with drawn_once():
        arguments = (*tensors, None, ends_q, ends_k, seed, None, *lengths, 0.3, 0.2, 0)
        torch.library.opcheck(torch.ops.sclkern.attention, arguments, test_utils=utils)
        torch.compiler.reset()
        compiled = torch.compile(ops.packed_attention, fullgraph=True, backend="aot_eager", dynamic=True)
        out = compiled(*tensors, ends_q, ends_k, *lengths, **OPTIONS)
        torch.testing.assert_close(out, packed_attention(*tensors, ends_q, ends_k, *lengths, **OPTIONS))


def test_it_is_no_default():
    """Until a GPU has measured it."""
    (config,) = select("attention", "forward", torch.bfloat16, "sm_90", queries=325, keys=325, head_dim=64)
    assert config["KEEP_BITS"] == 0


def test_in_the_interpreter():
    run_in_interpreter(__file__)
