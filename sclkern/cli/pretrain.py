"""``sclkern pretrain``: train, and at the end export the model and write the report."""

from __future__ import annotations

import argparse
import logging
import signal

from sclkern.cli.config_files import load
from sclkern.errors import Interrupted
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.tools import warmup
from sclkern.training.data import caption_widths
from sclkern.training.memory import describe_cost
from sclkern.training.preflight import join_world
from sclkern.training.pretraining import Pretraining
from sclkern.training.signals import StopSignals
from sclkern.training.world import World

log = logging.getLogger("sclkern.training")


def run(options: argparse.Namespace) -> int:
    """Train until the end of the schedule, ``run.stop_at`` or a signal."""
    config = load(options.config, options.overrides)
    # A process that joins takes no signals: it has nothing to save, and the others may not come.
    with join_world(config) as world, StopSignals() as stop:
        log_of_rank(world, stop)
        training = Pretraining(config, resume=options.resume, stop=stop, world=world)
        if world.main:
            log.info(
                describe_cost(config, training.throughput, training.data.caption_lengths, training.device, world.size)
            )
        if world.local_rank == 0:
            _compile(training)
        world.barrier()
        finished = training.run()
        try:
            if finished and training.all_go_on():
                _finish(training, stop)
        except Interrupted:
            log.warning("stopped before the report; write it with --resume")
    return 0


def log_of_rank(world: World, stop: StopSignals) -> None:
    """Of many processes rank 0 alone reports; the warnings of the others have their rank."""
    if world.main:
        return
    stop.quiet = True
    logging.getLogger().setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{world.name}: %(message)s"))
    # Undecodable images are counted together.
    logging.getLogger("sclkern.data").setLevel(logging.ERROR)


def _compile(training: Pretraining) -> None:
    """Compile the kernels of the step on every core, which its first call would compile one after another."""
    if training.device.type != "cuda" or not TRITON_INSTALLED or interpreted():
        return
    try:
        outcome = warmup.warm_up(training.config, log.info, caption_widths(training.config))
    except Exception as error:  # the first step compiles what it needs
        log.warning("not compiled ahead: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return
    if outcome is not None:
        log.info("%d of %d kernels compiled in %.0f s", outcome.compiled, outcome.kernels, outcome.seconds)


def _finish(training: Pretraining, stop: StopSignals) -> None:
    with stop.stage("the model is written, then the run stops; --resume writes the report", patience=None):
        model = training.results.export()
    if not training.all_go_on():
        raise Interrupted(stop.number or signal.SIGTERM)
    with stop.stage("stops; the run is saved, and --resume writes its report", patience=0, anywhere=True):
        report = training.results.report()
    if training.world.main:
        print(f"model: {model}\nreport: {report}")
