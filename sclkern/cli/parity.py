"""``sclkern parity``: the model compared with recorded numbers of the published code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sclkern.tools.parity import format_table, run_parity
from sclkern.training.setup import resolve_device


def run(options: argparse.Namespace) -> int:
    """Print every comparison; 1 if any error exceeds its tolerance."""
    rows = run_parity(options.file, str(resolve_device(options.device)))
    ok = all(row.ok for row in rows)
    if options.json:
        comparisons = [{"name": row.name, "error": row.error, "tolerance": row.tolerance, "ok": row.ok} for row in rows]
        print(json.dumps({"file": str(Path(options.file)), "ok": ok, "comparisons": comparisons}, indent=1))
    else:
        print(format_table(rows))
    return 0 if ok else 1
