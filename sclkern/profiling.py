"""Names for the phases of a training step, for Nsight (NVTX) and torch.profiler, and the time that each phase took.

Off by default: ``phase`` then returns a context that does nothing. ``with ranges():`` turns the names on, for example
around the steps of a script that nsys records; ``sclkern profile`` does so for the pre-training loop.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

# NVTX domain of all ranges.
DOMAIN = "sclkern"
PHASES = (
    "step", "data wait", "draw masks", "image encoder", "text encoder", "fusion", "backward", "gradient norm",
    "optimiser", "communication",
)  # fmt: skip
# Further phases begin with one of these: "fusion layer 0", inside "fusion", "loss mlm", "collective all-gather", and of
# ``mark_modules`` "module encoder.layer.0.attention".
PHASE_PREFIXES = ("fusion layer ", "loss ", "collective ", "module ")
# torch names each collective itself, those of DistributedDataParallel included.
_COLLECTIVES = "c10d::"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# Microseconds that a span may seem to outlast the one around it: a trace rounds start and duration separately.
_ROUNDING = 0.01

_OFF = nullcontext()
_on = False
# What times a wait for other processes.
_waiting: Callable[[], AbstractContextManager[None]] | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """A context that names what runs in it. It does nothing unless ``ranges`` is on, nor while torch compiles.

    Args:
        name: one of ``PHASES``, or a name that begins with one of ``PHASE_PREFIXES``.

    Returns:
        The context.
    """
    if not _on or torch.compiler.is_compiling():
        return _OFF
    return _range(name)


@contextmanager
def collective(name: str) -> Iterator[None]:
    """A context around an exchange with other processes: a phase of its own, which ``time_waiting`` times.

    Args:
        name: of the collective, such as "all-gather".
    """
    with phase(f"collective {name}"), _OFF if _waiting is None else _waiting():
        yield


def time_waiting(timer: Callable[[], AbstractContextManager[None]] | None) -> None:
    """Time every exchange with other processes.

    Args:
        timer: gives a context that is entered around each; None times none.
    """
    global _waiting
    _waiting = timer


@contextmanager
def ranges() -> Iterator[None]:
    """Turn the names on, as ``torch.profiler.record_function`` and, if nvtx is installed, as NVTX ranges."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


class Marks:
    """Ranges around modules.

    Args:
        modules: by name.

    Attributes:
        names: of the modules.
    """

    names: tuple[str, ...]

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self.names = tuple(modules)
        self._handles: list[Any] = []
        for name, module in modules.items():
            self._handles += _mark(name, module)

    def remove(self) -> None:
        """Take the ranges away: modules are as before."""
        for handle in self._handles:
            handle.remove()


def mark_modules(model: torch.nn.Module) -> Marks:
    """Give every module of sclkern in a model, such as those that ``sclkern.fuse`` has put there, a range of its own.

    The ranges are named "module <path>", around the forward, and are seen while ``ranges`` is on. Modules that are not
    marked have no hook, and pay nothing.

    Args:
        model: its modules whose class comes from sclkern, or is derived from one that does.

    Returns:
        The marks, which ``remove`` takes away.
    """

    def ours(module: torch.nn.Module) -> bool:
        return any(kind.__module__.partition(".")[0] == "sclkern" for kind in type(module).__mro__)

    return Marks({name: module for name, module in model.named_modules() if name and ours(module)})


def _mark(name: str, module: torch.nn.Module) -> list[Any]:
    # A module may be called within its own call.
    entered: list[AbstractContextManager[None]] = []

    def enter(*_: Any) -> None:
        entered.append(phase(f"module {name}"))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


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
        ``exclusive``, its seconds outside the phases within it; ``device``, seconds of the device work that was
        launched in it and in no phase within it, None in a trace without a device.

    Raises:
        ValueError: there is no phase in the trace, or two overlap without one containing the other.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    threads: dict[Any, list[tuple[str, float, float]]] = {}
    for event in events:
        if name := _phase_of(event):
            interval = (name, event["ts"], event["ts"] + event["dur"])
            threads.setdefault((event["pid"], event["tid"]), []).append(interval)
    if not threads:
        raise ValueError("trace: got one without phases; were sclkern.profiling.ranges() on while it was taken?")
    # The thread that takes the steps, not that of a loader or of the backward.
    intervals = max(threads.values(), key=lambda of_thread: sum(stop - start for _, start, stop in of_thread))
    spans, edges = _nested(sorted(intervals, key=lambda interval: (interval[1], -interval[2])))
    if work := [event for event in events if event.get("cat") in _DEVICE_WORK]:
        _add_device_seconds(spans, edges, work, events)
    return spans


