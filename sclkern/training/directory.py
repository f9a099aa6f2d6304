"""The folder of a run: what is in it already, and what a new run may do about that."""

from __future__ import annotations

import errno
import logging
import shutil
import socket
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sclkern.errors import UserError
from sclkern.io import write_atomically
from sclkern.training.checkpoint import DamagedError, checkpoints_of, load_checkpoint, remedy
from sclkern.training.config import PretrainConfig, batch_difference, build_as, resume_difference
from sclkern.training.config_yaml import write_yaml
from sclkern.training.sharded import load_sharded
from sclkern.training.world import World

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("sclkern.training")

# What a run writes, and whether that is a folder.
_NAMES = {"checkpoints": True, "tensorboard": True, "model": True}
_NAMES |= dict.fromkeys(
    ("config.yaml", "metrics.jsonl", "report.md", "losses.png", "course.png", "attention.png"), False
)


@dataclass(frozen=True)
class SavedRun:
    """A run that goes on.

    Attributes:
        path: its checkpoint.
        state: the content of the checkpoint.
        damaged: newer checkpoints, which cannot be used.
        in_parts: whether each process reads its parts of the tensors itself, which ``state`` lacks.
    """

    path: Path
    state: dict[str, Any]
    damaged: tuple[Path, ...] = ()
    in_parts: bool = False


def open_directory(config: PretrainConfig, *, resume: bool, world_size: int = 1) -> SavedRun | None:
    """Check a run's folder, and read the checkpoint to go on from. Nothing that is there changes.

    Args:
        config: configuration of the run that starts.
        resume: whether a run that is already there goes on.
        world_size: processes that train together.

    Returns:
        The run that is there, at the newest of its checkpoints that is whole; None for a new run.

    Raises:
        UserError: the folder cannot be written, holds anything of a run and ``resume`` is False, holds a run of another
            configuration, or a model or a checkpoint without one to go on from.
    """
    directory = Path(config.run.output_dir)
    checkpoints = directory / "checkpoints"
    _check_kinds(directory)
    there = _content(directory)
    paths = checkpoints_of(checkpoints)
    if not paths and set(there) - {"metrics.jsonl"}:
        raise UserError(
            f"{directory}: holds {', '.join(there)} of a run, but neither latest.pt nor best.pt to go on from; "
            "give a checkpoint one of these names, or give another run.output_dir"
        )
    if there and not resume:
        raise UserError(
            f"{directory}: already holds a run; add --resume to go on with it, or give another run.output_dir "
            f"(there are {', '.join(there)})"
        )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=checkpoints).close()  # else a run learns at its first checkpoint that it cannot save
    except OSError as error:
        raise UserError(f"{checkpoints}: {error.strerror}; give a run.output_dir that can be written") from error
    if not paths:
        return None
    saved = _newest_whole(paths, in_parts=world_size > 1 and config.run.parallel == "fsdp")
    path = saved.path
    try:
        # Keys that came later have their defaults in a run that was saved without them.
        before = build_as(type(config), saved.state["config"]).to_dict()
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its configuration cannot be read ({error}); {remedy(path)}") from error
    if difference := resume_difference(before, config.to_dict()):
        raise UserError(f"{path}: {difference}; resume with the same configuration, or start in another folder")
    _check_batch(saved, build_as(type(config), before), config, world_size)
    if path != paths[0] or not (path.is_dir() or path.name == "latest.pt"):
        why = f"{saved.damaged[0].name} is damaged" if saved.damaged else "no latest.pt"
        log.warning("%s: %s; goes on from %s, of step %s", checkpoints, why, path.name, saved.state["step"])
    return saved


def _check_kinds(directory: Path) -> None:
    """Raise a ``UserError`` if something has a name that the run will give to something else, if only at its end."""
    for name, is_folder in _NAMES.items():
        path = directory / name
        if path.exists() and path.is_dir() != is_folder:
            kinds = ("a file", "a folder")
            raise UserError(
                f"{path}: got {kinds[not is_folder]}, expected {kinds[is_folder]}, which the run writes; rename it, or "
                "give another run.output_dir"
            )


def check_shared(directory: Path, world: World) -> None:
    """Raise on every process unless all see what rank 0 writes to a folder; called by all.

    Args:
        directory: of the run; there on rank 0.
        world: the processes.

    Raises:
        UserError: a process has another folder of this name, such as on the disk of its own machine.
    """
    name = world.broadcast(f".shared.{uuid.uuid4().hex}.0.tmp" if world.main else None)
    mark = directory / name
    if world.main:
        write_atomically(mark, lambda temporary: temporary.touch())
    world.barrier()
    seen = world.gather((mark.exists(), socket.gethostname()))
    if world.main:
        mark.unlink(missing_ok=True)
    for rank, (sees, host) in enumerate(seen):
        if not sees:
            raise UserError(
                f"run.output_dir {directory}: rank {rank} on {host} does not see what rank 0 on {seen[0][1]} writes "
                "there, and with run.parallel=fsdp all write checkpoints; give the path of a folder that all machines "
                "share, or set run.parallel=ddp"
            )


