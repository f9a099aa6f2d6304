"""Checkpoints whose tensors lie in parts in several processes (FSDP): a folder that all write, whole by its name.

``state.pt`` has the plain values, and a digest of every other file; ``torch.distributed.checkpoint`` writes the parts.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from sclkern.errors import UserError
from sclkern.io import sync
from sclkern.training.checkpoint import DamagedError, load_checkpoint, save_checkpoint

# In state.pt, {_PARTS: name} is in place of a tensor that is written in parts.
_PARTS = "in parts"
# What torch's metadata are made of; unpickling imports nothing else.
_ALLOWED = ("torch.distributed.checkpoint.", "collections.", "pathlib.")
_ALLOWED_NAMES = {"torch.Size", "torch.serialization._get_layout", "torch.storage._load_from_bytes"}


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_sharded(
    folder: Path, state: dict[str, Any], group: dist.ProcessGroup, commit: Callable[[], object] = lambda: None
) -> None:
    """Write a checkpoint together; all ranks call it. The folder has its name when all have written.

    Args:
        folder: to write; one that is there is replaced.
        state: plain values, whole tensors, which are the same on all ranks, and ``DTensor`` on CPUs.
        group: on CPUs, used for nothing else meanwhile.
        commit: called on rank 0 just before the folder gets its name.

    Raises:
        UserError: the operating system refused it to a rank: disk full, read-only, no permission. The same on all.
    """
    first = dist.get_rank(group) == 0
    temporary = folder.with_name(f".{folder.name}.0.tmp")
    _agree(group, folder, (lambda: _clear(temporary)) if first else None)
    parts: dict[str, Any] = {}
    plain = _take_out(state, (), parts)
    written = _agree(group, folder, lambda: _write_parts(temporary, parts, group))
    digests = {name: digest for of_rank in written for name, digest in of_rank.items()}

    def finish() -> None:
        if lost := [name for name in digests if not (temporary / name).exists()]:
            raise UserError(f"{temporary / lost[0]} was written by another rank and is not here: a folder not shared")
        save_checkpoint(temporary / "state.pt", {**plain, "files": digests})
        sync(temporary)
        commit()
        if folder.exists():
            remove(folder)
        temporary.rename(folder)
        sync(folder.parent)

    _agree(group, folder, finish if first else None)


def save_plain_values(folder: Path, state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Write the plain values of a checkpoint of ``save_sharded`` again, whose tensors have not changed since.

    Args:
        folder: of the checkpoint.
        state: as before, with other plain values.
        group: as before.

    Raises:
        UserError: the operating system refused it. The same on all ranks.
    """
    _agree(group, folder, None if dist.get_rank(group) else lambda: _rewrite(folder, state))


