"""Forms of the ops on a CPU against the definitions: the same masks bit for bit, the same numbers in float64."""

from __future__ import annotations

import pytest
import torch

from sclkern import ops
from sclkern.cpu import attention as cpu_attention
from sclkern.cpu import dropout, dropout_add
from sclkern.cpu.gelu import quick_gelu
from sclkern.reference.attention import attention_dropout_mask
from sclkern.reference.dropout_add_layer_norm import feature_dropout_keep

SEEDS = (5, -3, 0x123456789ABCDEF0)
IDS = {
    "indices": torch.arange(7),
    "one": torch.tensor([9]),
    "above 32 bits": torch.tensor([3, 2**40 + 1, 2**32, 0]),
    "negative": torch.tensor([-1, -(2**61), 5]),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(dropout, "PIECE", 12)
    monkeypatch.setattr(cpu_attention, "PIECE", 40)
    monkeypatch.setattr(dropout_add, "ROWS", 2)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def results(call, tensors):
    """What a call returns and its gradients."""
    out = call(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    total = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs)
    return *(o.detach() for o in outs), *torch.autograd.grad(total, tensors)


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_those_of_the_definition(seed, ids):
    for columns in (1, 8, 13, 33):
        pieces = dropout.feature_pieces(ids, columns, 0.1, seed)
        found = torch.cat([draws >= threshold for _, draws, threshold in pieces])
        assert torch.equal(found, feature_dropout_keep(ids, columns, 0.1, torch.tensor([seed])))
    for queries, keys in ((1, 1), (3, 13), (9, 8)):
        expected = attention_dropout_mask(ids, 3, queries, keys, dropout_p=0.3, seed=seed)
        by_head = (ids[:, None] * 3 + torch.arange(3)).flatten()
        draws = dropout.attention_draws(by_head, dropout.attention_counters(queries, keys), queries, keys, seed)
        assert torch.equal(draws >= round(0.3 * 2**16) + dropout.LOWEST, expected.flatten(0, 1))


LENGTHS = {
    "in order": [(3, 4), (3, 4), (5, 2)],
    "mixed": [(3, 4), (5, 2), (3, 4)],
    "empty": [(3, 0), (2, 5), (0, 3)],
    "one": [(6, 7)],
}


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_attention(lengths, dropout_p, tail):
    sides = [[0, *side] for side in zip(*lengths, strict=True)]
    packing = [torch.tensor(side).cumsum(0).int() for side in sides]
    query, joint = leaves((sum(sides[0]) + tail, 3, 8), (sum(sides[1]) + tail, 2 * 3 * 8))
    given = {"dropout_p": dropout_p, "softmax_scale": 0.3, "seed": 7}

    for ids in (None, torch.tensor([5, 2**40 + 3, 9])[: len(lengths)]):

        def call(query, joint, backend, ids=ids):
            key, value = joint.unflatten(-1, (2, 3, 8)).unbind(-3)
            options = {**given, "dropout_ids": ids, "backend": backend}
            return ops.packed_attention(query, key, value, *packing, *map(max, sides), **options)

        found, expected = (results(lambda *t, name=name: call(*t, name), (query, joint)) for name in ("auto", "eager"))
        close(found, expected)


def test_attention_of_one_projection():
    """Its gradients lie in one tensor."""
    (projected,) = leaves((2, 5, 3 * 3 * 8))

    def call(projected, backend):
        query, key, value = projected.unflatten(-1, (3, 3, 8)).unbind(-3)
        return ops.attention(query, key, value, dropout_p=0.2, seed=3, backend=backend)

    close(*(results(lambda t, name=name: call(t, name), (projected,)) for name in ("auto", "eager")))


@pytest.mark.parametrize("returned", [{}, {"return_sum": True}, {"return_copy": True}], ids=str)
@pytest.mark.parametrize("ids", [None, torch.tensor([[4, 2**50, 1], [0, 7, 2**33]])], ids=["indices", "ids"])
def test_dropout_add_layer_norm(returned, ids):
    tensors = leaves((2, 3, 13), (2, 3, 13), (13,), (13,), (13,))

    def call(x, residual, weight, bias, x_bias, backend):
        options = {"x_bias": x_bias, "dropout_p": 0.3, "seed": 5, "dropout_ids": ids, "backend": backend}
        return ops.dropout_add_layer_norm(x, residual, weight, bias, **options, **returned)

    close(*(results(lambda *t, name=name: call(*t, name), tensors) for name in ("auto", "eager")))


@pytest.mark.parametrize("ids", [None, torch.tensor([2**40, 3])], ids=["indices", "ids"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["keys", "queries"])
def test_absorbed_cross_attention(form, masked, ids):
    width = 24
    tensors = leaves((2, 5, width), (2, 4, width), (3 * width, width), (3 * width,), (width, width), (width,))
    mask = torch.tensor([[True, True, False, True], [False] * 4]) if masked else None

    def call(*tensors, backend):
        options = {"dropout_p": 0.3, "seed": 5, "dropout_ids": ids, "backend": backend, "absorb": form}
        return ops.cross_attention(*tensors, num_heads=3, key_padding_mask=mask, **options)

    close(*(results(lambda *t, name=name: call(*t, backend=name), tensors) for name in ("auto", "eager")))


def test_quick_gelu():
    (x,) = leaves((3, 5))
    close(results(quick_gelu, (x,)), results(lambda x: x * torch.sigmoid(1.702 * x), (x,)))


def test_without_a_seed_the_mask_follows_torch_and_is_drawn_anew():
    x = torch.randn(2, 64)

    def call():
        return ops.dropout_add_layer_norm(x, torch.zeros_like(x), x[0], x[1], dropout_p=0.5, return_sum=True)[1]

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    assert not torch.equal(first == 0, second == 0)


def test_transforms_and_full_dropout_take_the_definition():
    x = torch.randn(2, 8, dtype=torch.float64)

    def total(x, p=0.5):
        return ops.dropout_add_layer_norm(x, x, x[0], x[1], dropout_p=p, seed=1).sum()

    leaf = x.clone().requires_grad_()
    close([torch.func.grad(total)(x)], torch.autograd.grad(total(leaf), leaf))
    assert "everything is dropped" in str(ops.explain("dropout_add_layer_norm", x, x, x[0], x[1], dropout_p=1.0))
    assert torch.equal(ops.dropout_add_layer_norm(x, x, x[0], x[1], dropout_p=1.0, seed=1, return_sum=True)[1], x)
