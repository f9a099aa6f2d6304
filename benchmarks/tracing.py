"""What a profiler sees of one call: its peak of memory on a CPU, its phases."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from sclkern.profiling import phase, phase_spans, phase_table, ranges


def trace(call: Callable[[], object]) -> dict:
    """The Chrome trace of one call, with phases, allocations on a CPU, and the work of a GPU where there is one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    recorder = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
    with recorder, ranges(), phase("step"):
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(file))
        return json.loads(file.read_text())


def peak_bytes(found: dict) -> int:
    """What a traced call had allocated on the CPU at its peak, beside what was there before it."""
    events = [event for event in found["traceEvents"] if event.get("name") == "[memory]"]
    events = sorted((e for e in events if e["args"]["Device Type"] == 0), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0))


def shares(found: dict) -> dict[str, float]:
    """The share of each phase in a traced call: of the device's time where it has one, else of the host's."""
    rows = phase_table(phase_spans(found))
    return {row["phase"]: row["share"] if row["device_share"] is None else row["device_share"] for row in rows}


def device_counts(found: dict) -> dict[str, int]:
    """``launches``, the calls of the host that put work on the device, and ``kernels``, what ran there, copies too: a
    graph is one launch of many kernels."""
    events = [event for event in found["traceEvents"] if event.get("ph") == "X"]
    host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    started = [event for event in host if any(word in event["name"] for word in ("Launch", "Memcpy", "Memset"))]
    return {"launches": len(started), "kernels": len(device)}
