"""What the tests of ops need on every run."""

import pytest
import torch

import cpu_kernels
from op_testing import KERNELS_RUN

cpu_kernels.install()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialised memory is NaN where kernels run, so that an element nobody wrote is seen."""
    if not KERNELS_RUN:
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


def _poison(allocate):
    def poison(*args, **options):
        tensor = allocate(*args, **options)
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)
        return tensor

    return poison
