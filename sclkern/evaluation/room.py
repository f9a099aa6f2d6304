"""Where large tensors lie: on the model's device while they fit, then in the host's memory, then in a file."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sclkern.errors import UserError

Place = Literal["device", "memory", "file"]


class Room:
    """Gives out tensors, each in the first place that has room for it.

    A file is mapped into memory and has no name: it goes with the tensor, however the process ends. Its size is taken
    from the disk before anything is computed.

    Args:
        device: of the model.
        memory: bytes that may be taken of the device, and again of the host; None takes half of what is free of each.
        folder: of the files; None is the system's for temporary files (``TMPDIR``).

    Attributes:
        taken: bytes given out of each place.
    """

    taken: dict[Place, int]

    def __init__(
        self, device: torch.device | str = "cpu", memory: int | None = None, folder: str | Path | None = None
    ) -> None:
        self.device = torch.device(device)
        self.folder = Path(folder or tempfile.gettempdir())
        self.taken = {"device": 0, "memory": 0, "file": 0}
        on_gpu = self.device.type == "cuda"
        free = {
            "device": (torch.cuda.mem_get_info(self.device)[0] // 2 if memory is None else memory) if on_gpu else 0,
            "memory": _free_memory() // 2 if memory is None else memory,
        }
        self._free: dict[str, int] = free

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose content is undefined.

        Args:
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            The tensor, on the device or the host.

        Raises:
            UserError: the folder's disk is full.
        """
        size = math.prod(shape) * dtype.itemsize
        for place in ("device", "memory"):
            if size <= self._free[place]:
                self._free[place] -= size
                self.taken["device" if place == "device" else "memory"] += size
                return torch.empty(shape, dtype=dtype, device=self.device if place == "device" else "cpu")
        self.taken["file"] += size
        return self._mapped(size).view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)

    def _mapped(self, size: int) -> Tensor:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # A mapped file without blocks ends the process when the disk is full.
                getattr(os, "posix_fallocate", _fill)(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise UserError(
                f"{self.folder}: no room for {size / 1e9:.1f} GB of features ({error.strerror}), which memory has not; "
                "set TMPDIR to a folder with room, or retrieve from fewer images"
            ) from error
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _fill(file: int, start: int, size: int) -> None:
    os.ftruncate(file, start + size)


def _free_memory(root: Path = Path("/")) -> int:
    """Of the machine, or of the part of it that a scheduler or a container leaves to this process."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        # No Linux: what a machine surely has.
        return 2**31
    return min([free, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> list[int]:
    left = []
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup") / path.lstrip("/")
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        try:
            most = int((folder / f"memory.{limit}").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # What files have left in memory goes when it is needed.
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            left.append(max(0, most - int((folder / f"memory.{used}").read_text()) + cached))
        except (OSError, ValueError):
            continue  # without a limit ("max"), or not to be read
    return left
