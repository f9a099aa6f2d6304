"""What the tests of the network share."""

from __future__ import annotations

import pytest
from torch import nn


def attend(module, x, context, mask):
    twin = nn.MultiheadAttention(x.shape[-1], x.shape[-1] // 64, batch_first=True, dtype=x.dtype)
    twin.in_proj_weight, twin.in_proj_bias = module.in_proj.weight, module.in_proj.bias
    twin.out_proj.weight, twin.out_proj.bias = module.out_proj.weight, module.out_proj.bias
    return twin(x, context, context, key_padding_mask=None if mask is None else ~mask, need_weights=False)[0]


@pytest.fixture(scope="session")
def torch_attention():
    """(module, x, context, mask) -> torch's multi-head attention with the weights of our module."""
    return attend
