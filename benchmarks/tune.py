"""Launch configurations beside the present ones: examined without a GPU, measured on one, reported from records.

    python -m benchmarks.tune --plan                     compile all for sm_90, write benchmarks/candidates.json
    python -m benchmarks.tune --budget 300 [--op attention,bias_gelu] [--size 325]
    python -m benchmarks.tune --report [FILES]

Nothing is changed: a candidate is set for its own measurement alone (``benchmarks/launches.py``), and only after it was
as right as ``benchmarks/harness/verification.py`` asks of every op. Each is a record
``tune/<op>/<size>/<dtype>/<pass>/<choice>/<config>``, whatever became of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from benchmarks.candidates import Candidate, groups
from benchmarks.harness import timing, verification
from benchmarks.harness.op_cases import IMPLEMENTATIONS, Case
from sclkern.errors import UserError
from sclkern.tools.bench import records, roofline
from sclkern.tools.bench.roofline import MachineSpec, lower_bound
from sclkern.tools.specs import SPECS

FOLDER = Path(__file__).parent

PLAN = FOLDER / "candidates.json"
MOST_REGISTERS, MOST_SHARED = 240, 227 * 1024
MULTIPROCESSORS = 132
# Of each group, measured before any group has its next one.
FIRST = 3
# Seconds that a candidate may take; with less left none is begun.
ENOUGH = 4.0
# A change is proposed from here on, and where the quartiles lie apart.
WORTHWHILE = 0.97
# Of machine code, beside its kernel; "loop": instructions of the longest.
FIGURES = ("registers", "spills", "shared", "hgmma", "hmma", "loop", "instructions")
COLUMNS = ("candidate", "kernel", *FIGURES, "warps / SM", "programs", "waves", "predicted")


def problems(used) -> list[str]:
    """Why machine code is not worth a measurement."""
    found = []
    if used.spills or used.stack:
        found.append(f"spills {used.spills} bytes, stack {used.stack}")
    if used.registers > MOST_REGISTERS:
        found.append(f"{used.registers} registers, at most {MOST_REGISTERS}")
    if used.shared > MOST_SHARED:
        found.append(f"{used.shared} bytes of shared memory, at most {MOST_SHARED}")
    return found


def examined(chosen: Sequence[Sequence[Candidate]]) -> list[dict]:
    """A row of each candidate: the launches that it changes, of the present ones all that any changes; "dropped" says
    why it is not to be measured."""
    from benchmarks import launches
    from sclkern.tools.static.compilation import resources

    caught: list[tuple[Candidate, list]] = []
    for group in chosen:
        present = launches.launches(group[0])
        others = [launches.changed(candidate, present) for candidate in group[1:]]
        kernels = {launch.kernel for found in others for launch in found}
        concerned = [launch for launch in present if launch.kernel in kernels]
        caught += zip(group, [concerned, *others], strict=True)
    known: dict[int, object] = {}

    def row(candidate: Candidate, found: list) -> dict:
        about = {"case": str(candidate), "choice": candidate.choice, "values": candidate.values}
        about |= {"predicted": candidate.predicted, "reason": candidate.reason}
        of_kernels: dict[tuple, dict] = {}
        why = [] if found or not candidate.values else ["changes no launch"]
        for launch in found:
            key = (launch.kernel, str(launch.constants))
            if key in of_kernels:
                of_kernels[key]["launches"] += 1
                continue
            try:
                binary = launches.compiled(launch)
                used = known.get(id(binary)) or resources(binary)
            except Exception as error:
                why.append(f"does not compile: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"[:200])
                continue
            known[id(binary)] = used
            why += problems(used)
            waves = launch.programs / (MULTIPROCESSORS * used.blocks) if used.blocks else None
            figures = {name: getattr(used, name) for name in FIGURES}
            of_kernels[key] = {"kernel": launch.kernel.fn.__name__, "launches": 1, **figures}
            of_kernels[key] |= {
                "num_warps": launch.arguments["num_warps"],
                "warps": used.warps,
                "programs": launch.programs,
                "waves": waves and round(waves, 2),
            }
        return about | {"kernels": list(of_kernels.values()), "dropped": "; ".join(why) or None}

    with launches.target(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda pair: row(*pair), caught))


def plan_table(rows: list[dict]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        for used in row["kernels"] or [{}]:
            names = ("kernel", *FIGURES, "warps", "programs", "waves")
            cells = " | ".join(str(used.get(name, "")) for name in names)
            lines.append(f"| {row['case']} | {cells} | {row['dropped'] or row['predicted']} |")
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        if row["values"]:
            op = row["case"].partition("/")[0]
            counts[op][0] += not row["dropped"]
            counts[op][1] += 1
    lines += ["", "| op | candidates | survive |", "|---|---|---|"]
    lines += [f"| {op} | {every} | {left} |" for op, (left, every) in counts.items()]
    return "\n".join(lines)


def write_plan(rows: list[dict], file: Path = PLAN) -> None:
    import triton

    about = {"triton": triton.__version__, "target": "sm_90", "predicted": "time over that of the present one, a guess"}
    # A candidate a line, so that a difference can be read.
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f'{json.dumps(about)[:-1]}, "candidates": [\n{lines}\n]}}\n')


def survivors(file: Path = PLAN) -> set[str]:
    if not file.exists():
        raise UserError(f"{file}: does not exist, expected what --plan writes")
    return {row["case"] for row in json.loads(file.read_text())["candidates"] if not row["dropped"]}


def selected(ops: str | None, sizes: str | None) -> list[list[Candidate]]:
    """The groups of these ops and sizes, both by commas; None takes all."""
    every, wanted = groups(), (ops and ops.split(","), sizes and sizes.split(","))
    found = every
    for name, asked, of in zip(("op", "size"), wanted, (lambda c: c.op, lambda c: c.size.name), strict=True):
        known = dict.fromkeys(of(group[0]) for group in every)
        if unknown := set(asked or ()) - set(known):
            raise UserError(f"--{name}: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
        found = [group for group in found if not asked or of(group[0]) in asked]
    if not found:
        raise UserError(f"--op {ops} --size {sizes}: no candidate, expected a size of that op")
    return found


def ordered(chosen: Sequence[Sequence[Candidate]]) -> list[list[Candidate]]:
    """The first few of every group, then the rest of every group; the present configuration leads each."""
    heads = [group[: 1 + FIRST] for group in chosen]
    return heads + [[group[0], *group[1 + FIRST :]] for group in chosen if len(group) > 1 + FIRST]


Jobs = dict[Candidate, list[Future]]


def precompile(chosen: Sequence[Sequence[Candidate]]) -> tuple[ThreadPoolExecutor, Jobs]:
    """Start to compile all on every core, in the order of measurement: a candidate then waits for its own alone."""
    from benchmarks import launches

    # All are caught before any is compiled: catching replaces what compiling calls. Checks run without dropout as well.
    caught = {
        each: [launch for dropout in {True, not each.size.dropout_p} for launch in launches.launches(each, dropout)]
        for group in chosen
        for each in group
    }
    pool, started = ThreadPoolExecutor(len(os.sched_getaffinity(0))), {}
    for launch in (launch for found in caught.values() for launch in found):
        if launch.key not in started:
            started[launch.key] = pool.submit(launches.compiled, launch)
    return pool, {candidate: [started[launch.key] for launch in found] for candidate, found in caught.items()}


def measure(candidate: Candidate) -> dict:
    """Check and time a candidate: ``verification.verify`` and ``timing.on_device`` with its values set."""
    from benchmarks.launches import CHOICES, replaced

    case = Case(candidate.op, candidate.size, torch.bfloat16, IMPLEMENTATIONS[candidate.op][0], candidate.part)
    about = {"sets": sorted(CHOICES[candidate.choice](candidate.values))}
    try:
        with replaced(candidate):
            # It remembers what was right, by op and size.
            verification.clear_caches()
            about |= verification.verify(case)
            about |= timing.on_device(case)
    except verification.WrongResultError as error:
        return about | {"outcome": "wrong", "problem": str(error)}
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        return about | {"outcome": "failed", "problem": f"{type(error).__name__}: {text}"[:300]}
    return about | {"outcome": "measured", "seconds": about["device_quartiles"][1]}


def tune(
    chosen: Sequence[Sequence[Candidate]],
    until: float,
    run: str,
    rates: MachineSpec,
    jobs: Jobs,
    done: dict[str, str],
    record: Callable[..., object],
    lost: Callable[[], bool],
) -> None:
    """Measure until that time (of ``time.monotonic``), each recorded under the name of the run as it is known.

    Args:
        jobs: of ``precompile``, to be waited for. done: outcomes by candidate, of what is not measured again; without
            the present configuration there is nothing to compare. lost: whether the GPU's context is, which ends it.
    """
    for group in chosen:
        rest = [candidate for candidate in group[1:] if str(candidate) not in done]
        if done.get(str(group[0])) in ("failed", "wrong"):
            continue
        present = None
        for candidate in [group[0], *rest] if rest else []:
            if until - time.monotonic() < ENOUGH:
                return
            begin = time.monotonic()
            wait(jobs.get(candidate, ()))
            found = measure(candidate)
            if found["outcome"] == "measured":
                cost = SPECS[candidate.op].cost(candidate.size.values, 2)
                least = lower_bound(cost, candidate.part, rates)
                present = found["seconds"] if candidate is group[0] else present
                found |= {"floor_seconds": least, "roofline_fraction": least / found["seconds"]}
                found |= {"ratio": found["seconds"] / present, "present_seconds": present}
            about = {"op": candidate.op, "size": candidate.size.name, "dtype": "bfloat16", "pass": candidate.part}
            about |= {name: getattr(candidate, name) for name in ("choice", "config", "predicted", "reason")}
            record(f"tune/{candidate}", run=run, took=round(time.monotonic() - begin, 2), **about, **found)
            if found["outcome"] == "failed" and lost():
                return
            if present is None:
                break


def context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def report(rows: list[dict]) -> str:
    """Present and best of every choice, then in words what to change; from records of ``records.read``."""
    found: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if row["case"].startswith("tune/"):
            found[row["device"], row["op"], row["size"], row["pass"], row["choice"]].append(row)
    if not found:
        return "No records of tuning."
    lines = ["| op | size | pass | choice | present µs | floor | best | µs | ratio | predicted | tried |"]
    lines.append("|" + "---|" * 11)
    advice, bad = [], []
    for (_, op, size, part, choice), group in found.items():
        measured = [row for row in group if row["outcome"] == "measured"]
        bad += [f"- {row['case']}: {row['outcome']}, {row['problem']}" for row in group if row not in measured]
        present = next((row for row in measured if row["config"] == "present"), None)
        others = [row for row in measured if row is not present]
        if present is None or not others:
            continue
        best = min(others, key=lambda row: row["ratio"])
        cells = [op, size, part, choice, f"{present['seconds'] * 1e6:.1f}", f"{present['roofline_fraction']:.0%}"]
        cells += [best["config"], f"{best['seconds'] * 1e6:.1f}", f"{best['ratio']:.2f}", f"{best['predicted']:.2f}"]
        lines.append(f"| {' | '.join([*cells, str(len(others))])} |")
        apart = best["device_quartiles"][2] < present["device_quartiles"][0]
        where = f"{op} {size} {part}"
        if best["ratio"] <= WORTHWHILE and apart:
            places = " and ".join(f"sclkern.kernels.{place}" for place in best["sets"])
            advice.append(f"- {where}: {best['config']} in {places} ({1 - best['ratio']:.0%} less time)")
        else:
            advice.append(f"- {where}, {choice}: keep the present one (the best other takes {best['ratio']:.2f} of it)")
    parts = ["\n".join(lines), "To change:\n" + "\n".join(advice)]
    return "\n\n".join(parts + (["Not timed:\n" + "\n".join(bad)] if bad else []))


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
    pool, jobs = precompile(chosen)
    tune(chosen, until, run, rates, jobs, done, record, context_is_lost)
    pool.shutdown(wait=False, cancel_futures=True)
    if context_is_lost():
        # Nothing more runs in this process: another one goes on after the candidate that did it.
        left = until - time.monotonic()
        rest = ["--op", options.op] * bool(options.op) + ["--size", options.size] * bool(options.size)
        command = [sys.executable, "-m", "benchmarks.tune", "--budget", f"{left:.0f}", "--run", run, *rest]
        os.execv(sys.executable, [*command, "--results", str(options.results)])
    print(report([row for row in records.read([folder]) if row.get("run") == run]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
