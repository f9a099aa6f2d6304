"""``nn.LinearGELU`` against a linear layer and a GELU."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sclkern import nn, reference


class Plain(torch.nn.Linear):
    approximate = "none"

    def forward(self, x):
        hidden = F.linear(x, self.weight)
        bias = hidden.new_zeros(self.out_features) if self.bias is None else self.bias
        return reference.bias_gelu(hidden, bias, approximate=self.approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_torch_does(bias, approximate, backend, dtype, assert_same):
    # Without a bias there is nothing to fuse, and torch's own GELU serves.
    ours = nn.LinearGELU(8, 12, bias=bias, approximate=approximate, backend=backend)
    theirs = Plain(8, 12, bias=bias, dtype=torch.float64)
    theirs.approximate = approximate
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours, theirs, torch.randn(2, 3, 8, dtype=torch.float64).requires_grad_(), dtype=dtype)


def test_copies_names_and_errors():
    copied = copy.deepcopy(nn.LinearGELU(8, 12, approximate="quick", backend="eager"))
    assert (copied.approximate, copied.backend) == ("quick", "eager")
    assert "in_features=8, out_features=12, bias=True, approximate='quick'" in repr(copied)
    with pytest.raises(ValueError, match="approximate: got 'erf', expected one of none, tanh, quick"):
        nn.LinearGELU(8, 12, approximate="erf")
