"""Loading checkpoints; loading never executes code from a file."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sclkern.errors import UserError
from sclkern.weights.pickles import SavedFile, entries_of, is_tensor

# In this order: a directory that holds several has the same weights in each.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What else a training checkpoint holds stands beside one of these.
PARTS = ("state_dict", "model", "model_state_dict", "module")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Load every tensor of a checkpoint.

    Loading never executes code from the file: see ``sclkern.weights.pickles``.

    Args:
        path: safetensors; a file of ``torch.save`` (see ``select_weights`` for training checkpoints); a TorchScript
            archive such as OpenAI's CLIP; or a directory with one of ``WEIGHT_FILES``. What a file is, its content
            says, whatever its name.

    Returns:
        Tensors by name, on the CPU, memory-mapped where the format allows.

    Raises:
        UserError: no such file, not a checkpoint, cut short, damaged, refers to operating-system calls, holds no tensor
            or several sets of weights.
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
        held = _read_file(path / shard)
        # Another shard may hold an older tensor of the name.
        listed = [name for name, of_shard in weight_map.items() if of_shard == shard]
        if absent := [name for name in listed if name not in held]:
            raise UserError(
                f"{path / shard}: no tensor {absent[0]!r}, but {file.name} lists it there; fetch both files again"
            )
        tensors |= {name: held[name] for name in listed}
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; run 'git lfs pull' where it came from")
    try:
        return _read_content(path, start)
    except UserError:
        raise
    # A damaged file makes its reader fail in any way it can: struct, pickle, zip, Unicode, key and memory errors.
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint, it is cut short, damaged or of another format "
            f"({_one_line(error)}); copy or download it again"
        ) from error


def _read_content(path: Path, start: bytes) -> dict[str, Tensor]:
    if not start.strip(b"\0"):
        raise EOFError("nothing but zero bytes at its start" if start else "it is empty")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError("it is a web page")
    if start[8:9] == b"{":
        return load_file(path)
    if is_torchscript(path):
        return _read_torchscript(path)
    saved = SavedFile(path)
    try:
        tensors = select_weights(saved.content, str(path))
    except RecursionError as error:
        raise ValueError("its objects hold each other") from error
    return {name: _made(saved, name, tensor) for name, tensor in tensors.items()}


def _made(saved: SavedFile, name: str, tensor: Any) -> Tensor:
    try:
        return saved.tensor(tensor)
    except TypeError as error:
        raise UserError(
            f"{saved.path}: {name} is no plain tensor ({error}), expected dense values; convert it where it came from "
            "and save it again"
        ) from error


def select_weights(content: object, where: str) -> dict[str, Any]:
    """Find the weights in what a checkpoint holds.

    Args:
        content: tensors by name; or a mapping or an object that has them, or a whole module, under one of ``PARTS`` or
            alone under another key. A stand-in of ``SavedFile`` counts as what it is in place of.
        where: the source, for messages.

    Returns:
        Tensors, or their stand-ins, by name; {} if there are none.

    Raises:
        UserError: there are several sets of weights, none of them under one of ``PARTS``.
    """
    for key in PARTS:
        part = entries_of(content).get(key)
        if entries_of(part):
            content = part
    if found := _named_tensors(content):
        return found
    sets = {str(key): named for key, part in entries_of(content).items() if (named := _named_tensors(part))}
    if len(sets) > 1:
        raise UserError(
            f"{where}: holds {len(sets)} sets of weights, {', '.join(map(repr, sets))}, expected one; save that alone, "
            "or give it as a mapping"
        )
    return next(iter(sets.values()), {})


def _named_tensors(part: object) -> dict[str, Any]:
    """The tensors of a mapping, or of a whole module that was pickled."""
    entries = entries_of(part)
    if not {"_parameters", "_buffers", "_modules"} <= entries.keys():
        return {str(name): value for name, value in entries.items() if isinstance(value, Tensor) or is_tensor(value)}
    named: dict[str, Any] = {}
    for kind in ("_parameters", "_buffers"):
        named |= {str(name): value for name, value in entries_of(entries[kind]).items() if is_tensor(value)}
    for name, module in entries_of(entries["_modules"]).items():
        named |= {f"{name}.{inner}": value for inner, value in _named_tensors(module).items()}
    return named


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
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
