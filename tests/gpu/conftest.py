"""Memory of a GPU that holds NaN wherever it is not written."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Fills every block that torch's allocator hands out next with NaN, whatever its size."""
    torch.cuda.empty_cache()
    # Requests of up to 1 MiB are served from other blocks than larger ones; a freed block is split for what fits in it.
    # The smallest first: they fill what is left around tensors that live on, which would be handed out before the rest.
    counts = {2**7: 4096, 2**10: 1024, 2**13: 256, 2**17: 128, 2**28: 4}
    free = torch.cuda.mem_get_info()[0]
    counts = {size: count for size, count in counts.items() if 4 * size * count < free}
    held = [torch.full((size,), torch.nan, device="cuda") for size, count in counts.items() for _ in range(count)]
    del held


@pytest.fixture(autouse=True)
def free_memory():
    """Give back what a test held, so that the next one, and other processes on the device, find room."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
