"""The comparison of two state dicts."""

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_states_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
