"""Which path an op takes, and why. ``sclkern.ops.explain`` returns the very choice that the op acts on.

``SCLKERN_BACKEND`` ("triton" or "eager") stands for "auto" where an op is not given a backend by name.
``SCLKERN_LOG=dispatch``, set before sclkern is imported, logs every distinct choice once to stderr (logger
"sclkern.dispatch"); code that torch.compile has compiled no longer chooses and logs nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager")
# A constant, because torch.compile cannot trace the look-up.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Those that Triton's interpreter computes as a GPU does; what makes it compute others adds them.
INTERPRETED_DTYPES = {torch.float16, torch.float32}
# Types of which every attribute is torch's own.
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
LOG_CHOICES = "dispatch" in os.environ.get("SCLKERN_LOG", "").split(",")

_logger = logging.getLogger("sclkern.dispatch")
_logged: set[tuple[str, Choice]] = set()
if LOG_CHOICES:
    _logger.addHandler(logging.StreamHandler())
    _logger.setLevel(logging.INFO)


class Choice(NamedTuple):
    """The path that a call takes, and why.

    Attributes:
        path: "triton" is the kernel, "eager" the definition in ``sclkern.reference``; other names are faster forms of
            either, such as "sdpa" or "tiled". The name of a path that runs our kernels begins with "triton".
        reasons: why this path, and every reason against the others.
    """

    path: str
    reasons: tuple[str, ...]

    @property
    def backend(self) -> str:
        """ "triton" if the path runs our kernels, "flash" if it runs those of flash-attn, otherwise "eager"."""
        return self.path.partition("-")[0] if self.path.startswith(("triton", "flash")) else "eager"

    def via(self, path: str, reason: str) -> Choice:
        """The same choice, carried out by ``path`` for one more reason."""
        return Choice(path, (*self.reasons, reason))

    def __str__(self) -> str:
        return f"{self.backend}: {'; '.join(self.reasons)}"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (``TRITON_INTERPRET=1``, set before Triton loads)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str) -> str:
    """``backend``, or the value of ``SCLKERN_BACKEND`` where it is "auto" and the variable is set."""
    # Asked by every call; get() would raise and catch an error where the variable is not set.
    return os.environ["SCLKERN_BACKEND"] if backend == "auto" and "SCLKERN_BACKEND" in os.environ else backend


def may_read(tensor: Tensor) -> bool:
    """Whether the values of an argument may be read to check them.

    On a CPU they are always read; on a GPU, where reading waits for the device, under ``SCLKERN_DEBUG=1``; never while
    torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("SCLKERN_DEBUG") == "1"


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of this tensor."""
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which products of float32 are not rounded; entering one takes as long as a launch."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else nullcontext()


def autocast(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype that autocast gives to the inputs of a matrix product; unchanged outside autocast."""
    if tensor.dtype not in KERNEL_DTYPES or not is_autocast(tensor):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def autocast_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``autocast`` of tensors on one device."""
    return tuple(map(autocast, tensors)) if is_autocast(tensors[0]) else tensors


def autocast_like(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Tensors of the dtypes and devices of ``autocast_all``, without the cost of a cast; None is dropped."""
    given = tuple(tensor for tensor in tensors if tensor is not None)
    return tuple(autocast(tensor.new_empty(0)) for tensor in given) if given and is_autocast(given[0]) else given


def select_backend(
    *tensors: Tensor | None,
    backend: str = "auto",
    unsupported: tuple[str, ...] = (),
    device: torch.device | None = None,
) -> Choice:
    """Select the path "triton" or "eager" for these tensors.

    Args:
        *tensors: the floating-point inputs of the op; None stands for an argument that is absent or unknown.
        backend: "triton" or "eager" by name; "auto" is ``SCLKERN_BACKEND`` where that is set, otherwise Triton where
            it can run.
        unsupported: reasons why the op's kernel cannot compute this call.
        device: where the op runs, for an op that takes no floating tensor.

    Returns:
        The path, with every reason against the kernel where the path is "eager".

    Raises:
        ValueError: unknown backend, no tensor, or Triton was requested by name and cannot run.
    """
    source = "backend"
    if backend == "auto" and "SCLKERN_BACKEND" in os.environ:
        backend, source = os.environ["SCLKERN_BACKEND"], "SCLKERN_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "eager":
        return Choice("eager", (f"requested by {source}",))
    given = [tensor for tensor in tensors if tensor is not None]
    devices = list(dict.fromkeys([tensor.device for tensor in given] + ([] if device is None else [device])))
    dtypes = list(dict.fromkeys([tensor.dtype for tensor in given]))
    if not devices:
        raise ValueError("tensors: got none, expected an input of the op")
    problems = (*unsupported, *_problems(devices, dtypes))
    if not problems:
        return Choice("triton", ("Triton's interpreter" if interpreted() else f"tensors on {devices[0]}",))
    if backend == "triton":
        raise ValueError(f"{source}='triton': cannot run: {'; '.join(problems)}")
    return Choice("eager", problems)


def _problems(devices: list[torch.device], dtypes: list[torch.dtype]) -> tuple[str, ...]:
    problems = []
    if not TRITON_INSTALLED:
        problems.append("Triton is not installed")
    if len(devices) > 1:
        problems.append(f"tensors on different devices {sorted(map(str, devices))}")
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            problems.append(f"{str(dtype).removeprefix('torch.')} has no kernel")
        elif interpreted() and dtype not in INTERPRETED_DTYPES:
            problems.append(f"Triton's interpreter computes {str(dtype).removeprefix('torch.')} wrongly")
    if devices[0].type != "cuda" and TRITON_INSTALLED and not interpreted():
        problems.append(f"tensors on {devices[0]}, kernels need a GPU")
    return tuple(problems)


def takes_cpu_form(choice: Choice, backend: str, tensor: Tensor) -> bool:
    """Whether a CPU may take a faster form of the definition: nobody requested another path by name."""
    return choice.path == "eager" and resolve_backend(backend) == "auto" and tensor.device.type == "cpu"


def logged(op: str, choice: Choice) -> Choice:
    """``choice``, logged the first time that ``op`` makes it under ``SCLKERN_LOG=dispatch``."""
    if LOG_CHOICES and not torch.compiler.is_compiling() and (op, choice) not in _logged:
        _logged.add((op, choice))
        _logger.info("sclkern.dispatch: %s takes path %r: %s", op, choice.path, "; ".join(choice.reasons))
    return choice
