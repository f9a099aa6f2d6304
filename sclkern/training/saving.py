"""Checkpoints of a run: copied before training goes on, then written by a thread, the last of them kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sclkern.io import write_atomically
from sclkern.training.checkpoint import best_folders, kept_steps, save_checkpoint
from sclkern.training.sharded import remove, save_plain_values, save_sharded


class HostCopy:
    """Copies of nested tensors in host memory; a copy takes the memory of the one before, which it overwrites."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def take(self, state: Any) -> Any:
        """Copy every tensor, from a GPU without waiting for it.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values.

        Returns:
            The same with copies; from a GPU they are whole when ``wait`` has returned.
        """
        self._events = None
        taken: dict[tuple[Any, ...], Tensor] = {}

        def copied(value: Any) -> Any:
            if isinstance(value, DTensor):
                return self._with_local(value, copied(value.to_local()))
            if isinstance(value, Tensor):
                # Tensors that share their memory, such as tied weights, are written once.
                place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
                if place not in taken or not value.numel():
                    taken[place] = self._copied(value.detach(), len(taken))
                return taken[place]
            if isinstance(value, dict):
                return {key: copied(entry) for key, entry in value.items()}
            return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value

        whole = copied(state)
        del self._buffers[len(taken) :]
        if self._events is not None:
            self._events[1].record()
        return whole

    def wait(self) -> float:
        """Wait until the copies from a GPU are whole.

        Returns:
            Seconds that the GPU took for them.
        """
        if self._events is None:
            return 0.0
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3

    def _copied(self, value: Tensor, index: int) -> Tensor:
        on_gpu = value.device.type == "cuda"
        if on_gpu and self._events is None:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        buffer = self._buffers[index] if index < len(self._buffers) else None
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
            self._buffers[index : index + 1] = [buffer]
        return buffer.copy_(value, non_blocking=True)

    def _with_local(self, value: DTensor, local: Tensor) -> DTensor:
        """A tensor that lies in parts as ``value`` does, on CPUs, of which this process has ``local``."""
        mesh = value.device_mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh)
        return DTensor.from_local(
            local, self._meshes[mesh], value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )


class CheckpointWriter:
    """Writes checkpoints into a folder, one at a time, while training goes on.

    ``latest.pt`` is the newest; those before it are kept as ``step-<step>.pt``. A state that lies in parts in several
    processes is written by all of them, as the folders ``step-<step>`` and ``best-<step>``, and there is no
    ``latest.pt`` then. Whatever goes wrong in the thread is raised by the next call of ``check``, ``save`` or ``wait``.

    Args:
        folder: where the checkpoints stand.
        keep: checkpoints that are kept, ``latest.pt`` among them and ``best.pt`` not.
        latest_step: step of the checkpoint that the run goes on from; -1 if it is new.
        group: of processes that each have a part of the state, on CPUs and for the writer alone; None if one process
            has the whole.

    Attributes:
        failed: name of the checkpoint that could not be written; None while none failed.
        stall_seconds: time that training has waited, for copies and for writes that had not ended.
        write_seconds: time that the longest write took, from its copy until it was on the disk.
    """

    failed: str | None
    stall_seconds: float
    write_seconds: float

    def __init__(
        self, folder: Path, *, keep: int, latest_step: int = -1, group: dist.ProcessGroup | None = None
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.group = group
        self.failed = None
        self.stall_seconds = self.write_seconds = 0.0
        self._latest_step = latest_step
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, name: str, state: dict[str, Any], whole: Callable[[], object]) -> None:
        """Copy a state and let it be written; waits first for the write before, if that has not ended.

        Args:
            name: "latest" or "best".
            state: tensors and plain values, with ``step``; may change as soon as this has returned.
            whole: called by the thread when the checkpoint is on the disk.

        Raises:
            UserError: the write before failed: disk full, read-only, no permission.
        """
        start = time.perf_counter()
        self.wait()
        copy = self._copy.take(state)
        self.stall_seconds += time.perf_counter() - start
        # No daemon: the interpreter waits for it before it exits.
        self._thread = threading.Thread(target=self._write, args=(name, copy, whole), name=f"write {name}.pt")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in a write that has ended.

        Raises:
            UserError: disk full, read-only, no permission.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is written any more.

        Raises:
            UserError: the write failed: disk full, read-only, no permission.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, name: str, state: dict[str, Any], whole: Callable[[], object]) -> None:
        start = time.perf_counter()
        try:
            self.stall_seconds += self._copy.wait()
            if self.group is None:
                self._write_file(name, state)
            else:
                self._write_folder(name, state, self.group)
            whole()
            self.write_seconds = max(self.write_seconds, time.perf_counter() - start)
        except BaseException as error:  # raised where training waits for it
            self.failed, self._error = name, error

    def _write_file(self, name: str, state: dict[str, Any]) -> None:
        path = self.folder / f"{name}.pt"
        if name == "best":
            save_checkpoint(path, state)
            self._remove(best_folders(self.folder))
            return
        kept = self._keep_latest() if state["step"] != self._latest_step else None
        try:
            save_checkpoint(path, state)
        except BaseException:
            if kept is not None:
                kept.unlink(missing_ok=True)
            raise
        self._latest_step = state["step"]
        self._remove(kept_steps(self.folder)[self.keep - 1 :])

    def _keep_latest(self) -> Path | None:
        """Give ``latest.pt`` the name of its step too."""
        latest, kept = self.folder / "latest.pt", self.folder / f"step-{self._latest_step:08d}.pt"
        if self.keep == 1 or self._latest_step < 0 or not latest.exists():
            return None
        write_atomically(kept, lambda temporary: _link_or_copy(latest, temporary))
        return kept

    def _write_folder(self, name: str, state: dict[str, Any], group: dist.ProcessGroup) -> None:
        step = state["step"]
        folder = self.folder / f"{'best' if name == 'best' else 'step'}-{step:08d}"

        def commit() -> None:
            if name == "latest" and self._keep_latest() is not None:
                (self.folder / "latest.pt").unlink()

        if name == "latest" and step == self._latest_step and folder.exists():
            save_plain_values(folder, state, group)
        else:
            save_sharded(folder, state, group, commit)
        if name == "latest":
            self._latest_step = step
        if dist.get_rank(group):
            return
        if name == "latest":
            (self.folder / "latest.pt").unlink(missing_ok=True)
            self._remove(kept_steps(self.folder)[self.keep :])
        else:
            before = [self.folder / "best.pt", *best_folders(self.folder)]
            self._remove(path for path in before if path != folder)

    def _remove(self, paths: Iterable[Path]) -> None:
        """Remove what is older than a checkpoint that is whole; what cannot be removed stays."""
        for path in list(paths):
            with contextlib.suppress(OSError):
                if path.is_dir():
                    remove(path)
                else:
                    path.unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links
        shutil.copyfile(source, target)
