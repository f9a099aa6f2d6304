"""The figures of every kernel compiled ahead of time, the rules they obey and the budget they are held to.

The budget is recorded for one minor version of Triton: the code of another version has other figures, which would need
a file and an environment for each. With another version only the rules are checked: everything compiles and fits,
nothing spills, tensor cores do every 16-bit product, addresses have 64 bits. They hold from Triton 3.6 to 3.9;
docs/tuning.md has a table of what each version does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import triton

from sclkern.tools.static import compilation
from sclkern.tools.static.addresses import wrapping_addresses
from sclkern.tools.static.compilation import (
    Resources,
    compile_entry,
    entry_name,
    is_hot,
    resources,
    shared_memory_problem,
    spill_problem,
    stack_of,
)
from sclkern.tools.static.workers import Failed, portable, restored, submit

TRITON = ".".join(triton.__version__.split(".")[:2])
BUDGET = Path(__file__).parents[3] / "benchmarks" / "static_budget.json"
# From here on the next version of the assembler may spill.
MOST_REGISTERS = 240
# Registers are given out in units of eight.
REGISTER_SLACK = 8
WIDTH_SLACK = 0.9
# What the budget keeps of an entry, beside its hand-written "reason".
KEPT = ("registers", "shared", "hgmma", "hmma", "warps", "instructions")


@dataclass(frozen=True)
class Compilation:
    """A kernel in a configuration, and what it is compiled for.

    Attributes:
        name: of the entry.
        entry: as ``compilation.kernels`` describes it.
        targets: compiled for these.
        limits: by target, those whose shared memory has to hold it, itself among them.
    """

    name: str
    entry: dict[str, Any]
    targets: tuple[str, ...]
    limits: dict[str, tuple[str, ...]]


@dataclass
class Row:
    """What came of one ``Compilation``.

    Attributes:
        name: of the entry.
        used: its resources on sm_90; None if it is not launched there or does not compile.
        dots: the operand types of its ``tl.dot``, on sm_90.
        wrapping: offsets in 32 bits that can wrap, on sm_90.
        errors: by target, the whole error if it does not compile, why it cannot be launched, or what it spills.
        targets: launched on these, sm_90 among them for those of the budget.
    """

    name: str
    used: Resources | None = None
    dots: list[str] = field(default_factory=list)
    wrapping: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: ["sm_90"])


def compilations(
    targets: Iterable[str] = compilation.REQUIRED_TARGETS, apart: Literal["none", "hot", "all"] = "hot"
) -> list[Compilation]:
    """Every kernel in each configuration that a launcher selects on one of the targets.

    Args:
        targets: names of ``compilation.TARGETS``.
        apart: the kernels that are compiled for each target, also where another stands for it
            (``compilation.STAND_INS``): none, those that must not spill anywhere (``HOT_STAND_INS``), or all.

    Returns:
        Those of sm_90 first, in the order of ``compilation.kernels``.
    """
    entries: dict[str, dict[str, Any]] = {}
    launched: dict[str, list[str]] = {}
    for target in sorted(targets, key=lambda name: name != "sm_90"):
        for entry in compilation.kernels(target):
            name = entry_name(entry)
            entries.setdefault(name, entry)
            if target not in launched.setdefault(name, []):
                launched[name].append(target)
    planned = []
    for name, entry in entries.items():
        limits: dict[str, list[str]] = {}
        for target in launched[name]:
            hot = apart == "hot" and is_hot(entry)
            stand_ins = compilation.HOT_STAND_INS if hot else compilation.STAND_INS
            stand_in = stand_ins.get(target, target)
            alone = apart == "all" or stand_in not in launched[name]
            limits.setdefault(target if alone else stand_in, []).append(target)
        planned.append(Compilation(name, entry, tuple(limits), {t: tuple(of) for t, of in limits.items()}))
    return planned


def measure(planned: Iterable[Compilation]) -> list[Row]:
    """Compile on all cores."""
    jobs = [
        (one, [(target, submit(_compile, portable(one.entry), target)) for target in one.targets]) for one in planned
    ]
    rows = []
    for one, of_targets in jobs:
        row = Row(one.name, targets=[name for names in one.limits.values() for name in names])
        for target, job in of_targets:
            result = job.result()
            if isinstance(result, Failed):
                row.errors[target] = f"does not compile: {result.error}"
                continue
            shared, stack, inspected = result
            for name in one.limits[target]:
                # That of sm_90 is among the rules of its machine code.
                spills = None if target == "sm_90" else spill_problem(stack, is_hot(one.entry), name)
                if problems := [problem for problem in (shared_memory_problem(shared, name), spills) if problem]:
                    row.errors[name] = "; ".join(problems)
            if inspected:
                row.used, row.dots, row.wrapping = inspected
        rows.append(row)
    return rows


def _compile(entry: dict[str, Any], target: str) -> tuple[int, int, tuple[Resources, list[str], list[str]] | None]:
    """Bytes of shared memory of a block and of stack of a thread, and on sm_90 ``inspect``."""
    compiled = compile_entry(restored(entry), target)
    return compiled.metadata.shared, stack_of(compiled), inspect(compiled) if target == "sm_90" else None


def inspect(compiled: Any) -> tuple[Resources, list[str], list[str]]:
    """Of a kernel compiled for sm_90: resources, operand types of ``tl.dot``, offsets in 32 bits that can wrap."""
    code = compiled.asm["ttir"]
    dots = set(re.findall(r"= tt\.dot .* : tensor<\d+x\d+x(\w+)>", code))
    return resources(compiled), sorted(dots), wrapping_addresses(code)


def load_width(loads: dict[int, int]) -> float:
    """Mean bytes a thread of a load from global memory."""
    return round(sum(width * count for width, count in loads.items()) / max(1, sum(loads.values())), 2)


def broken_rules(row: Row, reason: str | None = None) -> list[str]:
    """What holds for every kernel and not for this one; a ``reason`` excuses products without wgmma."""
    problems = [f"{target}: {error}" for target, error in row.errors.items()]
    if row.used is None:
        return problems
    used = row.used
    if used.stack or used.spills:
        problems.append(f"spills: {used.spills} bytes moved, stack {used.stack} bytes, expected none")
    if {"bf16", "f16"} & set(row.dots) and (used.hmma or not used.hgmma) and not reason:
        problems.append(f"HMMA {used.hmma}, HGMMA {used.hgmma}: expected HGMMA alone, or a reason in the budget")
    if row.dots == ["f32"] and (used.hmma or used.hgmma):
        problems.append(f"HMMA {used.hmma}, HGMMA {used.hgmma}: float32 products lose bits there, expected FFMA")
    problems += [f"offset in 32 bits can wrap: {line}" for line in row.wrapping]
    return problems


def worse(used: Resources, budget: dict[str, Any]) -> list[str]:
    """Each figure that is worse than the budget's, or too near the end of the registers whatever the budget says."""
    problems = []
    if used.registers > MOST_REGISTERS:
        problems.append(f"registers: {used.registers}, expected at most {MOST_REGISTERS}")
    if used.registers > budget["registers"] + REGISTER_SLACK:
        problems.append(f"registers: {used.registers}, budget {budget['registers']} + {REGISTER_SLACK}")
    if used.warps < budget["warps"]:
        problems.append(f"warps that fit a multiprocessor: {used.warps}, budget {budget['warps']}")
    if used.hgmma < budget["hgmma"]:
        problems.append(f"HGMMA: {used.hgmma}, budget {budget['hgmma']}")
    if used.hmma > budget["hmma"]:
        problems.append(f"HMMA: {used.hmma}, budget {budget['hmma']}")
    width = load_width(used.loads)
    if width < WIDTH_SLACK * budget["load_width"]:
        problems.append(f"bytes of a global load: {width}, budget {budget['load_width']}")
    return problems


