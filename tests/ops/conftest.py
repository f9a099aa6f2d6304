"""What the tests of ops need on every run."""

import pytest
import torch

import cpu_kernels
from op_testing import KERNELS_RUN
from sanitizer.memory import poison

cpu_kernels.install()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, or far too much, where kernels run, so that an element nobody wrote is seen."""
    if not KERNELS_RUN:
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


def _poison(allocate):
    def poisoned_memory(*args, **options):
        return poison(allocate(*args, **options))

    return poisoned_memory
