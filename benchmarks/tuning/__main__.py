"""Launch configurations beside the selected ones: examined without a GPU, measured on one, reported from records.

    python -m benchmarks.tuning --plan                  compile all for sm_90, write benchmarks/tuning/candidates.json
    python -m benchmarks.tuning --budget 300 [--op attention,bias_gelu] [--size 325]
    python -m benchmarks.tuning --report [FILES]

A candidate's values are passed to its kernels for its own measurement alone (``sclkern.kernels.config.override``), and
it is timed only after it was as right as ``benchmarks/harness/verification.py`` asks of every op. Each is a record
``tune/<op>/<size>/<dtype>/<pass>/<choice>/<config>``, whatever became of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.tuning.candidates import Candidate, groups
from benchmarks.tuning.plan import examined, plan_table, survivors, write_plan
from benchmarks.tuning.report import report
from benchmarks.tuning.run import context_is_lost, ordered, precompile, tune
from sclkern.errors import UserError
from sclkern.tools.bench import records, roofline
from sclkern.tools.bench.roofline import MachineSpec
from sclkern.tools.static import workers


def selected(ops: str | None, sizes: str | None) -> list[list[Candidate]]:
    """The groups of these ops and sizes, both by commas; None takes all."""
    every, wanted = groups(), (ops and ops.split(","), sizes and sizes.split(","))
    chosen = every
    for name, names, of in zip(("op", "size"), wanted, (lambda c: c.op, lambda c: c.size.name), strict=True):
        known = dict.fromkeys(of(group[0]) for group in every)
        if unknown := set(names or ()) - set(known):
            raise UserError(f"--{name}: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
        chosen = [group for group in chosen if not names or of(group[0]) in names]
    if not chosen:
        raise UserError(f"--op {ops} --size {sizes}: no candidate, expected a size of that op")
    return chosen


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300, help="seconds for all of it (default 300)")
    parser.add_argument("--op", help="only these, by commas")
    parser.add_argument("--size", help="only these, by commas")
    parser.add_argument("--plan", action="store_true", help="compile the candidates for sm_90; needs no GPU")
    parser.add_argument("--report", nargs="*", type=Path, metavar="FILE", help="show records (default: the project's)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the records")
    parser.add_argument("--run", help="go on with the run of this name, whose records are in the folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    begin, options = time.monotonic(), parse(arguments)
    if options.report is not None:
        print(report(records.read(options.report or [options.results])))
        return 0
    chosen = selected(options.op, options.size)
    if options.plan:
        rows = examined(chosen)
        print(plan_table(rows))
        if not options.op and not options.size:
            write_plan(rows)
        return 0
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; --plan needs none")
        return 2
    known, until = survivors(), begin + options.budget
    chosen = ordered([[group[0], *(c for c in group[1:] if str(c) in known)] for group in chosen])
    run = options.run or f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{records.commit()}"
    folder = options.results / records.device_name()
    before = [row for row in records.read([folder]) if row.get("run") == run] if options.run else []
    done = {row["case"].removeprefix("tune/"): row["outcome"] for row in before if "outcome" in row}

    def record(case: str, **values) -> None:
        records.append(case, results=options.results, **values)

    measured = roofline.measure()
    record("roofline", **measured)
    rates = MachineSpec.measured(measured, "bfloat16")
    jobs = precompile(chosen)
    tune(chosen, until, run, rates, jobs, done, record, context_is_lost)
    for job in (job for of_one in jobs.values() for job in of_one):
        job.cancel()
    if context_is_lost():
        # Nothing more runs in this process: another one goes on after the candidate that did it.
        left = until - time.monotonic()
        rest = ["--op", options.op] * bool(options.op) + ["--size", options.size] * bool(options.size)
        command = [sys.executable, "-m", "benchmarks.tuning", "--budget", f"{left:.0f}", "--run", run, *rest]
        workers.close()
        os.execv(sys.executable, [*command, "--results", str(options.results)])
    print(report([row for row in records.read([folder]) if row.get("run") == run]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
