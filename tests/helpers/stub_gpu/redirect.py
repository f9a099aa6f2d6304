"""What is put on the GPU stays on the CPU, and says that it is on the GPU."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_real_device = torch._C.TensorBase.device
_Thread_run = threading.Thread.run
# How many callers want the truth about where tensors are.
_truths = [0]


@contextmanager
def truth():
    """Inside, tensors say that they are on the CPU: what computes results there asks."""
    _truths[0] += 1
    try:
        yield
    finally:
        _truths[0] -= 1


def _on_gpu(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def _on_cpu(value: Any) -> bool:
    return value == "cpu" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cpu"


def _fake_mode() -> Any:
    """The mode in which tensors have a device and no memory: there the GPU is none of this process."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _without_gpu(method):
    """A mode of fake tensors begins and ends as torch does it where there is no GPU."""

    def run(*arguments):
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            return method(*arguments)

    return run


class Redirect(TorchFunctionMode):
    """Replaces the GPU by the CPU in every call of torch, and remembers what was put on the CPU by name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function is torch.device or _truths[0] or _fake_mode() is not None:
            return function(*args, **kwargs)
        if name in ("cuda", "pin_memory"):
            return _moved(args[0], to_cpu=False)
        if name == "record_stream":
            return None
        kwargs.pop("pin_memory", None)
        devices = [value for value in (*args, *kwargs.values()) if _on_gpu(value) or _on_cpu(value)]
        args = tuple(_CPU if _on_gpu(value) else value for value in args)
        kwargs = {key: _CPU if _on_gpu(value) else value for key, value in kwargs.items()}
        if name in ("bmm", "mm") and "out_dtype" in kwargs:
            # Of a GPU alone.
            dtype = kwargs.pop("out_dtype")
            args = tuple(value.to(dtype) for value in args)
        result = function(*args, **kwargs)
        if name.startswith(("empty", "new_empty")) and result.is_floating_point() and result.device == GPU:
            # What fresh memory holds on a GPU is anything.
            torch.Tensor.fill_(result, torch.nan)
        if devices or name == "cpu":
            if isinstance(result, torch.Tensor):
                to_cpu = name == "cpu" or _on_cpu(devices[-1])
                return _moved(result, to_cpu) if args and result is args[0] else _marked(result, to_cpu)
        elif any(map(_stays_on_cpu, args)) and all(_stays_on_cpu(a) for a in args if isinstance(a, torch.Tensor)):
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    _marked(tensor, True)
        return result


def _stays_on_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.__dict__.get("_stays_on_cpu", False)


def _moved(tensor: torch.Tensor, to_cpu: bool) -> torch.Tensor:
    """The tensor if it is there already, otherwise a copy."""
    if _stays_on_cpu(tensor) == to_cpu:
        return tensor
    return _marked(tensor.clone(), to_cpu)


def _marked(tensor: torch.Tensor, to_cpu: bool) -> torch.Tensor:
    tensor._stays_on_cpu = to_cpu
    return tensor


def _module_on_cpu(module: torch.nn.Module) -> torch.nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        _marked(tensor, True)
    return module


class Generator(torch._C.Generator):
    """A generator of the CPU that takes the device of a GPU."""

    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls, _CPU if _on_gpu(device) else device)

    def graphsafe_get_state(self):
        return self

    def graphsafe_set_state(self, state):
        return self.set_state(state.get_state())


def _device(self: torch.Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        real = _real_device.__get__(self)
    return real if real.type != "cpu" or _truths[0] or _stays_on_cpu(self) else GPU


def _run(self: threading.Thread) -> None:
    # A thread begins without the modes of the one that started it.
    with Redirect():
        _Thread_run(self)


def _inside(run):
    """A function of torch's that calls code of others, which needs the mode too."""

    def inside(*arguments, **options):
        with Redirect():
            return run(*arguments, **options)

    return inside


def _autocast_on_cpu() -> None:
    begin = torch.autocast.__init__
    is_enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def on_cpu(self, device_type, *arguments, **options):
        begin(self, "cpu" if device_type == "cuda" else device_type, *arguments, **options)

    torch.autocast.__init__ = on_cpu
    torch.is_autocast_enabled = lambda kind="cuda": is_enabled("cpu" if kind == "cuda" else kind)
    torch.get_autocast_dtype = lambda kind: dtype("cpu" if kind == "cuda" else kind)


def _as_it_is(function=None, **options):
    """In place of ``torch.compile``, whose generated code no stub runs."""
    return (lambda wrapped: wrapped) if function is None else function


def install() -> None:
    torch.Tensor.device = property(_device)
    torch.Tensor.is_cuda = property(lambda self: _device(self).type == "cuda")
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.get_device = lambda self: _device(self).index if _device(self).type == "cuda" else -1
    torch.nn.Module.cpu = _module_on_cpu
    torch.Generator = Generator
    fake_tensor.init_gpu_context = lambda device: None
    for name in ("__enter__", "__exit__"):
        setattr(fake_tensor.FakeTensorMode, name, _without_gpu(getattr(fake_tensor.FakeTensorMode, name)))
    torch.compile = _as_it_is
    threading.Thread.run = _run
    torch.autograd._engine_run_backward = _inside(torch.autograd._engine_run_backward)
    _autocast_on_cpu()
    Redirect().__enter__()
