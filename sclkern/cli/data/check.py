"""``sclkern data check``: read everything that a data set has, and say what is broken."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sclkern.data.check import examine, write_page
from sclkern.errors import UserError
from sclkern.io import write_atomically


def run(options: argparse.Namespace) -> int:
    """Print counts and defects, and write them where asked for; 1 if there are defects."""
    for name, least in (("workers", 1), ("samples", 1), ("max_text_len", 3), ("min_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected {least} or more")
    report = examine(
        options.source,
        tables=options.tables or (),
        split=options.split,
        format=options.format,
        tokenizer=options.tokenizer,
        max_text_len=options.max_text_len,
        min_size=options.min_size,
        samples=options.samples if options.html else 0,
        workers=options.workers,
    )
    print(report)
    if options.json:
        content = json.dumps(report.as_json(), indent=1)
        write_atomically(options.json, lambda path: Path(path).write_text(content, encoding="utf-8"))
    if options.html:
        write_page(report, options.html)
    return 1 if report.defects else 0