def _check_batch(saved: SavedRun, before: PretrainConfig, config: PretrainConfig, world_size: int) -> None:
    # Of a version of one process.
    global_batch = saved.state.get("global_batch", before.run.batch_size * before.run.accumulation)
    if difference := batch_difference(global_batch, config, world_size):
        raise UserError(f"{saved.path}: {difference}; or start in another folder")
    rows, rows_before = world_size * config.run.batch_size, global_batch // before.run.accumulation
    if rows != rows_before and config.run.contrastive_batch is None:
        log.warning(
            "a contrast sees %d pairs from here on, %d before: run.contrastive_batch is null", rows, rows_before
        )


def read_newest(source: Path) -> SavedRun:
    """Read a checkpoint, or the newest of a run that is whole.

    Args:
        source: folder of a run, or one of its checkpoints.

    Returns:
        The checkpoint.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    paths = checkpoints_of(source / "checkpoints")
    return _newest_whole(paths or [source / "checkpoints" / "latest.pt" if _is_run(source) else source])


def _is_run(source: Path) -> bool:
    return source.is_dir() and not (source / "state.pt").exists()


def _newest_whole(paths: list[Path], *, in_parts: bool = False) -> SavedRun:
    """Read the first of these checkpoints that was not damaged since it was written."""
    damaged: list[Path] = []
    first: DamagedError | None = None
    for path in paths:
        try:
            if path.is_dir():
                return SavedRun(path, load_sharded(path, in_parts=in_parts), tuple(damaged), in_parts)
            return SavedRun(path, load_checkpoint(path), tuple(damaged))
        except DamagedError as error:
            first = first or error
            damaged.append(path)
    assert first is not None
    raise first


def lock_directory(directory: Path) -> IO[str] | None:
    """Make the folder, and keep other processes from writing it for as long as the file that is returned is open.

    Args:
        directory: folder of the run.

    Returns:
        The locked file; None where the file system has no locks.

    Raises:
        UserError: another process writes this folder, or this one cannot.
    """
    if fcntl is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise UserError(f"run.output_dir {directory}: {error.strerror}; give a folder that can be written") from error
    try:
        # Not flock: data workers would hold it for as long as they outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{directory}: another process writes this run; wait until it has ended, or give another run.output_dir"
            ) from error
        return None
    return file


def begin(config: PretrainConfig, saved: SavedRun | None) -> None:
    """Save the resolved configuration. What is not gone on from gets another name: rows of a run, damaged checkpoints.

    Args:
        config: configuration of the run that starts.
        saved: what it goes on from; None starts it at step 0.

    Raises:
        UserError: the folder cannot be written.
    """
    directory = Path(config.run.output_dir)
    for folder in (directory, directory / "checkpoints", directory / "model"):
        for left_over in folder.glob(".*.[0-9]*.tmp"):  # of a process killed while it wrote
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                left_over.unlink(missing_ok=True)
    for damaged in saved.damaged if saved else ():
        damaged.rename(damaged.with_name(f"{damaged.name}.damaged"))
        log.warning("%s: the damaged file is now %s.damaged", damaged, damaged.name)
    new = saved is None
    resolved, path, metrics = write_yaml(config.to_dict()), directory / "config.yaml", directory / "metrics.jsonl"
    if new and "metrics.jsonl" in _content(directory):
        log.warning("%s: no checkpoint to go on from, starts at step 0; the rows there are now %s",
                    metrics, _set_aside(metrics).name)  # fmt: skip
    if new and path.is_file() and path.read_text(encoding="utf-8", errors="replace") != resolved:
        log.warning("%s: the file there is now %s", path, _set_aside(path).name)
    write_atomically(path, lambda temporary: temporary.write_text(resolved, encoding="utf-8"))


def _content(directory: Path) -> list[str]:
    """What of a run is in a folder."""
    checkpoints = directory / "checkpoints"
    found = {*checkpoints_of(checkpoints), *checkpoints.glob("[!.]*.pt")}
    names = sorted(f"checkpoints/{path.name}" for path in found)
    metrics, model = directory / "metrics.jsonl", directory / "model"
    if metrics.is_file() and metrics.stat().st_size:
        names.append(metrics.name)
    if model.is_dir() and any(model.iterdir()):
        names.append(model.name)
    if (directory / "report.md").is_file():
        names.append("report.md")
    return names


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)
