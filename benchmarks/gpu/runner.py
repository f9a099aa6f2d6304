"""The runner of stages: each is a process with a share of the budget, recorded as it ends."""

from __future__ import annotations

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
from pathlib import Path

import torch

from benchmarks.gpu.plugin import LOG
from benchmarks.gpu.stages import ROOT, Stage
from sclkern.tools.bench import records
from sclkern.tools.bench.records import device_name

# Failing test functions of a stage that are printed.
MAX_SHOWN = 12


def commit() -> str:
    """The commit of the checkout; from the variable SCLKERN_COMMIT for a copy without history."""
    return os.environ.get("SCLKERN_COMMIT") or records.commit()


class Run:
    """Stages one after another; each outcome is written as soon as it is known.

    Attributes:
        output: folder of the records of all devices.
        commit: the commit under test.
        end: the end of the budget, in seconds of ``time.monotonic``.
        folder: folder of this device's files.
        records: the records of stages, JSON lines.
        test_log: a JSON line for each test as it ends.
        log: what pytest printed.
        dry: variables of a process that sees a stub of a GPU; None where there is one.
    """

    def __init__(self, output: Path, commit: str, budget: float, dry: dict[str, str] | None = None) -> None:
        self.dry = dry
        self.output, self.commit, self.end = output.resolve(), commit, time.monotonic() + budget
        self.folder = self.output / device_name()
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{time.strftime('%Y-%m-%d')}-{commit}"
        self.records = self.folder / f"{stem}-tests.jsonl"
        self.test_log = self.folder / f"{stem}-each.log"
        self.log = self.folder / f"{stem}-gpu.log"

    def finished(self) -> set[str]:
        """Stages that ran to their end for this commit, by the records here and in the project's results."""
        folders = {self.folder, records.RESULTS / device_name()}
        files = [file for folder in folders for file in folder.glob(f"*-{self.commit}-tests.jsonl")]
        rows = (json.loads(line) for file in files for line in file.read_text().splitlines())
        return {row["stage"] for row in rows if row.get("finished")}

    def run(self, stage: Stage, seconds: float) -> dict:
        """Run a stage for at most ``seconds`` and record it; returns the record."""
        start, lines_before = time.monotonic(), len(_lines(self.test_log))
        if stage.prefix and shutil.which(stage.prefix[0]) is None:
            return self.record(stage, {"finished": False, "problem": f"{stage.prefix[0]} is not on PATH"})
        if seconds < 5:
            return self.record(stage, {"finished": False, "problem": "no time left"})
        command = self.command(stage, seconds)
        given = os.environ if self.dry is None else self.dry
        path = os.pathsep.join(filter(None, [given.get("PYTHONPATH"), str(ROOT)]))
        environment = {**given, LOG: str(self.test_log.resolve()), "PYTHONPATH": path, **stage.environment}
        with self.log.open("a+b") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            offset = log.tell()
            # A process group of its own, so that it can be stopped whole.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
            try:
                status = self.wait(process, seconds)
            except (KeyboardInterrupt, SystemExit):
                outcome = summarise(_lines(self.test_log)[lines_before:])
                self.record(stage, {**outcome, "finished": False, "problem": "interrupted"})
                raise
            log.seek(offset)
            printed = log.read().decode(errors="replace")
        outcome = summarise(_lines(self.test_log)[lines_before:])
        # Status 1 of pytest: a test failed; 5: no test was selected.
        outcome |= {"finished": status in ((0,) if stage.module else (0, 1, 5)), "status": status}
        if status is None:
            outcome["problem"] = f"cut off after {seconds:.0f} s"
        elif status not in ((0,) if stage.module else (0, 1)):
            outcome["problem"] = next((line for line in reversed(printed.splitlines()) if line.strip()), "")[:200]
        if errors := re.findall(r"ERROR SUMMARY: (\d+) error", printed):
            outcome["sanitizer_errors"] = sum(map(int, errors))
        return self.record(stage, {**outcome, "seconds": round(time.monotonic() - start, 1)})

    def command(self, stage: Stage, seconds: float) -> list[str]:
        """The command line of a stage that has ``seconds``."""
        python = [*stage.prefix, sys.executable, "-m"]
        dry = stage.dry if self.dry is not None else ()
        if stage.module:
            # A smaller budget than the stage's, so that it ends by itself.
            limits = ["--budget", f"{max(0.9 * seconds, seconds - 20):.0f}", "--results", str(self.output)]
            return [*python, *stage.arguments, *limits, *dry]
        options = ["-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if stage.workers and self.dry is None and importlib.util.find_spec("xdist"):
            options += ["-n", str(stage.workers), "--max-worker-restart", "30", "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):
            # A kernel that hangs ends its process; no exception would.
            options += ["--timeout", "240" if stage.workers else "600", "--timeout-method", "thread"]
        if "--benchmark-only" in stage.arguments:
            options += ["--results", str(self.output)]
        return [*python, "pytest", "-q", "--tb=short", *options, *stage.arguments, *dry]

    def wait(self, process: subprocess.Popen, seconds: float) -> int | None:
        """The status of the process, None if it had to be stopped."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # The whole group, also when this process is interrupted. SIGINT first, so that pytest prints its results.
            for number, patience in ((signal.SIGINT, 8), (signal.SIGKILL, 8)):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(patience)

    def record(self, stage: Stage, outcome: dict) -> dict:
        """Append the record of a stage; returns it."""
        row = {"case": f"tests/{stage.name}", "stage": stage.name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        row |= {"device": device_name(), "commit": self.commit, "torch": torch.__version__}
        row |= outcome
        with self.records.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        return row


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def summarise(lines: Sequence[str]) -> dict:
    """Counts, failures and skips with their reasons, and the five slowest tests, from the lines of the test log."""
    tests: dict[str, dict] = {}
    for row in map(json.loads, lines):
        # A failed test stays failed, whatever its teardown or the loss of its worker reports later.
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
    """The record of a stage in a few lines: each failing function with the number of failures and the first reason."""
    # A module runs no tests.
    counts = ", ".join(f"{row[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if row.get(outcome))
    parts = [counts, f"in {row['seconds']:.0f} s" if "seconds" in row else "", row.get("problem", "")]
    if "sanitizer_errors" in row:
        parts.append(f"{row['sanitizer_errors']} memory errors")
    lines = [f"{row['stage']}: " + "; ".join(filter(None, parts))]
    functions: dict[str, list[str]] = {}
    for test, reason in row.get("failures", {}).items():
        functions.setdefault(test.partition("[")[0], []).append(f"{test.partition('[')[2].rstrip(']')}: {reason}")
    for function, reasons in list(functions.items())[:MAX_SHOWN]:
        lines.append(f"  {len(reasons)} x {function.removeprefix('tests/')} {reasons[0]}"[:200])
    if len(functions) > MAX_SHOWN:
        lines.append(f"  and {len(functions) - MAX_SHOWN} more functions")
    return "\n".join(lines)


def execute(selected: Sequence[Stage], run: Run) -> int:
    """Run the stages within the rest of the budget; returns 1 if any failed, had a problem or was cut off."""
    rows = []
    for index, stage in enumerate(selected):
        left = run.end - time.monotonic()
        share = left * stage.weight / sum(other.weight for other in selected[index:])
        # A dry run says nothing about time.
        rows.append(run.run(stage, left if run.dry else min(share, stage.max_seconds, left)))
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
