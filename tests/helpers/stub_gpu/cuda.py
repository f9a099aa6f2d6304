"""``torch.cuda`` of an H200 that is always idle."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stub_gpu import NAME
from stub_gpu.redirect import GPU, Generator, Redirect

PROPERTIES = SimpleNamespace(
    name=NAME,
    major=9,
    minor=0,
    total_memory=150_754_820_096,
    multi_processor_count=132,
    warp_size=32,
    L2_cache_size=62_914_560,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048,
    shared_memory_per_block_optin=232_448,
    is_integrated=0,
)
# Operations for which a GPU waits, so that no graph can be captured.
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


class Stream:
    device_index, device_type, cuda_stream = 0, 1, 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = GPU

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def is_capturing(self) -> bool:
        return bool(captures)

    def synchronize(self) -> None:
        _require_no_capture("cudaStreamSynchronize")

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False, **options: Any) -> None:
        self.timed, self.at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        _require_no_capture("cudaEventSynchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        assert self.timed and end.timed and self.at is not None and end.at is not None
        return max(1e3 * (end.at - self.at), 1e-3)


_streams = [Stream()]
_sync_mode = [0]
# Of graphs that are captured.
captures: list[Any] = []


class _Recorder(TorchDispatchMode):
    """Notes every operation with its results, which are there already when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        # Tensors that were written to, and what they were before: what is captured does not run.
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema
        if schema.name.partition("::")[2].rstrip("_") in _READS or _indexes_by_bool(function, args):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({function})")
        written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
        for is_written, value in zip(written, args, strict=False):
            self.before += [(tensor, tensor.clone()) for tensor in _tensors(value) if is_written]
        with Redirect():
            result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.partition("::")[2] in _READS or _indexes_by_bool(function, args):
            raise RuntimeError(f"called a synchronizing CUDA operation ({function})")
        with Redirect():
            return function(*args, **(kwargs or {}))


def _indexes_by_bool(function: Any, args: tuple) -> bool:
    if function._schema.name != "aten::index" or len(args) < 2:
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list | None = None

    @torch.no_grad()
    def replay(self) -> None:
        assert self.calls is not None, "replayed before it was captured"
        for function, args, kwargs, held in self.calls:
            found = function(*args, **kwargs)
            for old, new in zip(_tensors(held), _tensors(found), strict=True):
                if old is not new and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)

    def reset(self) -> None:
        self.calls = None

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, tuple | list) else []


@contextmanager
def _graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"):
    recorder = _Recorder()
    captures.append(recorder)
    _streams.append(stream or Stream())
    with recorder:
        yield
    # As on a GPU: after an exception both stay as they are.
    _streams.pop()
    captures.remove(recorder)
    cuda_graph.calls = recorder.calls
    with torch.no_grad():
        for tensor, value in reversed(recorder.before):
            tensor.copy_(value)


def _end_capture(device: int, pool: Any) -> None:
    """What closes an allocator's recording after a capture that failed."""
    if not captures:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    captures.pop()


def _require_no_capture(call: str) -> None:
    if captures:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({call})")


@contextmanager
def _stream(stream: Stream | None):
    _streams.append(stream or _streams[-1])
    try:
        yield
    finally:
        _streams.pop()


def _set_stream(stream: Stream) -> None:
    _streams[:] = [_streams[0], stream]


_waits: list[_NoReads] = []


def _set_sync_mode(mode: Any) -> None:
    mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
    if mode == 2 and not _waits:
        _waits.append(_NoReads())
        _waits[0].__enter__()
    elif mode != 2 and _waits:
        _waits.pop().__exit__(None, None, None)
    _sync_mode[0] = mode


class _Nothing:
    """A context, and a function of anything."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *of: object) -> None:
        pass


class Profile(torch.profiler.profile):
    """Records the CPU, and makes a launch and a kernel of each operation."""

    def __init__(self, *, activities: Any = None, **options: Any) -> None:
        self.of_gpu = activities is None or torch.profiler.ProfilerActivity.CUDA in activities
        super().__init__(activities=[torch.profiler.ProfilerActivity.CPU], **options)

    def events(self):
        events = list(super().events())
        kernels = [event for event in events if event.name.startswith("aten::")] if self.of_gpu else []
        kind = torch.autograd.DeviceType.CUDA
        return events + [SimpleNamespace(name=event.name, device_type=kind) for event in kernels]

    def export_chrome_trace(self, path: str) -> None:
        super().export_chrome_trace(path)
        if not self.of_gpu:
            return
        trace = json.loads(Path(path).read_text())
        operations = [event for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
        for number, event in enumerate(operations):
            launch = {"ph": "X", "pid": event["pid"], "tid": event["tid"], "ts": event["ts"], "dur": 1}
            launch |= {"args": {"correlation": number}}
            trace["traceEvents"].append({**launch, "cat": "cuda_runtime", "name": "cudaLaunchKernel"})
            trace["traceEvents"].append({**launch, "cat": "kernel", "name": event["name"], "tid": 7, "dur": 2})
        Path(path).write_text(json.dumps(trace))


def install() -> None:
    nothing = _Nothing
    values = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *arguments, **options: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": nothing,
        "device_of": nothing,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0),
        "get_arch_list": lambda: ["sm_90"],
        "Stream": Stream,
        "Event": Event,
        "stream": _stream,
        "current_stream": lambda device=None: _streams[-1],
        "default_stream": lambda device=None: _streams[0],
        "set_stream": _set_stream,
        "synchronize": lambda device=None: _require_no_capture("cudaDeviceSynchronize"),
        "CUDAGraph": CUDAGraph,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: bool(captures),
        "memory_allocated": lambda device=None: 2**20,
        "max_memory_allocated": lambda device=None: 2**21,
        "memory_reserved": lambda device=None: 2**21,
        "max_memory_reserved": lambda device=None: 2**21,
        "reset_peak_memory_stats": nothing,
        "mem_get_info": lambda device=None: (2**22, PROPERTIES.total_memory),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
        "default_generators": (Generator(),),
        "set_sync_debug_mode": _set_sync_mode,
        "get_sync_debug_mode": lambda: _sync_mode[0],
    }
    for name, value in values.items():
        setattr(torch.cuda, name, value)
    of_accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda *arguments, **options: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "set_device_index": nothing,
        "current_stream": lambda device=None: _streams[-1],
        "synchronize": lambda device=None: None,
    }
    for name, value in of_accelerator.items():
        setattr(torch.accelerator, name, value)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.mark = lambda message: None
    torch.cuda.nvtx.range_pop = lambda: None
    torch._C._cuda_endAllocateToPool = _end_capture
    torch._C._cuda_releasePool = lambda device, pool: None
    torch.backends.cudnn.version = lambda: 91_000
    torch.profiler.profile = Profile
