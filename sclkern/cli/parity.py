"""``sclkern parity``: the model compared with recorded numbers of the published code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sclkern.tools.parity import format_table, run_parity
from sclkern.training.setup import resolve_device


def run(options: argparse.Namespace) -> int:
    """Print every comparison, and what has no record; 1 if any error exceeds its tolerance."""
    report = run_parity(options.file, str(resolve_device(options.device)))
    if options.json:
        content = {
            "file": str(Path(options.file)),
            "ok": report.ok,
            "comparisons": [
                {"name": row.name, "error": row.error, "tolerance": row.tolerance, "ok": row.ok}
                for row in report.comparisons
            ],
            "not_compared": report.not_compared,
        }
        print(json.dumps(content, indent=1))
    else:
        print(format_table(report))
    return 0 if report.ok else 1
