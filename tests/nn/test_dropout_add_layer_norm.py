"""``nn.DropoutAddLayerNorm`` against dropout, addition and ``torch.nn.LayerNorm``."""

import copy

import pytest
import torch

from op_testing import DEVICE
from sclkern import nn


class Plain(torch.nn.LayerNorm):
    def forward(self, x, residual, x_bias=None):
        return super().forward(residual + x if x_bias is None else residual + x + x_bias)


@pytest.mark.parametrize("biased", [False, True])
def test_computes_what_torch_does(biased, backend, dtype, assert_same):
    shapes = [(2, 3, 8), (2, 3, 8)] + [(8,)] * biased
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    ours, theirs = nn.DropoutAddLayerNorm(8, eps=1e-3, backend=backend), Plain(8, eps=1e-3, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours, theirs, *inputs, dtype=dtype)


def test_drops_only_in_training():
    norm, (x, residual) = nn.DropoutAddLayerNorm(8, dropout=1.0), torch.randn(2, 5, 8)
    plain = Plain(8)
    torch.testing.assert_close(norm(x, residual), plain(torch.zeros_like(x), residual))
    torch.testing.assert_close(norm.eval()(x, residual), plain(x, residual))


def test_ids_key_the_dropout(backend, dtype):
    norm = nn.DropoutAddLayerNorm(8, dropout=0.5, backend=backend, device=DEVICE, dtype=dtype)
    x, residual = torch.randn(2, 6, 4, 8, device=DEVICE, dtype=dtype)
    ids = torch.arange(2**40, 2**40 + 24, device=DEVICE).view(6, 4)
    torch.manual_seed(1)
    whole = norm(x, residual, dropout_ids=ids)
    torch.manual_seed(1)
    torch.testing.assert_close(norm(x[3:], residual[3:], dropout_ids=ids[3:]), whole[3:])


def test_copies_names_and_errors():
    copied = copy.deepcopy(nn.DropoutAddLayerNorm(8, dropout=0.1, backend="eager"))
    assert (copied.dropout, copied.backend) == (0.1, "eager")
    assert "(8,), eps=1e-05, elementwise_affine=True" in repr(copied) and "dropout=0.1" in repr(copied)
    with pytest.raises(ValueError, match=r"dropout: got 1\.5, expected 0 to 1"):
        nn.DropoutAddLayerNorm(8, dropout=1.5)
    with pytest.raises(ValueError, match="normalized_shape: expected one dimension"):
        nn.DropoutAddLayerNorm((2, 8))
