"""``sclkern doctor``: what this machine has, and which backend each op takes."""

from __future__ import annotations

import argparse
import json

from sclkern.tools.doctor import examine, format_report


def run(options: argparse.Namespace) -> int:
    """Print the findings as text or JSON."""
    findings = examine()
    print(json.dumps(findings, indent=1) if options.json else format_report(findings))
    return 0
