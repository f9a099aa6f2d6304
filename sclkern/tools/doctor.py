"""What this machine has, and which backend each op takes on it; needs nothing but torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sclkern import __version__, ops

PACKAGES = ("triton", "transformers", "timm", "torchvision", "numpy")
# Import name, and what must be in it: on PyPI, "apex" is another package than NVIDIA's.
OPTIONAL = {"flash-attn": "flash_attn", "apex": "apex.normalization", "nvtx": "nvtx", "liger-kernel": "liger_kernel"}
VARIABLES = ("SCLKERN_BACKEND", "SCLKERN_DEBUG", "TRITON_INTERPRET", "TRITON_CACHE_DIR")
NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "panfs",
    "smb3",
    "wekafs",
}
MOUNTS = Path("/proc/mounts")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows, heads and channels that every op has a kernel for.
EXAMPLE = (2, 3, 4, 64)


def examine() -> dict[str, Any]:
    """Everything that ``sclkern doctor`` tells, as plain types."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "sclkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: _present(place) for name, place in OPTIONAL.items()},
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if device == "cuda" else [],
        "triton_cache": _cache(),
        "ops": {op: {_name(dtype): _backend(op, dtype, device) for dtype in DTYPES} for op in ops.OPS},
    }


def format_report(found: dict[str, Any]) -> str:
    lines = [f"sclkern {found['sclkern']}, Python {found['python']}, torch {found['torch']}"]
    lines[0] += f", CUDA {found['cuda']}" if found["cuda"] else ", without CUDA"
    lines.append(_listed("packages", found["packages"], "not installed"))
    lines.append(
        _listed("optional", {name: "yes" if there else None for name, there in found["optional"].items()}, "no")
    )
    lines.append(_listed("environment", found["environment"], "not set"))
    lines += [
        f"device {d['index']}: {d['name']}, compute capability {d['capability']}, {d['memory_gib']} GiB"
        for d in found["devices"]
    ] or ["devices: torch sees no GPU"]
    cache = found["triton_cache"]
    lines.append(f"Triton's cache: {cache['path']} ({cache['file_system'] or 'unknown file system'})")
    if cache["network"]:
        lines.append("  on a network: set TRITON_CACHE_DIR to a local folder, or every process waits for it")
    lines.append("ops on this machine:")
    width = max(map(len, found["ops"]))
    for op, answers in found["ops"].items():
        # Most often one answer serves all types.
        by_answer: dict[str, list[str]] = {}
        for dtype, answer in answers.items():
            by_answer.setdefault(answer, []).append(dtype)
        for answer, dtypes in by_answer.items():
            lines.append(f"  {op:<{width}}  {', '.join(dtypes)}: {answer}")
    return "\n".join(lines)


def _listed(title: str, values: dict[str, str | None], absent: str) -> str:
    return f"{title}: " + ", ".join(f"{name} {absent if value is None else value}" for name, value in values.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _present(place: str) -> bool:
    package, _, attribute = place.partition(".")
    try:
        if not attribute:
            return importlib.util.find_spec(package) is not None
        importlib.import_module(place)
    except Exception:  # a broken or foreign package may raise anything when it is imported
        return False
    return True


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _cache() -> dict[str, Any]:
    """Triton's cache folder, found as Triton finds it, and the file system below it where the kernel lists them."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    path = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache").resolve()
    kind = None
    if MOUNTS.exists():
        mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
        # The last of the deepest: a later mount hides an earlier one at the same place.
        below = [
            (len(Path(place).parts), order, fs)
            for order, (place, fs) in enumerate(mounts)
            if path.is_relative_to(place)
        ]
        kind = max(below)[2] if below else None
    return {"path": str(path), "file_system": kind, "network": kind is not None and _is_network(kind)}


def _is_network(file_system: str) -> bool:
    return file_system.removeprefix("fuse.") in NETWORK | {"sshfs", "s3fs", "gcsfuse"}


def _backend(op: str, dtype: torch.dtype, device: str) -> str:
    try:
        return str(ops.explain(op, torch.zeros(EXAMPLE, dtype=dtype, device=device)))
    except ValueError as error:  # the environment asks for what cannot run
        return f"error: {error}"