def check(rows: list[Row], budget: dict[str, Any]) -> list[str]:
    """One line for each figure that breaks a rule or got worse, and for each entry on one side only."""
    kernels, names = budget["kernels"], {row.name for row in rows if "sm_90" in row.targets}
    problems = []
    for row in rows:
        recorded = kernels.get(row.name)
        broken = broken_rules(row, recorded and recorded.get("reason"))
        if row.name not in names:
            pass  # not launched on sm_90, of which alone there is a budget
        elif recorded is None:
            broken.append("not in the budget")
        elif row.used is not None and budget["triton"] == TRITON:
            broken += worse(row.used, recorded)
        problems += [f"{row.name}: {problem}" for problem in broken]
    return problems + [f"{name}: in the budget, but no such kernel" for name in kernels if name not in names]


def read_budget(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"triton": TRITON, "kernels": {}}


def updated(rows: list[Row], budget: dict[str, Any]) -> dict[str, Any]:
    """The budget with the figures of these rows, and the reasons that it had."""
    kernels = {}
    for row in rows:
        if row.used is None:
            continue
        figures = asdict(row.used)
        kernels[row.name] = {name: figures[name] for name in KEPT} | {"load_width": load_width(row.used.loads)}
        if reason := budget["kernels"].get(row.name, {}).get("reason"):
            kernels[row.name]["reason"] = reason
    return {"triton": TRITON, "kernels": kernels}


def write_budget(file: Path, budget: dict[str, Any], rows: list[Row]) -> None:
    """Write the budget as JSON, and beside it the table of its rows as Markdown."""
    file.write_text(json.dumps(budget, indent=1) + "\n")
    file.with_suffix(".md").write_text(
        "# Machine code of the kernels for sm_90\n\n"
        f"Written by `sclkern bench static --update`, with Triton {budget['triton']}. Shared memory in bytes, loads as "
        "count x bytes,\nwarps as what fits a multiprocessor. Counts are not time.\n\n" + format_table(rows) + "\n"
    )


def format_table(rows: list[Row]) -> str:
    """A Markdown table; loads as count x bytes."""
    lines = [
        "| kernel | registers | spills | shared | HGMMA | HMMA | FFMA | global loads | warps / SM | instructions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "sm_90" not in row.targets:
            continue
        if row.used is None:
            lines.append(f"| `{row.name}` | does not compile |")
            continue
        used = row.used
        loads = ", ".join(f"{count} x {width}" for width, count in sorted(used.loads.items(), reverse=True))
        figures = (used.registers, used.spills, used.shared, used.hgmma, used.hmma, used.ffma, loads, used.warps)
        lines.append(f"| `{row.name}` | {' | '.join(map(str, figures))} | {used.instructions} |")
    return "\n".join(lines)
