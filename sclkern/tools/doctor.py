"""What this machine has, and which backend each op takes on it. Requires torch only."""

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
from sclkern.libraries import apex, flash
from sclkern.tools.specs import SPECS

PACKAGES = ("triton", "transformers", "timm", "torchvision", "numpy")
# Name -> module that must import. PyPI's "apex" is not NVIDIA's, and has no such module.
OPTIONAL = {"flash-attn": "flash_attn", "apex": "apex.normalization", "nvtx": "nvtx", "liger-kernel": "liger_kernel"}
VARIABLES = (
    "SCLKERN_BACKEND", "SCLKERN_DEBUG", "SCLKERN_LOG", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "GOMP_SPINCOUNT",
)  # fmt: skip
# File systems that are on a network.
NETWORK = (
    "9p", "afs", "beegfs", "ceph", "cifs", "gcsfuse", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "s3fs",
    "smb3", "sshfs", "wekafs",
)  # fmt: skip
MOUNTS = Path("/proc/mounts")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def examine() -> dict[str, Any]:
    """Collect everything that ``sclkern doctor`` shows, as plain types."""
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
        "chosen_by_name": _chosen_by_name(torch.device(device)),
        "triton_cache": _cache(),
        "ops": {op: {_name(dtype): _choice(op, dtype, device) for dtype in DTYPES} for op in ops.OPS},
    }


def format_report(findings: dict[str, Any]) -> str:
    """Format the findings as text.

    Args:
        findings: from ``examine``.

    Returns:
        A line for each group of findings and for each op.
    """
    lines = [f"sclkern {findings['sclkern']}, Python {findings['python']}, torch {findings['torch']}"]
    lines[0] += f", CUDA {findings['cuda']}" if findings["cuda"] else ", without CUDA"
    lines.append(_listed("packages", findings["packages"], "not installed"))
    lines.append(
        _listed("optional", {name: "yes" if present else None for name, present in findings["optional"].items()}, "no")
    )
    lines.append(_listed("environment", findings["environment"], "not set"))
    lines += [
        f"device {d['index']}: {d['name']}, compute capability {d['capability']}, {d['memory_gib']} GiB"
        for d in findings["devices"]
    ] or ["devices: torch sees no GPU"]
    cache = findings["triton_cache"]
    lines.append(f"Triton's cache: {cache['path']} ({cache['file_system'] or 'unknown file system'})")
    if cache["network"]:
        lines.append("  on a network: set TRITON_CACHE_DIR to a local folder, or every process waits for it")
    lines.append("chosen by name:")
    width = max(map(len, findings["chosen_by_name"]))
    for setting, problems in findings["chosen_by_name"].items():
        lines.append(f"  {setting:<{width}}  {'can run' if not problems else 'cannot run: ' + '; '.join(problems)}")
    lines.append("ops on this machine:")
    width = max(map(len, findings["ops"]))
    for op, choices in findings["ops"].items():
        # Most often, one line is true of all dtypes.
        by_choice: dict[str, list[str]] = {}
        for dtype, choice in choices.items():
            by_choice.setdefault(choice, []).append(dtype)
        for choice, dtypes in by_choice.items():
            lines.append(f"  {op:<{width}}  {', '.join(dtypes)}: {choice}")
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
    except Exception:  # importing a broken or unrelated package may raise anything
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


def _chosen_by_name(device: torch.device) -> dict[str, tuple[str, ...]]:
    """The settings of a run that take another library in place of ours, each with the reasons why it cannot run."""
    return {
        "run.backend=flash": flash.problems(device),
        "run.layer_norm=apex": apex.layer_norm_problems(device),
        "optimizer.name=apex": apex.adam_problems(device),
    }


def _cache() -> dict[str, Any]:
    """Triton's cache folder, as Triton finds it, and its file system where the operating system lists them."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    path = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache").resolve()
    kind = None
    if MOUNTS.exists():
        mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
        # The last of the deepest: a later mount hides an earlier one on the same folder.
        around = [
            (len(Path(place).parts), order, fs)
            for order, (place, fs) in enumerate(mounts)
            if path.is_relative_to(place)
        ]
        kind = max(around)[2] if around else None
    return {"path": str(path), "file_system": kind, "network": kind is not None and _is_network(kind)}


def _is_network(file_system: str) -> bool:
    return file_system.removeprefix("fuse.") in NETWORK


def _choice(op: str, dtype: torch.dtype, device: str) -> str:
    """The path of a small call of ``op``, and why, as text."""
    inputs = SPECS[op].small_inputs(6, device)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    try:
        return str(ops.explain(op, **inputs))
    except ValueError as error:  # the environment requests a backend that cannot run
        return f"error: {error}"
