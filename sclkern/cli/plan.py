"""``sclkern plan``: what a training step computes, its arithmetic, and its launches."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sclkern.cli.config_files import load
from sclkern.errors import UserError
from sclkern.step.flops import describe_plan, format_plan
from sclkern.tools.ledger import budget as step_budget
from sclkern.tools.ledger.step import format_ledger, measure


def run(options: argparse.Namespace) -> int:
    """Print the plan of a step, or its ledger, as text or JSON; 1 if the ledger's budget is exceeded."""
    if options.check or options.update:
        if not options.ledger:
            raise UserError("--check and --update: belong to --ledger")
        return _budget(options)
    config = load(options.config, options.overrides)
    sizes = {"caption_tokens": options.caption_tokens, "num_frames": options.frames}
    described = describe_plan(config.model, config.objectives, config.step, **sizes)
    if options.ledger:
        sizes["padded_tokens"] = min(options.caption_tokens + 5, config.model.max_text_len)
        rows = config.run.batch_size
        described = measure(config.model, config.objectives, config.step, rows=rows, **sizes)
    text = format_ledger if options.ledger else format_plan
    print(json.dumps(described, indent=1) if options.json else text(described))
    return 0


def _budget(options: argparse.Namespace) -> int:
    file = Path(options.budget) if options.budget else step_budget.BUDGET
    if not file.exists():
        raise UserError(f"--budget: {file} does not exist")
    found = step_budget.figures()
    if options.update:
        step_budget.write(found, file)
    budget = step_budget.read(file)
    failed = step_budget.check(found, budget)
    if options.json:
        print(json.dumps({"cases": found, "failed": failed}, indent=1))
    else:
        print(step_budget.format_comparison(found, budget))
        print("".join(f"FAILED {line}\n" for line in failed), end="")
    return 1 if failed else 0
