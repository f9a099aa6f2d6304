"""Options of the benchmarks, and their records: one JSON line a case, appended as it is made."""

from __future__ import annotations

import functools
import os
from pathlib import Path

# Before torch is imported, for the reason given in sclkern/cli/__init__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch

from sclkern.tools.bench import records, roofline


def pytest_addoption(parser):
    group = parser.getgroup("sclkern")
    group.addoption(
        "--importance",
        type=int,
        action="append",
        choices=(1, 2, 3),
        help="only benchmarks of this importance, 1 being the first to run; repeatable; default all, in this order",
    )
    group.addoption(
        "--results", type=Path, default=records.RESULTS, help="folder of the records (default: benchmarks/results)"
    )


def pytest_configure(config):
    # As matrix products have it by default: float32 is float32 for whoever convolves, too.
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    config.addinivalue_line("markers", "importance(level): 1 to 3, which of the benchmarks to run first")


def pytest_collection_modifyitems(config, items):
    def importance(item) -> int:
        marker = item.get_closest_marker("importance")
        return marker.args[0] if marker else 1

    levels = config.getoption("importance")
    if levels:
        config.hook.pytest_deselected(items=[item for item in items if importance(item) not in levels])
        items[:] = [item for item in items if importance(item) in levels]
    # Stable: cases that share inputs stay together.
    items.sort(key=importance)


@pytest.fixture(scope="session")
def record(request):
    """record(case, **values): append to ``results/<device>/<date>-<commit>.jsonl``, by ``tools.bench.records``."""
    return functools.partial(records.append, results=request.config.getoption("results"))


@pytest.fixture(scope="session")
def machine(record) -> dict:
    """The machine's own rates (``sclkern.tools.bench.roofline.measure``), measured once a session and recorded."""
    rates = roofline.measure()
    record("roofline", **rates)
    return rates
