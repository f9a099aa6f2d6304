"""``sclkern evaluate``: the metrics of a model on a split of a task, and the file that the task's server takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sclkern.cli.align_bench import ALIGN_BENCH, run_align_bench
from sclkern.cli.pretrain import log_of_rank
from sclkern.errors import UserError
from sclkern.tasks.evaluating import evaluate, load_evaluation
from sclkern.tasks.registered import TASKS
from sclkern.tasks.results import write_json, write_results
from sclkern.tools.bench.records import made_by
from sclkern.training.preflight import join_world
from sclkern.training.setup import resolve_device
from sclkern.training.signals import StopSignals


def run(options: argparse.Namespace) -> int:
    """Evaluate, print the metrics as JSON, and write them where a folder is given."""
    if options.task == ALIGN_BENCH:
        return run_align_bench(options)
    task = TASKS[options.task]
    output = None if options.output is None else Path(options.output)
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file, expected a folder; give another name")
    annotations = None if options.annotations is None else Path(options.annotations)
    config = load_evaluation(task, options.checkpoint, options.data, options.overrides)
    with join_world(config) as world:
        log_of_rank(world, StopSignals())
        outcome = evaluate(
            task,
            config,
            split=options.split,
            annotations=annotations,
            scored=output is None,
            world=world,
            device=resolve_device(config.run.device, world),
        )
        if world.main:
            if output is not None:
                write_results(output / "results.json", {**outcome.about, **made_by()}, outcome.values)
                print(f"written: {output / 'results.json'}")
                if outcome.submission is not None:
                    write_json(output / "submission.json", outcome.submission)
                    print(f"written: {output / 'submission.json'}, {len(outcome.submission)} answers")
            print(json.dumps(outcome.values))
    return 0
