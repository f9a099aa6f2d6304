"""On a GPU: the tests that need one, then the benchmarks by importance, within a budget of seconds.

`make gpu BUDGET=540`, or `python -m benchmarks.gpu --budget 540 [--only GROUPS] [--resume]`, with the groups of
`stages` below. Needs torch, transformers, timm, pytest and pytest-benchmark; pytest-xdist (several processes, a new one
after a lost CUDA context), pytest-timeout and hypothesis are used where they are installed.

Under --output, by default the folder that the variable OUT names, else `benchmarks/results`: in `<device>/`,
`<date>-<commit>-tests.jsonl` with a record of each stage as it ends, `...-each.log` with a line of JSON for each test
as it ends, `...-gpu.log` with all that pytest printed; and the records of the benchmarks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu_plugin import LOG
from sclkern.tools.bench import records
from sclkern.tools.bench.records import device_name

ROOT = Path(__file__).parent.parent
SHOWN = 12  # failing test functions of a stage
BY_NAME = ("sanitizer", "tune", "training")  # groups that run where --only names them


@dataclass(frozen=True)
class Stage:
    """One call of pytest, or of a script.

    Attributes:
        group: what ``--only`` names.
        weight: its share of the time that is left, against those of the stages that follow.
        most: seconds at most.
        workers: processes, where pytest-xdist is installed; 0 for none besides pytest's own, as benchmarks need it.
        prefix: command before that of Python.
        script: ``arguments`` are a file of Python, which takes ``--budget`` and ``--results``.
    """

    name: str
    group: str
    arguments: Sequence[str]
    weight: float
    most: float = float("inf")
    workers: int = 0
    prefix: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    script: bool = False


def files_that_use_a_gpu(tests: Path = ROOT / "tests") -> list[str]:
    """The tests of ops and modules, which run kernels where there is a GPU, and others with a test marked for one."""
    own = {"gpu", "ops", "nn"}
    files = (file for file in sorted(tests.rglob("test_*.py")) if file.parent.name not in own)
    return [str(tests / "ops"), str(tests / "nn"), *(str(f) for f in files if "pytest.mark.gpu" in f.read_text())]


def stages() -> list[Stage]:
    """All stages in the order in which they run, most important first."""
    smoke, large = "tests/gpu/test_smoke.py", "tests/gpu/test_large_tensors.py"
    whole = [
        f"tests/gpu/test_{name}.py" for name in ("step_on_a_gpu", "accuracy", "cuda_graphs", "repeatability", "profile")
    ]
    # What is interpreted or only compiled is tested without a GPU.
    kernels = [*files_that_use_a_gpu(), "-k", "not in_the_interpreter"]
    # Each worker would start one of torch.compile's own for every core.
    one_compiler = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # A worker holds up to 10 GiB of GPU memory in float64.
    found = [
        Stage("smoke", "smoke", [smoke], 20, most=90, workers=4),
        Stage("tests/whole", "tests", [*whole, "tests/gpu/test_compiled.py"], 6, workers=6, environment=one_compiler),
        Stage("tests/kernels", "tests", kernels, 6, workers=8),
        Stage("tests/large", "tests", [large], 3, workers=1),
        Stage("step", "step", ["--benchmark-only", "benchmarks/cases/test_step.py"], 4),
        Stage("models", "models", ["--benchmark-only", "benchmarks/cases/test_models.py"], 1, most=120),
    ]
    for importance, weight in ((1, 4), (2, 2), (3, 1)):
        arguments = ["--benchmark-only", "--importance", str(importance), "benchmarks/cases/test_ops.py"]
        found.append(Stage(f"ops/{importance}", "ops", arguments, weight))
    for tool in ("memcheck", "initcheck"):
        prefix = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", "--error-exitcode", "1"]
        # Each tensor its own allocation, so that a write past the end is seen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Stage(f"sanitizer/{tool}", "sanitizer", [smoke], 1, prefix=prefix, environment=alone))
    found.append(Stage("tune", "tune", ["benchmarks/tune.py"], 1, script=True))
    training = ["benchmarks/pretraining.py", "--ways", "fused,eager,graphs", "--profile"]
    found.append(Stage("training", "training", training, 6, script=True))
    return found


def commit() -> str:
    """That of the checkout; from the variable SCLKERN_COMMIT for a copy without history."""
    return os.environ.get("SCLKERN_COMMIT") or records.commit()


class Run:
    """Stages one after another, each outcome written as it is known."""

    def __init__(self, output: Path, commit: str, budget: float) -> None:
        self.output, self.commit, self.end = output.resolve(), commit, time.monotonic() + budget
        self.folder = self.output / device_name()
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{time.strftime('%Y-%m-%d')}-{commit}"
        self.records, self.each, self.log = (
            self.folder / f"{stem}-{end}" for end in ("tests.jsonl", "each.log", "gpu.log")
        )

    def finished(self) -> set[str]:
        """Stages recorded as run to their end for this commit, here or in the project's results."""
        files = {
            f
            for folder in (self.folder, records.RESULTS / device_name())
            for f in folder.glob(f"*-{self.commit}-tests.jsonl")
        }
        rows = (json.loads(line) for file in files for line in file.read_text().splitlines())
        return {row["stage"] for row in rows if row.get("finished")}

    def run(self, stage: Stage, seconds: float) -> dict:
        """Run a stage, for so many seconds at most, and record it."""
        start, lines = time.monotonic(), len(_lines(self.each))
        if stage.prefix and shutil.which(stage.prefix[0]) is None:
            return self.record(stage, {"finished": False, "problem": f"{stage.prefix[0]} is not on PATH"})
        if seconds < 5:
            return self.record(stage, {"finished": False, "problem": "no time left"})
        plugins = ["-p", "benchmarks.gpu_plugin", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if stage.workers and importlib.util.find_spec("xdist"):
            plugins += ["-n", str(stage.workers), "--max-worker-restart", "30", "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):
            # A kernel that hangs ends its process, which no exception would.
            plugins += ["--timeout", "240" if stage.workers else "600", "--timeout-method", "thread"]
        if "--benchmark-only" in stage.arguments:
            plugins += ["--results", str(self.output)]
        command = [*stage.prefix, sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins, *stage.arguments]
        if stage.script:
            # Less than it has here, so that it ends by itself.
            own = ["--budget", f"{max(0.9 * seconds, seconds - 20):.0f}", "--results", str(self.output)]
            command = [*stage.prefix, sys.executable, *stage.arguments, *own]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, LOG: str(self.each.resolve()), "PYTHONPATH": path, **stage.environment}
        with self.log.open("a+b") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            offset = log.tell()
            # A group of its own, to be stopped whole; no more apart than that, to end with what started this process.
            group = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, **group
            )
            try:
                status = self.wait(process, seconds)
            except (KeyboardInterrupt, SystemExit):
                outcome = summarise(_lines(self.each)[lines:])
                self.record(stage, {**outcome, "finished": False, "problem": "interrupted"})
                raise
            log.seek(offset)
            printed = log.read().decode(errors="replace")
        outcome = summarise(_lines(self.each)[lines:])
        # Of pytest, 1: a test failed; 5: none was chosen.
        outcome |= {"finished": status in ((0,) if stage.script else (0, 1, 5)), "status": status}
        if status is None:
            outcome["problem"] = f"cut off after {seconds:.0f} s"
        elif status not in ((0,) if stage.script else (0, 1)):
            outcome["problem"] = next((line for line in reversed(printed.splitlines()) if line.strip()), "")[:200]
        if errors := re.findall(r"ERROR SUMMARY: (\d+) error", printed):
            outcome["sanitizer_errors"] = sum(map(int, errors))
        return self.record(stage, {**outcome, "seconds": round(time.monotonic() - start, 1)})

    def wait(self, process: subprocess.Popen, seconds: float) -> int | None:
        """The status of the process, None if it had to be stopped."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # The whole group, also where this process is interrupted: gently, so that pytest prints what it has.
            for number, patience in ((signal.SIGINT, 8), (signal.SIGKILL, 8)):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(patience)

    def record(self, stage: Stage, outcome: dict) -> dict:
        row = {"case": f"tests/{stage.name}", "stage": stage.name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        row |= {"device": device_name(), "commit": self.commit, "torch": torch.__version__}
        row |= outcome
        with self.records.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        return row


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def summarise(lines: Sequence[str]) -> dict:
    """Counts, failed tests with their reasons, reasons of skipping, the five slowest; from the line of each test."""
    tests: dict[str, dict] = {}
    for row in map(json.loads, lines):
        # A failure stays one: a test's teardown and the loss of its worker are told apart from it.
        if tests.get(row["test"], {}).get("outcome") != "failed":
            tests[row["test"]] = row
    counts = Counter(row["outcome"] for row in tests.values())
    failures = {name: row["reason"] for name, row in tests.items() if row["outcome"] == "failed"}
    reasons = Counter(row["reason"] for row in tests.values() if row["outcome"] == "skipped")
    slowest = sorted(tests.values(), key=lambda row: -row["seconds"])[:5]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": failures,
        "skip_reasons": dict(reasons.most_common(8)),
        "slowest": {row["test"]: row["seconds"] for row in slowest},
    }


def describe(row: dict) -> str:
    """The record of a stage in a few lines: the failing functions, each with how often and the first reason."""
    # A script runs no tests.
    counts = ", ".join(f"{row[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if row.get(outcome))
    parts = [counts, f"in {row['seconds']:.0f} s" if "seconds" in row else "", row.get("problem", "")]
    if "sanitizer_errors" in row:
        parts.append(f"{row['sanitizer_errors']} errors of memory")
    lines = [f"{row['stage']}: " + "; ".join(filter(None, parts))]
    functions: dict[str, list[str]] = {}
    for test, reason in row.get("failures", {}).items():
        functions.setdefault(test.partition("[")[0], []).append(f"{test.partition('[')[2].rstrip(']')}: {reason}")
    for function, reasons in list(functions.items())[:SHOWN]:
        lines.append(f"  {len(reasons)} x {function.removeprefix('tests/')} {reasons[0]}"[:200])
    if len(functions) > SHOWN:
        lines.append(f"  and {len(functions) - SHOWN} more functions")
    return "\n".join(lines)


def execute(chosen: Sequence[Stage], run: Run) -> int:
    """Run the stages within what is left of the budget; 1 if any failed, had a problem or was cut off."""
    rows = []
    for index, stage in enumerate(chosen):
        left = run.end - time.monotonic()
        share = left * stage.weight / sum(other.weight for other in chosen[index:])
        rows.append(run.run(stage, min(share, stage.most, left)))
        print(describe(rows[-1]), flush=True)
    totals = {outcome: sum(row.get(outcome, 0) for row in rows) for outcome in ("passed", "failed", "skipped")}
    bad = [
        r["stage"]
        for r in rows
        if not r["finished"] or r.get("failed") or r.get("problem") or r.get("sanitizer_errors")
    ]
    summary = {
        "case": "tests",
        "device": device_name(),
        "commit": run.commit,
        **totals,
        "stages": len(rows),
        "not_clean": bad,
    }
    with run.records.open("a") as stream:
        stream.write(json.dumps(summary) + "\n")
    print(f"records and log: {run.folder}")
    print(json.dumps(summary))
    return 1 if bad else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    groups = list(dict.fromkeys(stage.group for stage in stages()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it (default 540)")
    parser.add_argument(
        "--only", help=f"groups, by commas: {', '.join(groups)} (default: all but {', '.join(BY_NAME)})"
    )
    parser.add_argument("--resume", action="store_true", help="leave out stages already recorded for this commit")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or records.RESULTS), help="folder")
    options = parser.parse_args(arguments)
    options.groups = options.only.split(",") if options.only else [g for g in groups if g not in BY_NAME]
    if unknown := set(options.groups) - set(groups):
        parser.error(f"--only: got {sorted(unknown)}, expected some of {', '.join(groups)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; `make test` runs what needs none")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage under way is ended and recorded
    run = Run(options.output, commit(), options.budget)
    done = run.finished() if options.resume else set()
    return execute([s for s in stages() if s.group in options.groups and s.name not in done], run)


if __name__ == "__main__":
    sys.exit(main())
