"""A test file as the program of several processes: ``python FILE RANK WORLD FOLDER``."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import sclkern


def environment(**changes: str) -> dict[str, str]:
    """Of a process that imports this sclkern and these helpers, with one thread."""
    paths = [str(Path(sclkern.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **changes}


def run_ranks(file: str, world: int, folder: Path, *, seconds: float = 180, **changes: str) -> list[Any]:
    """The results of each rank of a program whose main function is ``be_rank``.

    A rank is a copy of one process that has imported the package, which takes most of the time of starting it; with
    changes of the environment, which an import may read, it imports it by itself.
    """
    start = _start_anew if changes else start_copy
    processes = []
    try:
        for rank in range(world):
            processes.append(start([file, str(rank), str(world), str(folder)], folder / f"{rank}.log", changes))
        for rank, process in enumerate(processes):
            status = _wait(process, seconds)
            assert status == 0, f"rank {rank} ended with {status}: {(folder / f'{rank}.log').read_text()}"
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _start_anew(arguments: list[str], output: Path, changes: dict[str, str]) -> subprocess.Popen:
    with output.open("w") as file:
        return subprocess.Popen([sys.executable, *arguments], env=environment(**changes), stdout=file, stderr=file)


def start_copy(arguments: list[str], output: Path, _: object = None) -> BaseProcess:
    """Start a program, a file with its arguments, in a copy of a process that has imported the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sclkern.cli.pretrain", "pytest"])
    process = context.Process(target=_be_program, args=(arguments, str(output)))
    with mock.patch.dict(os.environ, environment()):
        process.start()
    return process


def _be_program(arguments: list[str], output: str) -> None:
    with Path(output).open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _wait(process: subprocess.Popen | BaseProcess, seconds: float) -> int | None:
    """The exit status; None if the time is over."""
    if isinstance(process, BaseProcess):
        process.join(seconds)
        return process.exitcode
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def be_rank(work: Callable[[int, int, Path], Any]) -> None:
    """Run ``work(rank, world, folder)`` in a gloo group, and leave its result for ``run_ranks``."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(work(rank, world, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()
