"""``sclkern bench roofline``: copy bandwidth and matrix rate of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from sclkern.errors import UserError
from sclkern.tools.bench import records, roofline


def run(options: argparse.Namespace) -> int:
    """Measure, record and print the rates."""
    if options.output is None and not records.RESULTS.is_dir():
        raise UserError("--output: not given, and only a source tree has benchmarks/results; give --output a folder")
    rates = roofline.measure()
    file = records.append("roofline", results=Path(options.output or records.RESULTS), **rates)
    print(f"{roofline.format_rates(rates)}\nrecorded in {file}")
    if len(rates["matrix_flops_per_second"]) == 1:  # float32 alone: no GPU
        print(f"\n{roofline.planned_table()}")
    return 0
