"""Memory of a GPU that holds NaN wherever it is not written."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Every block that torch's allocator hands out next was NaN, however it is asked for."""
    torch.cuda.empty_cache()
    # Requests of up to 1 MiB are served from other blocks than larger ones; a freed block is split for what fits in it.
    held = [torch.full((2**17,), torch.nan, device="cuda") for _ in range(128)]
    held += [torch.full((2**28,), torch.nan, device="cuda") for _ in range(4)]
    del held


@pytest.fixture(autouse=True)
def free_memory():
    """Give back what a test held, so that the next one, and other processes on the device, find room."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