def _add_device_seconds(
    spans: list[dict[str, Any]],
    edges: Sequence[tuple[float, int | None]],
    work: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
) -> None:
    """Add the seconds of each piece of device work to the innermost span at the time of its launch."""
    for span in spans:
        span["device"] = 0.0
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    times = [time for time, _ in edges]
    for event in work:
        launched = launches.get(event.get("args", {}).get("correlation"))
        # By time and not by thread: autograd launches from another thread, while this one waits in the backward.
        position = bisect.bisect_right(times, launched) - 1 if launched is not None else -1
        if position >= 0 and (innermost := edges[position][1]) is not None:
            spans[innermost]["device"] += event["dur"] / 1e6


def phase_table(spans: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The time of each phase, longest first: on the device if the spans have one, otherwise on the host.

    Args:
        spans: from ``phase_spans``.

    Returns:
        One dict a phase: ``phase``, ``calls``; ``seconds`` on the host, without phases within it, and their ``share``
        of all; likewise ``device_seconds`` and ``device_share``, None without a device. "other" is what a step does
        outside any phase.
    """
    rows: dict[str, dict[str, Any]] = {}
    for span in spans:
        name = "other" if span["phase"] == "step" else span["phase"]
        row = rows.setdefault(name, {"phase": name, "calls": 0, "seconds": 0.0, "device_seconds": None})
        row["calls"] += 1
        row["seconds"] += span["exclusive"]
        if span["device"] is not None:
            row["device_seconds"] = (row["device_seconds"] or 0.0) + span["device"]
    for unit in ("", "device_"):
        total = sum(row[unit + "seconds"] or 0.0 for row in rows.values())
        for row in rows.values():
            row[unit + "share"] = row[unit + "seconds"] / total if total else None
    return sorted(rows.values(), key=lambda row: (row["device_seconds"] or 0.0, row["seconds"]), reverse=True)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table of phases as text.

    Args:
        rows: from ``phase_table``.

    Returns:
        A line a phase; times in milliseconds, of all its calls together.
    """
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
    name: str = event["name"]
    if event.get("cat") == "user_annotation" and (name in PHASES or name.startswith(PHASE_PREFIXES)):
        return name
    return "communication" if event.get("cat") == "cpu_op" and name.startswith(_COLLECTIVES) else None


def _nested(
    intervals: Sequence[tuple[str, float, float]],
) -> tuple[list[dict[str, Any]], list[tuple[float, int | None]]]:
    """Nest the phases of one thread.

    Args:
        intervals: name, start and stop in microseconds, outer ones first.

    Returns:
        The spans as ``phase_spans`` returns them, and for each time at which the innermost span changes (microseconds)
        its index, None outside all.
    """
    spans: list[dict[str, Any]] = []
    edges: list[tuple[float, int | None]] = []
    open_spans: list[tuple[int, float]] = []

    def close(until: float) -> None:
        while open_spans and open_spans[-1][1] <= until:
            _, stop = open_spans.pop()
            edges.append((stop, open_spans[-1][0] if open_spans else None))

    for index, (name, start, stop) in enumerate(intervals):
        close(start)
        if open_spans:
            outer, last = open_spans[-1]
            if stop > last + _ROUNDING:
                raise ValueError(f"trace: phase {name!r} began in {spans[outer]['phase']!r} and ended after it")
            stop = min(stop, last)
            spans[outer]["exclusive"] -= (stop - start) / 1e6
        seconds = (stop - start) / 1e6
        spans.append(
            {"phase": name, "start": start / 1e6, "seconds": seconds, "depth": len(open_spans), "exclusive": seconds}
            | {"device": None}
        )
        open_spans.append((index, stop))
        edges.append((start, index))
    close(float("inf"))
    return spans, edges
