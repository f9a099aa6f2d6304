"""``sclkern finetune``: train a pre-trained model on a task, and export the best model of its validations."""

from __future__ import annotations

import argparse
import json
import logging

from sclkern.cli.config_files import find_config
from sclkern.cli.pretrain import log_of_rank
from sclkern.errors import Interrupted
from sclkern.tasks.config import load_finetune
from sclkern.tasks.finetuning import Finetuning
from sclkern.tasks.registered import TASKS
from sclkern.tools.bench.records import made_by
from sclkern.training.preflight import join_world
from sclkern.training.signals import StopSignals

log = logging.getLogger("sclkern.training")


def run(options: argparse.Namespace) -> int:
    """Train until the end of the schedule, ``run.stop_at`` or a signal."""
    task = TASKS[options.task]
    config = load_finetune(
        task.name,
        task.recipes,
        task.heads,
        recipe=options.recipe,
        checkpoint=options.checkpoint,
        path=None if options.config is None else find_config(options.config),
        overrides=options.overrides,
    )
    with join_world(config) as world, StopSignals() as stop:
        log_of_rank(world, stop)
        training = Finetuning(task, config, resume=options.resume, stop=stop, world=world)
        finished = training.run()
        try:
            if finished and training.all_go_on():
                with stop.stage("the model is written, then the run stops", patience=None):
                    model = training.export(made_by())
                if world.main:
                    found = json.loads((training.directory / "results.json").read_text(encoding="utf-8"))
                    print(f"{json.dumps(found['values'])} of step {found['step']}\nmodel: {model}")
        except Interrupted:
            log.warning("stopped before the model was written; write it with --resume")
    return 0
