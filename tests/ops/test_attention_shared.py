"""Gradients of a packed projection: query, key and value that lie in one tensor get theirs in one tensor."""

import pytest
import torch

from op_testing import DEVICE, needs_kernels, run_in_interpreter
from sclkern.kernels.attention_gradients import neighbours
from sclkern.models.attention import split
from sclkern.ops import attention, packed_attention

WIDTH = 64


def packed(query, key, value, **options):
    ends = torch.tensor([0, 5, 5, 40], dtype=torch.int32, device=DEVICE)
    return packed_attention(query, key, value, ends, ends, 35, 35, **options)


def project(shape, parts):
    """Heads of a projection, and the projection."""
    torch.manual_seed(0)
    x = torch.randn(*shape, parts * 2 * WIDTH, device=DEVICE, requires_grad=True)
    return x, split(x, parts)


@needs_kernels
@pytest.mark.parametrize("own_queries", [False, True])
@pytest.mark.parametrize(("function", "shape"), [(packed, (43,)), (attention, (2, 21)), (attention, (1, 140))])
def test_numbers_are_those_of_separate_tensors_and_nothing_is_copied(function, shape, own_queries):
    options = {"dropout_p": 0.2, "seed": 3, "backend": "triton"}
    query = torch.randn(*shape, 2, WIDTH, device=DEVICE, requires_grad=True)
    x, parts = project(shape, 2 if own_queries else 3)
    tensors = (query, *parts) if own_queries else parts
    apart = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    given = []
    for part in parts:
        part.register_hook(given.append)
    out, other = function(*tensors, **options), function(*apart, **options)
    assert torch.equal(out, other)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, query][: 1 + own_queries], grad)
    expected = torch.autograd.grad(other, apart, grad)
    assert torch.equal(found[0].unflatten(-1, (len(parts), 2, WIDTH)), torch.stack(expected[-len(parts) :], -3))
    assert not own_queries or torch.equal(found[1], expected[0])
    assert neighbours(*sorted(given, key=torch.Tensor.storage_offset))
    assert found[0].untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr()


def test_gradients_that_lie_elsewhere_are_gathered():
    x, parts = project((7,), 3)
    grads = [torch.randn_like(part) for part in parts]
    (found,) = torch.autograd.grad(parts, x, grads)
    assert torch.equal(found, torch.cat([grad.flatten(1) for grad in grads], 1))
    (x, parts), whole = project((2, 3), 2), torch.randn(2, 3, 2, 2, WIDTH, device=DEVICE)
    (found,) = torch.autograd.grad(parts, x, list(whole.unbind(-3)))
    assert torch.equal(found, whole.flatten(2)) and found.data_ptr() == whole.data_ptr()
    # In another order, or with another tensor between.
    x, parts = project((2, 3), 2)
    (found,) = torch.autograd.grad(parts, x, list(whole.unbind(-3))[::-1])
    assert torch.equal(found, whole.flip(2).flatten(2))


def test_a_part_that_nothing_reads_has_a_gradient_of_zeros():
    x, (_, key, _) = project((4,), 3)
    (found,) = torch.autograd.grad(key.sum(), x)
    assert torch.equal(found.view(4, 3, -1)[:, 1], torch.ones(4, 2 * WIDTH, device=DEVICE)) and found.sum() == 4 * 128


def test_functional_transforms():
    x = torch.randn(2, 4, 3 * WIDTH, device=DEVICE)
    grad = torch.func.vmap(torch.func.grad(lambda x: split(x, 3)[1].sum()))(x)
    assert (
        torch.equal(grad.view(2, 4, 3, WIDTH)[:, :, 1], torch.ones(2, 4, WIDTH, device=DEVICE))
        and grad.sum() == 8 * WIDTH
    )


def test_neighbours():
    whole = torch.empty(5, 3, 2, 8)
    query, key, value = whole.unbind(1)
    assert neighbours(query, key, value)
    assert not neighbours(key, value) and not neighbours(key, query, value)
    assert not neighbours(query, key, value.clone()) and not neighbours(query[:4], key, value)
    padded = torch.empty(2, 5, 2, 4, 8).unbind(2)
    assert neighbours(*padded)
    assert not neighbours(*(part[:, :3] for part in padded))


def test_in_the_interpreter():
    run_in_interpreter(__file__)
