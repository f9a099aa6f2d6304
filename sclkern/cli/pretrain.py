"""``sclkern pretrain``: train, and at the end export the model and write the report."""

from __future__ import annotations

import argparse
import logging

from sclkern.cli.config_files import load
from sclkern.errors import Interrupted
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.tools import warmup
from sclkern.training.loop import Pretraining
from sclkern.training.signals import StopSignals

log = logging.getLogger("sclkern.training")


def run(options: argparse.Namespace) -> int:
    """Train until the end of the schedule, ``run.stop_at`` or a signal."""
    with StopSignals() as stop:
        training = Pretraining(load(options.config, options.overrides), resume=options.resume, stop=stop)
        _compile(training)
        finished = training.run()
        try:
            if finished and not stop.requested:
                _finish(training, stop)
        except Interrupted:
            log.warning("stopped before the report; write it with --resume")
    return 0


def _compile(training: Pretraining) -> None:
    """Compile the kernels of the step on every core, which its first call would compile one after another."""
    if training.device.type != "cuda" or not TRITON_INSTALLED or interpreted():
        return
    try:
        outcome = warmup.warm_up(training.config, log.info)
    except Exception as error:  # the first step compiles what it needs
        log.warning("not compiled ahead: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return
    if outcome is not None:
        log.info("%d of %d kernels compiled in %.0f s", outcome.compiled, outcome.kernels, outcome.seconds)


def _finish(training: Pretraining, stop: StopSignals) -> None:
    with stop.stage("the model is written, then the run stops; --resume writes the report", patience=None):
        model = training.export()
    stop.check()
    with stop.stage("stops; the run is saved, and --resume writes its report", patience=0, anywhere=True):
        report = training.report()
    print(f"model: {model}\nreport: {report}")
