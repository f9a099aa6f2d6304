"""``sclkern pretrain``: train, and at the end export the model and write the report."""

from __future__ import annotations

import argparse

from sclkern.cli.config_files import load
from sclkern.training.loop import Pretraining


def run(options: argparse.Namespace) -> int:
    """Train until the end of the schedule or ``run.stop_at``."""
    training = Pretraining(load(options.config, options.overrides), resume=options.resume)
    if training.run():
        model = training.export()
        report = training.report()
        print(f"model: {model}\nreport: {report}")
    return 0
