"""Candidates examined without a GPU: compiled for sm_90, and left out where they cannot win."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tuning.candidates import Candidate
from benchmarks.tuning.launches import changed, compile_launches, launches
from sclkern.errors import UserError
from sclkern.kernels.config import SHARED_MEMORY
from sclkern.kernels.launch import Launch
from sclkern.tools.static.compilation import Resources
from sclkern.tools.static.workers import Failed, submit

PLAN = Path(__file__).parent / "candidates.json"
TARGET = "sm_90"
MAX_REGISTERS, MAX_SHARED = 240, SHARED_MEMORY[TARGET]
MULTIPROCESSORS = 132
# Of machine code, beside its kernel; "loop": instructions of the longest.
FIGURES = ("registers", "spills", "shared", "hgmma", "hmma", "loop", "instructions")
COLUMNS = ("candidate", "kernel", *FIGURES, "warps / SM", "programs", "waves", "predicted")


def problems(used: Resources) -> list[str]:
    """Why machine code is not worth a measurement."""
    reasons = []
    if used.spills or used.stack:
        reasons.append(f"spills {used.spills} bytes, stack {used.stack}")
    if used.registers > MAX_REGISTERS:
        reasons.append(f"{used.registers} registers, at most {MAX_REGISTERS}")
    if used.shared > MAX_SHARED:
        reasons.append(f"{used.shared} bytes of shared memory, at most {MAX_SHARED}")
    return reasons


@dataclass(frozen=True)
class _Job:
    candidate: Candidate
    launches: list[Launch]
    compiled: list[Any]


def examined(chosen: Sequence[Sequence[Candidate]]) -> list[dict[str, Any]]:
    """A row of each candidate, compiled on all cores.

    Args:
        chosen: groups of candidates, the present configuration first in each.

    Returns:
        Rows with the launches that a candidate changes (of the present one, those that any changes); "dropped" says why
        it is not to be measured.
    """
    jobs = []
    for group in chosen:
        present = launches(group[0])
        others = [changed(candidate, present) for candidate in group[1:]]
        kernels = {launch.config.kernel for of_one in others for launch in of_one}
        concerned = [launch for launch in present if launch.config.kernel in kernels]
        for candidate, of_one in zip(group, [concerned, *others], strict=True):
            # A launch a job, so that one that does not compile says so alone.
            compiled = [submit(compile_launches, candidate, True, [launch.key], TARGET) for launch in of_one]
            jobs.append(_Job(candidate, of_one, compiled))
    return [_row(job) for job in jobs]


def _row(job: _Job) -> dict[str, Any]:
    candidate = job.candidate
    row = {"case": str(candidate), "choice": candidate.choice, "values": candidate.values}
    row |= {"predicted": candidate.predicted, "reason": candidate.reason}
    of_kernels: dict[tuple[str, str], dict[str, Any]] = {}
    why = [] if job.launches or not candidate.values else ["changes no launch"]
    for launch, future in zip(job.launches, job.compiled, strict=True):
        key = (launch.config.kernel, str(launch.config.options))
        if key in of_kernels:
            of_kernels[key]["launches"] += 1
            continue
        result = future.result()
        if isinstance(result, Failed):
            why.append(f"does not compile: {result.error}")
            continue
        used = result[0].used
        why += problems(used)
        waves = launch.programs / (MULTIPROCESSORS * used.blocks) if used.blocks else None
        figures = {name: getattr(used, name) for name in FIGURES}
        of_kernels[key] = {"kernel": launch.config.kernel, "launches": 1, **figures}
        of_kernels[key] |= {
            "num_warps": launch.config.num_warps,
            "warps": used.warps,
            "programs": launch.programs,
            "waves": waves and round(waves, 2),
        }
    return row | {"kernels": list(of_kernels.values()), "dropped": "; ".join(why) or None}


def plan_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and how many candidates of each op survive."""
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


def write_plan(rows: list[dict[str, Any]], file: Path = PLAN) -> None:
    """Write what ``survivors`` reads."""
    import triton

    header = {
        "triton": triton.__version__,
        "target": "sm_90",
        "predicted": "time over that of the present one, a guess",
    }
    # A candidate a line, so that a difference can be read.
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f'{json.dumps(header)[:-1]}, "candidates": [\n{lines}\n]}}\n')


def survivors(file: Path = PLAN) -> set[str]:
    """The candidates of the file that are to be measured."""
    if not file.exists():
        raise UserError(f"{file}: does not exist, expected what --plan writes")
    return {row["case"] for row in json.loads(file.read_text())["candidates"] if not row["dropped"]}
