"""Attention on padded and on packed tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sclkern.models.attention import Attention
from sclkern.models.layouts import DropoutKeys, Packed, Padded


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_attention_equals_torchs_multi_head_attention(torch_attention, backend, padded, cross):
    module = Attention(128).double()
    nn.init.normal_(module.in_proj.bias)
    module.execution.backend = backend
    x, context = torch.randn(2, 5, 128, dtype=torch.float64), torch.randn(2, 5, 128, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False, True], [True] * 5]) if padded else None
    out = module(x, Padded(), context, Padded(mask)) if cross else module(x, Padded(mask))
    torch.testing.assert_close(out, torch_attention(module, x, context if cross else x, mask))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(325, 13), (13, 325)])
def test_one_packed_call_where_absorbing_takes_many_launches(queries, keys, training, kernels, monkeypatch):
    if kernels:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # nothing is launched
    module = Attention(768, dropout=0.1).train(training)
    query_layout, key_layout = (
        Packed(torch.tensor([0, length], dtype=torch.int32), length) for length in (queries, keys)
    )
    few = keys < queries or not (training and kernels)
    for absorb, expected in {"auto": few, "all": True, "never": False}.items():
        module.execution.absorb = absorb
        assert module._absorbs(torch.empty(1, 768), query_layout, key_layout) == expected


def test_a_context_needs_its_layout():
    with pytest.raises(ValueError, match="context_layout: got None for a context"):
        Attention(64)(torch.randn(1, 3, 64), Padded(), torch.randn(1, 2, 64))


def test_attention_that_is_recorded_drops_by_the_same_keys():
    module = Attention(128, dropout=0.3).double().train()
    x, mask = torch.randn(2, 5, 128, dtype=torch.float64), torch.tensor([[True] * 5, [True, True, True, False, False]])
    keys = DropoutKeys(torch.tensor([70, 3]), torch.arange(10).view(2, 5), (torch.tensor([8]),))
    maps: list[torch.Tensor] = []
    first = module(x, Padded(mask, keys=keys))
    torch.testing.assert_close(module(x, Padded(mask, keys=keys), probabilities=maps)[mask], first[mask])
    assert maps[0].shape == (2, 2, 5, 5)
    swapped = keys._replace(sequences=keys.sequences.flip(0))
    back = module(x.flip(0), Padded(mask.flip(0), keys=swapped)).flip(0)
    torch.testing.assert_close(back[mask], first[mask])
    assert not torch.allclose(module(x, Padded(mask))[mask], first[mask])
