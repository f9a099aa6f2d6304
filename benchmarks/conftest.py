"""Options of the benchmarks, and their records: one JSON line a case, appended as it is made."""

from __future__ import annotations

import functools
import os
from pathlib import Path

# Set before torch is imported, for the reason given in sclkern/cli/__init__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch

from sclkern.tools.bench import records, roofline


def pytest_addoption(parser):
    group = parser.getgroup("sclkern")
    group.addoption(
        "--priority",
        "--importance",
        dest="priority",
        type=int,
        action="append",
        choices=(1, 2, 3),
        help="only benchmarks of this priority, 1 first; repeatable; default: all, in this order",
    )
    group.addoption(
        "--results", type=Path, default=records.RESULTS, help="folder of the records (default: benchmarks/results)"
    )


def pytest_configure(config):
    # Float32 convolutions compute in float32, as matrix products do by default. By both interfaces, and for every
    # operation of cuDNN: otherwise torch refuses to say what ``allow_tf32`` is.
    torch.backends.cudnn.allow_tf32 = False
    for operation in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        operation.fp32_precision = "ieee"
    config.addinivalue_line("markers", "priority(level): 1 to 3, which benchmarks run first")


def pytest_collection_modifyitems(config, items):
    def priority(item) -> int:
        marker = item.get_closest_marker("priority")
        return marker.args[0] if marker else 1

    levels = config.getoption("priority")
    if levels:
        config.hook.pytest_deselected(items=[item for item in items if priority(item) not in levels])
        items[:] = [item for item in items if priority(item) in levels]
    # Stable: cases that share inputs stay together.
    items.sort(key=priority)


@pytest.fixture(scope="session")
def record(request):
    """record(case, **values): append to ``results/<device>/<date>-<commit>.jsonl``, by ``tools.bench.records``."""
    return functools.partial(records.append, results=request.config.getoption("results"))


@pytest.fixture(scope="session")
def rates(record) -> dict:
    """The rates of this machine (``sclkern.tools.bench.roofline.measure``), measured and recorded once a session."""
    rates = roofline.measure()
    record("roofline", **rates)
    return rates
