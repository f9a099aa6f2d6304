"""Kernels of a training step compiled ahead of it, on every core, into Triton's cache.

The step is taken on fake tensors, which records what its ops would launch (``sclkern.tools.ledger``). Each distinct
launch is compiled in a process of its own; the process that trains finds it in the cache by Triton's own key, which is
made of the source, the types and alignments of the arguments, the options and the target.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sclkern.errors import UserError
from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.ops._registration import LAUNCHERS, kernels
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.step import StepConfig
from sclkern.tools.ledger.step import trace
from sclkern.tools.static import workers

if TYPE_CHECKING:
    # It needs more packages than compiling does.
    from sclkern.training.config import PretrainConfig

# Padded captions where the data is not known: a multiple of 16, one of 8, and the longest.
WIDTHS = (16, 24, 50)
# Backend, architecture and warp size, as Triton names them.
Target: TypeAlias = tuple[str, int | str, int]
TARGETS: dict[str, Target] = {f"sm_{number}": ("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)}


@dataclass(frozen=True)
class Argument:
    """A tensor of a launch, as the compiler sees it: ``dtype``, and the bytes by which it misses alignment."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        """An address of that alignment."""
        return self.offset

    def ptr_range(self) -> int:
        """Triton's question on AMD, after the range that 32-bit offsets can reach."""
        return 0


@dataclass(frozen=True)
class Kernel:
    """A launch without its tensors, to be compiled in another process.

    Attributes:
        module: that defines the jit function.
        name: of the jit function.
        arguments: by name, with an ``Argument`` for each tensor, and the options of the compiler; numbers that are no
            constants stand for those with which the code is the same.
    """

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Outcome:
    """What became of ``compile_ahead``.

    Attributes:
        kernels: distinct kernels of the step.
        compiled: of them, those that were not in the cache.
        failed: of them, those that do not compile, with the reason.
        seconds: from the first to the last.
        cache: Triton's folder.
    """

    kernels: int
    compiled: int
    failed: tuple[str, ...]
    seconds: float
    cache: Path


