"""The start of a run of many processes: they meet, and find that all are about to do the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sclkern.errors import UserError
from sclkern.training.config import PretrainConfig
from sclkern.training.world import Place, World

# A collective ends by itself after this; rank 0 may copy data or write files meanwhile.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_CAME = "sclkern/came"
_ASKS = "sclkern/asks"
_READ = "sclkern/read"
# For the slowest process to read what the others have said.
_READERS_SECONDS = 10


def place_of_process() -> Place:
    """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

    Returns:
        The place; that of one process by itself where they are not set.

    Raises:
        UserError: only some are set, or no such numbers, or no port.
    """
    # What torchrun, or whoever starts the processes by hand, sets for each of them.
    found = {
        "RANK": os.environ.get("RANK"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK"),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR"),
        "MASTER_PORT": os.environ.get("MASTER_PORT"),
    }
    given = {name: value for name, value in found.items() if value is not None}
    if "WORLD_SIZE" not in given and "RANK" not in given:
        return Place()
    if lacking := [name for name in found if name not in given]:
        raise UserError(
            f"environment: got {', '.join(given)} without {', '.join(lacking)}; start the processes with torchrun, "
            "which sets all of them, or unset these"
        )
    try:
        rank, size, local_rank = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError as error:
        raise UserError(f"environment: RANK, WORLD_SIZE and LOCAL_RANK are no integers ({error})") from error
    if not (0 <= local_rank <= rank < size):
        raise UserError(
            f"environment: got RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank}, expected "
            "0 <= LOCAL_RANK <= RANK < WORLD_SIZE"
        )
    if not given["MASTER_PORT"].isdecimal() or not 0 < int(given["MASTER_PORT"]) < 2**16:
        raise UserError(f"environment: got MASTER_PORT={given['MASTER_PORT']}, expected a number from 1 to 65535")
    return Place(rank, size, local_rank)


def join_world(config: PretrainConfig) -> World:
    """Meet the other processes that torchrun has started, and check that all are about to do the same.

    Args:
        config: of the run; ``run.preflight_seconds`` is how long the others are waited for.

    Returns:
        The processes; this one alone without torchrun's environment.

    Raises:
        UserError: a process has not come, or another version, code, configuration or GPU than it should have.
    """
    place = place_of_process()
    if place.size == 1:
        return World(place)
    seconds = config.run.preflight_seconds
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    wait = timedelta(seconds=seconds)
    try:
        store = _open_store(place, wait)
        _meet(store, place, _describe(config, place), seconds)
    except (dist.DistError, RuntimeError, OSError) as error:
        raise UserError(
            f"rank {place.rank} of {place.size} on {socket.gethostname()}: no answer from {where} within {seconds} s "
            f"({' '.join(str(error).split())[:200]}); check that rank 0 runs, that MASTER_ADDR is its machine, that no "
            "firewall closes the port, and that rank 0 has not ended with a message of its own"
        ) from error
    on_gpu = torch.device(_device_type(config)).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(gpu_of(place))
    # Not before the watchdog, which names who hangs.
    patience = max(COLLECTIVE_TIMEOUT, timedelta(seconds=config.run.watchdog_seconds + 300))
    store.set_timeout(patience)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=patience,
    )
    return World(place, store)


def gpu_of(place: Place) -> int:
    """Index of a process's GPU among those that it sees.

    Args:
        place: of the process.

    Returns:
        Its number on its machine, or 0 where it sees one GPU.

    Raises:
        UserError: more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if count == 1:  # the launcher shows each process its own; the preflight compares which they are
        return 0
    if place.local_rank >= count:
        raise UserError(
            f"torchrun: process {place.local_rank + 1} of machine {socket.gethostname()}, which has {count} GPUs; "
            f"start with --nproc-per-node {count}, or with run.device=cpu"
        )
    return place.local_rank


def _device_type(config: PretrainConfig) -> str:
    name = config.run.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _open_store(place: Place, wait: timedelta) -> dist.Store:
    """What the processes tell each other through: torchrun's, else one that rank 0 holds."""
    if dist.is_torchelastic_launched():
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=wait))
        store.set_timeout(wait)
        return _of_this_start(store, place, wait.total_seconds())
    # torch's rendezvous would wait here for all processes, without a name for those that do not come.
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        place.size,
        is_master=place.rank == 0,
        timeout=wait,
        wait_for_workers=False,
    )


