"""``sclkern bench record``: keep the metrics of a model for the page of results."""

from __future__ import annotations

import argparse
from pathlib import Path

from sclkern.errors import UserError
from sclkern.tools.bench import records, results


def run(options: argparse.Namespace) -> int:
    """Append a record of what a results.json says."""
    if options.output is None and not records.RESULTS.is_dir():
        raise UserError("--output: not given, and only a source tree has benchmarks/results; give --output a folder")
    found = results.read_result(options.file, options.scores)
    case = results.case_of(options.model, found)
    file = records.append(case, results=Path(options.output or records.RESULTS), name=options.model, **found)
    print(f"{case}\nrecorded in {file}")
    return 0