def remove(folder: Path) -> None:
    """Remove a checkpoint; first its name, so that no part of it is taken for one."""
    gone = folder.with_name(f".{folder.name}.old.0.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def load_sharded(folder: Path, *, in_parts: bool = False) -> dict[str, Any]:
    """Read a checkpoint of ``save_sharded``, whatever the number of processes that wrote it.

    Args:
        folder: to read.
        in_parts: whether tensors are only checked, and left to ``read_parts``; else they are read whole.

    Returns:
        The state, with whole tensors on the CPU, and ``format``.

    Raises:
        DamagedError: a file is missing, was cut short or has changed since it was written.
        UserError: cannot be read, or is a checkpoint of something else.
    """
    try:
        plain = load_checkpoint(folder / "state.pt")
    except UserError as error:
        if not (folder / "state.pt").exists():
            raise DamagedError(f"{folder}: not a whole checkpoint, without state.pt") from error
        raise
    for name, digest in plain.pop("files").items():
        try:
            now = _digest(folder / name)
        except OSError as error:
            raise DamagedError(f"{folder / name}: cannot be read ({error.strerror}), and is a part of it") from error
        if now != digest:
            raise DamagedError(f"{folder / name}: not whole; it was cut short or has changed since it was written")
    if in_parts:
        return plain
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _Reader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return _read_into(folder, plain, tensors)


def read_parts(folder: Path, state: dict[str, Any], into: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read this process's parts of the tensors that ``load_sharded(in_parts=True)`` has left out.

    Args:
        folder: of the checkpoint.
        state: without the tensors.
        into: tensors by their place in the state, such as "model/text.embedding.weight", each on the device and in
            parts as it is wanted.

    Returns:
        The state, with new tensors.

    Raises:
        KeyError: ``into`` lacks a tensor of the checkpoint.
        UserError: a tensor has another shape, or a file cannot be read.
    """
    return _read_into(folder, state, {name: torch.empty_like(into[name]) for name in _names(state)})


def _read_into(folder: Path, state: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this process reads by itself
        try:
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
        except dcp.api.CheckpointException as error:  # no Exception, in torch
            raise UserError(f"{folder}: cannot be read ({_reason(error)})") from error
    whole: dict[str, Any] = _put_in(state, tensors)
    return whole


class _Reader(dcp.FileSystemReader):
    """Reads the metadata without executing code from the file."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole.startswith(_ALLOWED) or whole in _ALLOWED_NAMES or isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{whole} is nothing of a checkpoint")


def _agree(group: dist.ProcessGroup, folder: Path, act: Callable[[], Any] | None) -> list[Any]:
    """Do something, on some ranks nothing; return what each has got, or raise on all what went wrong on one."""
    outcome: tuple[bool, Any]
    try:
        outcome = True, None if act is None else act()
    except (OSError, RuntimeError, UserError, dcp.api.CheckpointException) as error:
        outcome = False, _reason(error)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    for rank, (fine, value) in enumerate(outcomes):
        if not fine:
            raise UserError(
                f"{folder}: cannot be written by rank {rank} ({value}); those before it are kept; free space, correct "
                "the permissions or choose another directory"
            )
    return [value for _, value in outcomes]


def _reason(error: BaseException) -> str:
    """Why the operating system refused; torch wraps its error in others."""
    chain: list[BaseException | None] = [error, error.__cause__, error.__context__]
    if isinstance(error, dcp.api.CheckpointException):
        chain += [wrapped for wrapped, _ in error.failures.values()]
        error = chain[-1] or error
    system = next((e for e in chain if isinstance(e, OSError)), None)
    if system is not None and system.strerror:
        return system.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _clear(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_parts(temporary: Path, parts: dict[str, Any], group: dist.ProcessGroup) -> dict[str, str]:
    """Write this rank's parts; returns the digest of each of its files."""
    dcp.save(parts, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
    rank = dist.get_rank(group)
    own = sorted(temporary.glob(f"__{rank}_*")) + [temporary / ".metadata"] * (rank == 0)
    return {file.name: _digest(file) for file in own}


def _rewrite(folder: Path, state: dict[str, Any]) -> None:
    files = load_checkpoint(folder / "state.pt")["files"]
    save_checkpoint(folder / "state.pt", {**_take_out(state, (), {}), "files": files})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_out(value: Any, path: tuple[Any, ...], parts: dict[str, Any]) -> Any:
    if isinstance(value, DTensor):
        name = "/".join(map(str, path))
        parts[name] = value
        return {_PARTS: name}
    if isinstance(value, dict):
        return {key: _take_out(entry, (*path, key), parts) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_out(entry, (*path, index), parts) for index, entry in enumerate(value))
    return value


def _names(value: Any) -> Iterator[str]:
    """The places of the tensors that are left out."""
    if isinstance(value, dict) and value.keys() == {_PARTS}:
        yield value[_PARTS]
    elif isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _names(entry)


def _put_in(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_PARTS}:
            return tensors[value[_PARTS]]
        return {key: _put_in(entry, tensors) for key, entry in value.items()}
    return type(value)(_put_in(entry, tensors) for entry in value) if isinstance(value, (list, tuple)) else value
