"""What a profiler records of one call: its peak of memory on a CPU, its phases, its launches."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from sclkern.profiling import phase, phase_spans, phase_table, ranges


def record_trace(call: Callable[[], object]) -> dict:
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


def peak_bytes(trace: dict) -> int:
    """Bytes that a traced call had allocated on the CPU at its peak."""
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    events = sorted((e for e in events if e["args"]["Device Type"] == 0), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0))


def shares(trace: dict) -> dict[str, float]:
    """Each phase's share of a traced call: of the device time where there is one, otherwise of the host time."""
    rows = phase_table(phase_spans(trace))
    return {row["phase"]: row["share"] if row["device_share"] is None else row["device_share"] for row in rows}


def device_counts(trace: dict) -> dict[str, int]:
    """``launches``, host calls that put work on the device, and ``kernels``, what ran there, copies included.

    A CUDA graph is one launch of many kernels.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    started = [event for event in host if any(word in event["name"] for word in ("Launch", "Memcpy", "Memset"))]
    return {"launches": len(started), "kernels": len(device)}
