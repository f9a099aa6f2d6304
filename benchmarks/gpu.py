"""GPU tests, then benchmarks by importance, within a budget of seconds (`make gpu BUDGET=540`).

Runs with nothing installed but torch, transformers, timm, pytest, pytest-benchmark and hypothesis: only test files that
use a GPU are collected. Every benchmark appends its record to ``benchmarks/results`` as it is made, so a run that is
cut off keeps what it measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Most important first.
BENCHMARKS = ["benchmarks/test_step.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it")
    end = time.monotonic() + parser.parse_args().budget
    tests = sorted(str(f) for f in (ROOT / "tests").rglob("test_*.py") if "torch.cuda.is_available()" in f.read_text())
    status = _pytest(tests, end)
    for file in BENCHMARKS:
        status = _pytest(["--benchmark-only", file], end) or status
    return status


def _pytest(arguments: list[str], end: float) -> int:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
    left = end - time.monotonic()
    if left < 5:
        print("no time left for:", *arguments)
        return 1
    print("$", *command, flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, timeout=left).returncode
    except subprocess.TimeoutExpired:
        print("cut off by the budget:", *arguments)
        return 1


if __name__ == "__main__":
    sys.exit(main())
