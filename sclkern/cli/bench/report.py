"""``sclkern bench report``: tables and plots of benchmark records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sclkern.tools.bench import records, report
from sclkern.tools.bench.plots import write_plots


def run(options: argparse.Namespace) -> int:
    """Print the tables; write them and the plots where the options say."""
    rows = records.read(options.files or [records.RESULTS])
    text = report.report(rows)
    if options.update:
        report.update(Path(options.update), rows)
    if options.output:
        folder = Path(options.output)
        files = write_plots(rows, folder)
        plots = "".join(f"\n![{file.stem}]({file.name})\n" for file in files)
        (folder / "report.md").write_text(f"{text}\n{plots}")
        print(*(folder / "report.md", *files), sep="\n", file=sys.stderr)
    print(text)
    return 0
