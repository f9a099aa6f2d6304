"""``sclkern warmup``: compile the kernels of a training step ahead of it."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from sclkern.cli.config_files import load
from sclkern.errors import UserError
from sclkern.tools import warmup
from sclkern.training.data import caption_widths


def run(options: argparse.Namespace) -> int:
    """Compile, and print how many kernels, in how many seconds, into which folder; 1 if one does not compile."""
    warmup.require_compiler()
    config = load(options.config, options.overrides)
    if options.target is None and not torch.cuda.is_available():
        names = ", ".join(warmup.TARGETS)
        raise UserError(f"warmup: torch sees no GPU; name the one that will train by --target, one of {names}")
    widths = caption_widths(config)
    with warmup.selected_for(options.target):
        found = warmup.kernels_of_run(config, widths)
        target = warmup.this_target() if options.target is None else warmup.TARGETS[options.target]
    outcome = warmup.compile_ahead(found, target, lambda text: print(text, file=sys.stderr))
    report = {
        "target": f"sm_{target[1]}",
        "kernels": outcome.kernels,
        "compiled": outcome.compiled,
        "in_the_cache_before": outcome.kernels - outcome.compiled - len(outcome.failed),
        "failed": list(outcome.failed),
        "seconds": round(outcome.seconds, 1),
        "cache": str(outcome.cache),
        "widths": list(widths),
        "rows": config.run.batch_size,
    }
    print(json.dumps(report, indent=1) if options.json else _text(report))
    return 1 if outcome.failed else 0


def _text(report: dict) -> str:
    lines = [
        f"{report['kernels']} kernels for {report['target']}: {report['compiled']} compiled, "
        f"{report['in_the_cache_before']} in the cache before, in {report['seconds']} s",
        f"for batches of {report['rows']} with captions padded to {', '.join(map(str, report['widths']))} tokens; "
        "others are compiled when they come",
        f"cache: {report['cache']}",
    ]
    return "\n".join([*lines, *(f"does not compile: {line}" for line in report["failed"])])
