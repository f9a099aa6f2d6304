"""Loading checkpoints; loading never executes code from a file."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sclkern.errors import UserError

# In this order: a directory that holds several has the same weights in each.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# torch never resolves these, not even to a placeholder.
SYSTEM_MODULES = ("os", "posix", "nt", "sys")


class Placeholder:
    """Stands in for every class and function outside torch that a checkpoint names: takes anything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Load every tensor of a checkpoint.

    Loading never executes code from the file: pickles are loaded with ``weights_only=True``, and each class outside
    torch that they name becomes an inert placeholder.

    Args:
        path: safetensors; a file of ``torch.save`` (of a training checkpoint, the part under ``state_dict`` or
            ``model``); a TorchScript archive such as OpenAI's CLIP; or a directory with one of ``WEIGHT_FILES``.

    Returns:
        Tensors by name, on the CPU, memory-mapped where the format allows.

    Raises:
        UserError: no such file, not a checkpoint, cut short, refers to operating-system calls, or holds no tensor.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        tensors = _read_directory(path)
    elif not path.exists():
        raise UserError(f"{path}: no such file or directory, expected a checkpoint")
    else:
        tensors = _read_file(path)
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name, expected a checkpoint with model weights")
    return tensors


def _read_directory(path: Path) -> dict[str, Tensor]:
    file = next((path / name for name in WEIGHT_FILES if (path / name).exists()), None)
    if file is None:
        raise UserError(f"{path}: no weights in this directory, expected one of {', '.join(WEIGHT_FILES)}")
    if file.suffix != ".json":
        return _read_file(file)
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise UserError(f"{file}: no 'weight_map', expected the index of a sharded checkpoint; fetch the file again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if not (path / shard).exists():
            raise UserError(f"{path / shard}: no such file, but {file.name} lists it; fetch the missing shard")
        tensors |= _read_file(path / shard)
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            start = file.read(30)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; run 'git lfs pull' where it came from")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return _read_torchscript(path)
        content = _load_pickle(path)
    except UserError:
        raise
    # A damaged file makes its reader fail in any way it can: struct, pickle, zip, Unicode, key and memory errors.
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint, it is cut short, damaged or of another format "
            f"({_one_line(error)}); copy or download it again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _load_pickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # torch.save before 1.6
        return torch.load(path, map_location="cpu", weights_only=True)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if calls := sorted(name for name in unknown if name.split(".")[0] in SYSTEM_MODULES):
        raise UserError(f"{path}: refers to {calls[0]}, an operating-system call, refused; take weights you can trust")
    placeholders: list[Any] = [(type(name.rpartition(".")[2], (Placeholder,), {}), name) for name in unknown]
    with torch.serialization.safe_globals(placeholders):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        code = (name for name in archive.namelist() if "/code/" in name and name.endswith(".py"))
        # The only method that loading would run.
        if any(b"__setstate__" in archive.read(name) for name in code):
            raise UserError(
                f"{path}: has code that runs on loading, refused; save its state_dict as safetensors instead"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(torch.jit.load(path, map_location="cpu").state_dict())


def read_json(path: Path) -> dict[str, Any]:
    """Load a JSON object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        UserError: no such file, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def _one_line(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        error = error.__context__  # torch's own error surrounds this with advice to load unsafely
    text = str(error).partition("Please use `torch")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"