def _of_this_start(store: dist.Store, place: Place, seconds: float) -> dist.Store:
    """A part of the store that nobody has written yet."""
    # torchrun keeps its store when it starts the processes again (--max-restarts), with addresses and failures of those
    # that are gone. No count of the starts is the same on all machines, so every process asks rank 0 for the name of
    # the part by a word of its own.
    if place.rank:
        word = uuid.uuid4().hex
        store.set(f"{_ASKS}/{place.rank}", word)
        name = store.get(word).decode()  # waits for the answer
        store.set(f"{name}/{place.rank}", "")
        return dist.PrefixStore(name, store)
    name, end = uuid.uuid4().hex, time.monotonic() + seconds
    asking = set(range(1, place.size))
    while asking and time.monotonic() < end:
        for rank in sorted(asking):
            if store.check([f"{name}/{rank}"]):
                asking.remove(rank)
            elif store.check([f"{_ASKS}/{rank}"]):
                store.set(store.get(f"{_ASKS}/{rank}").decode(), name)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)  # ``_meet`` names those that have not come


def _meet(store: dist.Store, place: Place, own: dict[str, Any], seconds: float) -> None:
    """Wait for all ranks, and raise a ``UserError`` that names those that have not come, or the first difference."""
    text = json.dumps(own, sort_keys=True)
    shared = {name: value for name, value in own.items() if name not in ("machine", "gpu")}
    digest = hashlib.blake2b(json.dumps(shared, sort_keys=True).encode(), digest_size=8).hexdigest()
    store.set(f"{_CAME}/{place.rank}/text", text)
    store.set(f"{_CAME}/{place.rank}", f"{digest} {own['machine']} {own['gpu']}")
    keys = [f"{_CAME}/{rank}" for rank in range(place.size)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if not missing:
            return
        raise UserError(
            f"{_ranks(missing)} of {place.size} did not come within run.preflight_seconds={seconds}; look at what they "
            "print, check that each machine starts as many processes as torchrun expects "
            "(--nnodes, --nproc-per-node), or raise run.preflight_seconds where they start slowly"
        ) from None
    came = [value.decode().split(" ", 2) for value in store.multi_get(keys)]
    try:
        _compare(store, came, shared)
    except UserError:
        # Whoever holds the store must not end before the others have read from it.
        store.set(f"{_READ}/{place.rank}", "")
        with contextlib.suppress(dist.DistError):
            store.wait([f"{_READ}/{rank}" for rank in range(place.size)], timedelta(seconds=_READERS_SECONDS))
        raise


def _compare(store: dist.Store, came: list[list[str]], shared: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` that names the first difference of what the ranks have said."""
    for rank, (other, _, _) in enumerate(came):
        if other != came[0][0]:
            first, theirs = (json.loads(store.get(f"{_CAME}/{number}/text")) for number in (0, rank))
            name = next(name for name in first | theirs if first.get(name) != theirs.get(name) and name in shared)
            raise UserError(
                f"rank {rank} on {theirs['machine']}: {name} is {theirs.get(name)!r}, on rank 0 ({first['machine']}) "
                f"it is {first.get(name)!r}; start all processes with the same command in the same environment"
            )
    places: dict[str, int] = {}
    for rank, (_, machine, gpu) in enumerate(came):
        if gpu != "-" and (before := places.setdefault(f"{machine} {gpu}", rank)) != rank:
            raise UserError(
                f"ranks {before} and {rank} use the same GPU of {machine}; start one process for each GPU "
                "(--nproc-per-node, CUDA_VISIBLE_DEVICES)"
            )


def _describe(config: PretrainConfig, place: Place) -> dict[str, Any]:
    """What must be the same on all ranks, by the name that a message gives it, and where this one runs."""
    described: dict[str, Any] = {"machine": socket.gethostname(), "gpu": "-"}
    if _device_type(config) != "cpu" and torch.cuda.is_available():
        described["gpu"] = str(torch.cuda.get_device_properties(gpu_of(place)).uuid)
    described |= {
        f"{section}.{key}": value for section, keys in config.to_dict().items() for key, value in keys.items()
    }
    described["python"] = ".".join(platform.python_version_tuple()[:2])
    for package in ("torch", "triton", "numpy", "pillow", "torchvision"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            described[f"the version of {package}"] = metadata.version(package)
    described["the digest of sclkern's code"] = _code_digest()
    return described


def _code_digest() -> str:
    root, hashed = Path(__file__).parents[1], hashlib.blake2b(digest_size=8)
    # Sorted by the name inside of the package, which stands at another path on each machine.
    for path in sorted([*root.rglob("*.py"), *(root / "kernels").glob("*.py")]):
        hashed.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return hashed.hexdigest()


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
