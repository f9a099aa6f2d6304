"""On a GPU: the tests that need one, then the benchmarks by priority, within a budget of seconds.

`make gpu BUDGET=400`, or `python -m benchmarks.gpu --budget 400 [--only GROUPS] [--resume]`, with the groups of
`benchmarks/gpu/stages.py`. Needs torch, transformers, timm, pytest and pytest-benchmark. pytest-xdist (several
processes, a new one after a lost CUDA context), pytest-timeout and hypothesis are used where they are installed.

Files go to --output, by default the folder in the variable OUT, otherwise `benchmarks/results`. In it, `<device>/` gets
the records of the benchmarks, `<date>-<commit>-tests.jsonl` with a record of each stage, `...-each.log` with a line of
JSON for each test, both written as they end, and `...-gpu.log` with all that pytest printed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.runner import Run, commit, execute
from benchmarks.gpu.stages import ONLY_BY_NAME, ROOT, stages
from sclkern.tools.bench import records


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    groups = list(dict.fromkeys(stage.group for stage in stages()))
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=400, help="seconds for all stages (default 400)")
    parser.add_argument(
        "--only", help=f"groups, by commas: {', '.join(groups)} (default: all except {', '.join(ONLY_BY_NAME)})"
    )
    parser.add_argument("--resume", action="store_true", help="leave out stages already recorded for this commit")
    parser.add_argument("--output", type=Path, help="folder (default: OUT, otherwise benchmarks/results)")
    parser.add_argument(
        "--dry-run", action="store_true", help="run every stage, small, on a stub of a GPU; into a temporary folder"
    )
    options = parser.parse_args(arguments)
    options.groups = options.only.split(",") if options.only else [g for g in groups if g not in ONLY_BY_NAME]
    if unknown := set(options.groups) - set(groups):
        parser.error(f"--only: got {sorted(unknown)}, expected some of {', '.join(groups)}")
    return options


def default_output() -> str:
    return os.environ.get("OUT") or str(records.RESULTS)


def _stub() -> dict[str, str]:
    """Make torch see a GPU here, and return the variables with which the stages see it, and take one case of each."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import stub_gpu

    stub_gpu.install()
    return {**stub_gpu.environment(), "PYTEST_PLUGINS": "stub_gpu.sizes"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    dry = _stub() if options.dry_run else None
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; `make test` runs what needs none, and --dry-run everything on a stub")
        return 2
    output = options.output or Path(tempfile.mkdtemp(prefix="sclkern-dry-run-") if dry else default_output())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended and recorded
    run = Run(output, commit(), options.budget, dry)
    done = run.finished() if options.resume else set()
    with contextlib.nullcontext() if dry else compiling_ahead(run):
        return execute([s for s in stages() if s.group in options.groups and s.name not in done], run)


@contextlib.contextmanager
def compiling_ahead(run: Run) -> Iterator[None]:
    """Compile beside the stages; a kernel that two processes compile is compiled twice, and harms nothing."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with run.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.compile_ahead"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
