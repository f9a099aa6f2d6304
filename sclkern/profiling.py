"""Names for the phases of a training step, for Nsight (NVTX) and torch.profiler, and the time each of them took.

Off by default: ``phase`` then returns a context that does nothing. ``with ranges():`` turns the names on, for instance
around the steps of a script of one's own that nsys records; ``sclkern profile`` does so for the pre-training loop.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

# NVTX's name for whose ranges they are.
DOMAIN = "sclkern"
# Beside these there is "fusion layer 0" and so on, inside of "fusion".
PHASES = (
    "step", "data wait", "draw masks", "image encoder", "text encoder", "fusion", "loss itc", "loss itm", "loss mlm",
    "loss mvsc", "loss mlsc", "loss mltc", "backward", "gradient norm", "optimiser", "communication",
)  # fmt: skip
# torch names each collective itself, those of DistributedDataParallel included.
_COLLECTIVES = "c10d::"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# Microseconds that a span may seem to outlast the one around it: start and duration are rounded apart in a trace.
_ROUNDING = 0.01

_OFF = nullcontext()
_on = False


def phase(name: str) -> AbstractContextManager:
    """A context that names what runs in it; nothing at all unless ``ranges`` is on, nor where torch compiles."""
    if not _on or torch.compiler.is_compiling():
        return _OFF
    return _range(name)


@contextmanager
def ranges() -> Iterator[None]:
    """Turn the names on: NVTX ranges of the domain "sclkern" where the package nvtx is installed, and
    ``torch.profiler.record_function``."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


@contextmanager
def _range(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            import nvtx
        except ImportError:
            pass
        else:
            stack.enter_context(nvtx.annotate(name, domain=DOMAIN))
        stack.enter_context(torch.profiler.record_function(name))
        yield


def phase_spans(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The phases in a Chrome trace of torch.profiler, in order of their start.

    Args:
        trace: the JSON that ``torch.profiler.profile.export_chrome_trace`` wrote.

    Returns:
        One dict for each time a phase ran: ``phase``; ``start`` and ``seconds``; ``depth``, 0 for the outermost;
        ``own``, its seconds outside of the phases within it; ``device``, seconds of the device's work that was
        launched in it and in no phase within it, None in a trace without a device.

    Raises:
        ValueError: there is no phase in the trace, or two overlap without one holding the other.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    threads: dict[Any, list[tuple[str, float, float]]] = {}
    for event in events:
        if name := _phase_of(event):
            span = (name, event["ts"], event["ts"] + event["dur"])
            threads.setdefault((event["pid"], event["tid"]), []).append(span)
    if not threads:
        raise ValueError("trace: got one without phases; were sclkern.profiling.ranges() on while it was taken?")
    # The step's own thread, not that of a loader or of the backward.
    spans = max(threads.values(), key=lambda found: sum(stop - start for _, start, stop in found))
    found, edges = _nested(sorted(spans, key=lambda span: (span[1], -span[2])))
    if work := [event for event in events if event.get("cat") in _DEVICE_WORK]:
        for span in found:
            span["device"] = 0.0
        launches = {
            event["args"]["correlation"]: event["ts"]
            for event in events
            if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
        }
        times = [time for time, _ in edges]
        for event in work:
            launched = launches.get(event.get("args", {}).get("correlation"))
            # By time and not by thread: autograd launches from another one, while this one waits in the backward.
            place = bisect.bisect_right(times, launched) - 1 if launched is not None else -1
            if place >= 0 and (inside := edges[place][1]) is not None:
                found[inside]["device"] += event["dur"] / 1e6
    return found


def phase_table(spans: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The time of each phase, longest first: on the device if the spans have one, else on the host.

    Args:
        spans: from ``phase_spans``.

    Returns:
        One dict a phase: ``phase``, ``calls``; ``seconds`` on the host, without phases within it, and their ``share``
        of all; likewise ``device_seconds`` and ``device_share``, None without a device. What a step does outside of
        any phase is "other".
    """
    rows: dict[str, dict[str, Any]] = {}
    for span in spans:
        name = "other" if span["phase"] == "step" else span["phase"]
        row = rows.setdefault(name, {"phase": name, "calls": 0, "seconds": 0.0, "device_seconds": None})
        row["calls"] += 1
        row["seconds"] += span["own"]
        if span["device"] is not None:
            row["device_seconds"] = (row["device_seconds"] or 0.0) + span["device"]
    for unit in ("", "device_"):
        total = sum(row[unit + "seconds"] or 0.0 for row in rows.values())
        for row in rows.values():
            row[unit + "share"] = row[unit + "seconds"] / total if total else None
    return sorted(rows.values(), key=lambda row: (row["device_seconds"] or 0.0, row["seconds"]), reverse=True)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``phase_table`` as text; times in milliseconds, of all calls together."""
    on_device = rows[0]["device_seconds"] is not None
    columns = [("calls", "d", 1), ("seconds", ".1f", 1e3), ("share", ".1f", 100)]
    heads = ["phase", "calls", "host ms", "%"]
    if on_device:
        columns += [("device_seconds", ".1f", 1e3), ("device_share", ".1f", 100)]
        heads += ["device ms", "%"]
    lines = [heads]
    for row in rows:
        cells = ["-" if row[key] is None else format(row[key] * factor, kind) for key, kind, factor in columns]
        lines.append([row["phase"], *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _phase_of(event: Mapping[str, Any]) -> str | None:
    name = event["name"]
    if event.get("cat") == "user_annotation" and (name in PHASES or name.startswith("fusion layer ")):
        return name
    return "communication" if event.get("cat") == "cpu_op" and name.startswith(_COLLECTIVES) else None


def _nested(
    spans: Sequence[tuple[str, float, float]],
) -> tuple[list[dict[str, Any]], list[tuple[float, int | None]]]:
    """Spans in microseconds, outer ones first, as ``phase_spans`` returns them; and from when on which is innermost."""
    found: list[dict[str, Any]] = []
    edges: list[tuple[float, int | None]] = []
    open_spans: list[tuple[int, float]] = []

    def close(until: float) -> None:
        while open_spans and open_spans[-1][1] <= until:
            _, stop = open_spans.pop()
            edges.append((stop, open_spans[-1][0] if open_spans else None))

    for index, (name, start, stop) in enumerate(spans):
        close(start)
        if open_spans:
            outer, last = open_spans[-1]
            if stop > last + _ROUNDING:
                raise ValueError(f"trace: phase {name!r} began in {found[outer]['phase']!r} and ended after it")
            stop = min(stop, last)
            found[outer]["own"] -= (stop - start) / 1e6
        seconds = (stop - start) / 1e6
        found.append(
            {"phase": name, "start": start / 1e6, "seconds": seconds, "depth": len(open_spans), "own": seconds}
            | {"device": None}
        )
        open_spans.append((index, stop))
        edges.append((start, index))
    close(float("inf"))
    return found, edges
