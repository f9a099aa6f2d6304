"""Contrastive losses beside those of open_clip, sentence-transformers, Inf-CL and torch.compile, of 64 channels.

Forward and backward of the loss alone. ``test_time`` times what it has compared with float64 in the same process.
``test_memory`` records the peak beside the features over N: measured while it fits, and beyond that what the code
allocates under FakeTensorMode. Both are recorded where both are quick, and must agree.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks.harness.contrasts import (
    CONTRASTS,
    WIDTH,
    Contrast,
    check,
    countable,
    empty_features,
    exact_gradients,
    fits,
    gradients,
    make_features,
    make_scale,
    prepared,
)
from benchmarks.harness.implementations import UnsupportedError
from benchmarks.harness.live_bytes import computed_peak, measured_peak
from benchmarks.harness.verification import GPU, MAX_CHECKED_ROWS

ROWS = (1024, 4096, 16384, 65536)
TIMED_ROWS = ROWS if GPU else ROWS[:2]
DTYPES = (torch.bfloat16, torch.float32) if GPU else (torch.float32,)
ROUNDS = 20 if GPU else 5
# On a CPU the rows up to which memory is also computed, and at which it must agree with what was measured.
COMPARED_ROWS = 4096
# Above these rows a CPU's profile of thousands of equal rounds takes more memory than there is: computed there.
PROFILED_ROUNDS = 16384


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if GPU else 1)
    yield
    torch.set_num_threads(threads)


def seconds_of(call) -> float:
    """Of a GPU; of this thread on a CPU, whatever else runs there."""
    if not GPU:
        begin = time.thread_time()
        call()
        return time.thread_time() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@pytest.mark.priority(2)
@pytest.mark.parametrize("kind", CONTRASTS)
@pytest.mark.parametrize("rows", TIMED_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_time(kind, rows, dtype, benchmark, record):
    scale, calls, worst = make_scale(kind), {}, {}
    small = make_features(kind, min(rows, MAX_CHECKED_ROWS), dtype)
    features = make_features(kind, rows, dtype) if rows > MAX_CHECKED_ROWS else small
    exact = exact_gradients(kind, small, scale)
    for contrast in CONTRASTS[kind]:
        try:
            ready = prepared(contrast)
            worst[contrast.name] = check(kind, contrast, gradients(ready, small, scale), exact)
        except UnsupportedError as error:
            print(error)
            continue
        if fits(contrast, kind, rows):
            calls[contrast.name] = lambda ready=ready: gradients(ready, features, scale)
            calls[contrast.name]()
    assert "sclkern" in calls
    # In turns, so that other load falls on all.
    rounds: list[dict[str, float]] = []
    benchmark.pedantic(lambda: rounds.append({name: seconds_of(call) for name, call in calls.items()}), rounds=ROUNDS)
    for name in calls:
        seconds = sorted(times[name] for times in rounds)
        record(
            f"contrast/{kind}/{rows}/{str(dtype).removeprefix('torch.')}/{name}",
            kind=kind, way=name, rows=rows, width=WIDTH, dtype=str(dtype).removeprefix("torch."), seconds=seconds,
            median_seconds=statistics.median(seconds), error=worst[name],
            checked_rows=len(small[0]), device_time=GPU,
        )  # fmt: skip


def _memory_cases() -> list:
    return [
        pytest.param(kind, rows, contrast, id=f"{kind}-{rows}-{contrast.name.replace(', ', '-')}")
        for kind in ("clip", "ranking")
        for rows in ROWS
        for contrast in CONTRASTS[kind]
    ]


def peaks(kind: str, rows: int, contrast: Contrast) -> dict[str, int]:
    """The peak in bytes, "measured" and "computed", as far as each exists."""
    scale, found = make_scale(kind), {}
    ready = prepared(contrast)
    in_rounds = contrast.repeating != float("inf")
    if fits(contrast, kind, rows) and (GPU or not in_rounds or rows <= PROFILED_ROUNDS):
        features = make_features(kind, rows)
        if contrast.compiled:
            # Not the memory of the compiler.
            gradients(ready, features, scale)
        found["measured"] = measured_peak(lambda: gradients(ready, features, scale))
    if countable(contrast) and (rows <= COMPARED_ROWS or "measured" not in found):
        found["computed"] = computed_peak(
            lambda: (empty_features(kind, rows), make_scale(kind)),
            lambda inputs: gradients(contrast, *inputs),
            contrast.repeating,
        )
    return found


@pytest.mark.priority(2)
@pytest.mark.parametrize(("kind", "rows", "contrast"), _memory_cases())
def test_memory(kind, rows, contrast, benchmark, record):
    found: dict[str, int] = {}
    try:
        # Once, and so that --benchmark-only takes it.
        benchmark.pedantic(lambda: found.update(peaks(kind, rows, contrast)), rounds=1)
    except UnsupportedError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip(f"{contrast.name}: does not fit, and runs code that no operator shows")
    if len(found) == 2:
        assert found["computed"] == pytest.approx(found["measured"], rel=0.02), found
    for source, peak in found.items():
        if source == "measured" or len(found) == 1:
            record(
                f"contrast_memory/{kind}/{rows}/{contrast.name}",
                kind=kind, way=contrast.name, rows=rows, width=WIDTH, dtype="float32", source=source, peak_bytes=peak,
                **({"computed_bytes": found["computed"]} if len(found) == 2 else {}),
            )  # fmt: skip
