"""Records: one JSON line a case, appended as it is made."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}threads"


@pytest.fixture(scope="session")
def record():
    """record(case, **values): append to ``results/<device>/<date>-<commit>.jsonl``."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    commit = (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if git("status", "--porcelain") else "")
    file = RESULTS / device_name() / f"{time.strftime('%Y-%m-%d')}-{commit}.jsonl"

    def append(case: str, **values) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"case": case, "device": device_name(), "commit": commit, "torch": torch.__version__, **values}
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    return append