class _Launches(TorchDispatchMode):
    """Inside, ops run their launchers on fake tensors, and their launches are kept."""

    section = ""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[Kernel, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "sclkern":
            return func(*args, **(kwargs or {}))
        with self, kernels.launch.recorded() as launches:
            out = LAUNCHERS[func._schema.name.split("::")[1]](*args, **(kwargs or {}))
        self.kernels |= {kernel_of(launch): None for launch in launches}
        return out


def kernel_of(launch: Any) -> Kernel:
    """A launch as another process compiles it.

    Args:
        launch: of ``sclkern.kernels.launch.recorded``.

    Returns:
        The kernel, equal for launches that share their binary.
    """
    constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    options = set(launch.arguments) - {parameter.name for parameter in launch.kernel.params}

    def seen(name: str, value: Any) -> Any:
        """The value that stands for all with which the compiler makes the same code."""
        if isinstance(value, Tensor):
            return Argument(value.dtype, int(value.storage_offset()) * value.element_size() % 16)
        if name in constants or name in options or value is None or isinstance(value, str):
            return value
        if isinstance(value, bool | float):
            return type(value)(0)
        # An integer by its width, and as 1, a multiple of 16 or neither.
        wide = 2**32 if value >= 2**31 else 0
        return 1 if value == 1 else wide + (16 if value % 16 == 0 else 17)

    function = launch.kernel.fn
    arguments = tuple((name, seen(name, value)) for name, value in launch.arguments.items())
    return Kernel(function.__module__, function.__name__, arguments)


def kernels_of(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    rows: int,
    widths: Sequence[int] = WIDTHS,
    num_frames: int = 1,
    precision: torch.dtype | None = torch.bfloat16,
) -> list[Kernel]:
    """The distinct kernels of a step, forward and backward, for the architecture of this machine's GPU.

    Args:
        config: of the network.
        objectives: the recipe.
        step: how it is executed.
        rows: of the batch.
        widths: lengths to which captions are padded, in tokens; more than ``max_text_len`` is that.
        num_frames: of every clip; 1 for images.
        precision: dtype of autocast, None for float32.

    Returns:
        The kernels, in the order of their first launch.

    Raises:
        UserError: Triton is not installed, or interprets.
    """
    require_compiler()
    found = _Launches()
    sizes: dict[str, Any] = {"rows": rows, "num_frames": num_frames, "precision": precision}
    for width in dict.fromkeys(min(width, config.max_text_len) for width in widths):
        trace(found, config, objectives, step, caption_tokens=min(13, width), padded_tokens=width, **sizes)
    return list(found.kernels)


def kernels_of_run(config: PretrainConfig, widths: Sequence[int] = WIDTHS) -> list[Kernel]:
    """``kernels_of`` for a run.

    Args:
        config: of the run.
        widths: lengths to which its captions are padded, such as ``sclkern.training.data.caption_widths``.

    Returns:
        The kernels; none where the run takes none.
    """
    if config.run.backend not in ("auto", "triton"):
        return []
    return kernels_of(
        config.model,
        config.objectives,
        config.step,
        rows=config.run.batch_size,
        widths=widths,
        num_frames=max(1, config.model.max_frames),
        precision=torch.bfloat16 if config.run.precision == "bfloat16" else None,
    )


@contextmanager
def selected_for(name: str | None) -> Iterator[None]:
    """Inside, launchers select for another GPU than that of this machine.

    Args:
        name: one of ``TARGETS``; None for this machine's.
    """
    with nullcontext() if name is None else kernels.config.assume(name):
        yield


def require_compiler() -> None:
    """Raise a ``UserError`` where nothing can be compiled."""
    if not TRITON_INSTALLED:
        raise UserError("warmup: Triton is not installed, so that there is nothing to compile; pip install triton")
    if interpreted():
        raise UserError("warmup: TRITON_INTERPRET=1 interprets kernels and compiles none; unset it")


def this_target() -> Target:
    """Backend, architecture and warp size of this machine's GPU, as Triton names them."""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch, target.warp_size


def compile_ahead(
    found: Sequence[Kernel],
    target: Target,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Compile kernels on every core.

    Args:
        found: of ``kernels_of``.
        target: of ``this_target``, or of another machine's GPU.
        say: called with a line: how many kernels are compiled, on how many processes.

    Returns:
        What became of them.
    """
    begin = time.monotonic()
    processes = min(len(os.sched_getaffinity(0)), len(found)) or 1
    say(f"compiling {len(found)} kernels on {processes} processes into {cache_folder()}")
    # Few parts to a process, so that each imports torch once and none is left with the slowest.
    jobs = [workers.submit(_compile, found[number :: 4 * processes], target) for number in range(4 * processes)]
    results = [result for job in as_completed(jobs) for result in _results(job.result())]
    failed = tuple(result for result in results if isinstance(result, str))
    seconds = time.monotonic() - begin
    return Outcome(len(found), sum(result is False for result in results), failed, seconds, cache_folder())


def _results(result: Any) -> Iterable[bool | str]:
    return [result.error] if isinstance(result, workers.Failed) else result


def _compile(found: Sequence[Kernel], target: Target) -> list[bool | str]:
    """Whether each kernel was in the cache already, or why it does not compile; in a process of its own, whose target
    is set for good."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*target)

    triton.runtime.driver.set_active(Driver())
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **others: hits.append(cache_hit)
    results: list[bool | str] = []
    for kernel in found:
        before = len(hits)
        try:
            getattr(import_module(kernel.module), kernel.name).warmup(grid=(1,), **dict(kernel.arguments))
            # Another launch may need the same binary, which this process holds already.
            results.append(all(hits[before:]))
        except Exception as error:
            results.append(f"{kernel.name}: {workers.whole_text(error)}")
    return results


def cache_folder() -> Path:
    """Triton's folder of compiled kernels."""
    import triton

    return Path(triton.knobs.cache.dir)


def _stamp(config: PretrainConfig, target: Target, widths: Sequence[int]) -> Path:
    """A file in the cache that stands for the kernels of this run, as the sources are now."""
    import triton

    package = Path(sys.modules["sclkern"].__file__ or "").parent
    sources = [file.read_bytes() for file in sorted(package.rglob("*.py"))]
    content = [triton.__version__, target, config.model, config.objectives, config.step, config.run.precision]
    content += [config.run.batch_size, config.run.backend, tuple(widths), *sources]
    return cache_folder() / f"sclkern-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}.warm"


def warm_up(config: PretrainConfig, say: Callable[[str], object], widths: Sequence[int] = WIDTHS) -> Outcome | None:
    """Compile what this machine's cache may lack of a run; nothing where that was done before.

    Args:
        config: of the run, on a GPU.
        say: as of ``compile_ahead``.
        widths: as of ``kernels_of_run``.

    Returns:
        What became of it; None where there was nothing to do.
    """
    target = this_target()
    stamp = _stamp(config, target, widths)
    if stamp.exists() or not (found := kernels_of_run(config, widths)):
        return None
    outcome = compile_ahead(found, target, say)
    workers.close()
    if not outcome.failed:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    return outcome
