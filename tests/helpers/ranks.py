"""A test file as the program of several processes: ``python FILE RANK WORLD FOLDER``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sclkern


def environment(**changes: str) -> dict[str, str]:
    """Of a process that imports this sclkern and these helpers, with one thread."""
    paths = [str(Path(sclkern.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **changes}


def run_ranks(file: str, world: int, folder: Path, **changes: str) -> list[Any]:
    """The results of each rank of a program whose main function is ``be_rank``."""
    processes = [
        subprocess.Popen(
            [sys.executable, file, str(rank), str(world), str(folder)],
            env=environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, f"rank {rank}: {output}"
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def be_rank(work: Callable[[int, int, Path], Any]) -> None:
    """Run ``work(rank, world, folder)`` in a gloo group, and leave its result for ``run_ranks``."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(work(rank, world, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()
