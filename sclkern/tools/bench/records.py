"""Records of benchmarks: one JSON line each, flushed as it is made, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sclkern
from sclkern.errors import UserError

SOURCE = Path(sclkern.__file__).resolve().parents[1]
# In the source tree; for an installed package, in the working directory.
RESULTS = (SOURCE if (SOURCE / "benchmarks").is_dir() else Path()) / "benchmarks" / "results"


def device_name() -> str:
    """The folder of a machine's records."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}threads"


@cache
def commit() -> str:
    """The short hash of the checkout, with "-dirty" where a file other than a record differs; "unknown" outside git.

    The environment variable ``SCLKERN_COMMIT`` names it for a copy of the tree without history.
    """
    if "SCLKERN_COMMIT" in os.environ:
        return os.environ["SCLKERN_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCE), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


@cache
def environment() -> dict[str, Any]:
    """What a figure depends on besides the code: versions, device, driver, clocks in MHz, threads, processor."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    details = {
        "device": device_name(),
        "commit": commit(),
        "sclkern": sclkern.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "processors": os.cpu_count(),
    }
    if torch.cuda.is_available():
        details |= {"device_name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        details |= {"cudnn": torch.backends.cudnn.version(), **_driver()}
    return details


def made_by() -> dict[str, Any]:
    """What a result of a model names of the code and the machine that made it."""
    return {name: environment()[name] for name in ("device", "commit", "sclkern", "torch")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _driver() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def append(case: str, *, results: Path = RESULTS, **values: Any) -> Path:
    """Append a record to ``results/<device>/<date>-<commit>.jsonl``.

    Args:
        case: what was measured, such as "op/bias_gelu/64x325/bfloat16/both/sclkern".
        results: folder of the records.
        **values: JSON values: figures in seconds, bytes, and bytes or FLOPs per second, and what they depend on. A
            "device" and a "commit" among them say that another process has measured, as ``made_by`` told it.

    Returns:
        The file.
    """
    here = {} if "device" in values else environment()
    row = {"case": case, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **here, **values}
    folder = Path(results) / row["device"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{time.strftime('%Y-%m-%d')}-{row['commit']}.jsonl"
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return file


def read(files: Iterable[Path | str]) -> list[dict[str, Any]]:
    """Read records; only the newest record of a case on a machine is returned.

    Args:
        files: files of records, and folders of which every .jsonl is read. A last line without its end is a write that
            was cut off, and is skipped.

    Returns:
        Records as JSON, with the name of their "file".

    Raises:
        UserError: a file does not exist, or a line is not a record.
    """
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    paths: list[Path] = []
    for path in map(Path, files):
        if not path.exists():
            raise UserError(f"{path} does not exist, expected a file of records or a folder of them")
        # "-each" is a log of single tests (benchmarks/gpu/runner.py).
        inside = sorted(file for file in path.rglob("*.jsonl") if not file.stem.endswith("-each"))
        paths += inside if path.is_dir() else [path]
    for file in paths:
        lines = file.read_text().split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                key = (row["device"], row["case"], row.get("rows"))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    continue
                raise UserError(f"{file}:{number}: not a record: {error}") from error
            # File names start with a date.
            row = {"file": file.name, **row}
            older = newest.get(key)
            if older is None or _age(older) <= _age(row):
                newest[key] = row
    return list(newest.values())


def _age(row: dict[str, Any]) -> str:
    return row.get("time", row["file"][:10])
