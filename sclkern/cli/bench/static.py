"""``sclkern bench static``: every kernel compiled ahead of time, and its machine code compared with a budget."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from sclkern.errors import UserError
from sclkern.tools.static import budget as static_budget
from sclkern.tools.static import compilation as static


def run(options: argparse.Namespace) -> int:
    """Compile, print and compare; 1 if a rule or the budget is broken."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET: got 1, an interpreted kernel cannot be compiled; unset it")
    for name in options.target:
        if name not in static.TARGETS:
            raise UserError(f"--target: got {name!r}, expected one of {', '.join(static.TARGETS)}")
    file = Path(options.budget) if options.budget else static_budget.BUDGET
    if options.check and not file.exists():
        raise UserError(f"--budget: {file} does not exist; --update writes it")
    targets = dict.fromkeys((*static.REQUIRED_TARGETS, *options.target))
    rows = static_budget.measure(static_budget.compilations(targets, options.apart))
    budget = static_budget.read_budget(file)
    if options.update:
        budget = static_budget.updated(rows, budget)
        static_budget.write_budget(file, budget, rows)
    failed = static_budget.check(rows, budget) if options.check or options.update else []
    if options.json:
        figures = {"triton": static_budget.TRITON, "failed": failed, "kernels": list(map(asdict, rows))}
        print(json.dumps(figures, indent=1))
    else:
        print(static_budget.format_table(rows))
        print("".join(f"FAILED {line}\n" for line in failed), end="")
    return 1 if failed else 0
