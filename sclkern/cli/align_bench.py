"""``sclkern evaluate align-bench``: no task that a model is fine-tuned for, but a look at where its attention lies."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from sclkern.cli.pretrain import log_of_rank
from sclkern.data.transforms import build_transform
from sclkern.errors import UserError
from sclkern.tasks.align_bench import TABLE, AlignBench, evaluate_align_bench
from sclkern.tasks.results import ZERO_SHOT, write_results
from sclkern.tools.bench.records import made_by
from sclkern.training.config import build_config, read_values
from sclkern.training.opening import open_model
from sclkern.training.preflight import join_world
from sclkern.training.setup import resolve_device
from sclkern.training.signals import StopSignals

ALIGN_BENCH = "align-bench"
_KEYS = ("run.device", "run.backend", "run.preflight_seconds", "data.tokenizer", "data.decoding")


def run_align_bench(options: argparse.Namespace) -> int:
    """Score a model, print the scores as JSON, and write them where a folder is given."""
    output = None if options.output is None else Path(options.output)
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file, expected a folder; give another name")
    if options.annotations is not None:
        raise UserError(f"--annotations: got {options.annotations}, but {ALIGN_BENCH} is scored by its table")
    if options.split not in ("val", "test"):
        raise UserError(f"--split: got {options.split!r}, but {ALIGN_BENCH} has one table; leave --split out")
    values = read_values(None, options.overrides)
    given = [f"{section}.{key}" for section, keys in values.items() for key in keys]
    if unread := [key for key in given if key not in _KEYS]:
        raise UserError(f"{unread[0]}: {ALIGN_BENCH} reads only {', '.join(_KEYS)}; leave it out")
    config = build_config(values)
    bench = AlignBench(options.data)
    model, tokenizer = open_model(options.checkpoint, values.get("data", {}).get("tokenizer"))
    with join_world(config) as world, StopSignals() as stop:
        log_of_rank(world, stop)
        result = evaluate_align_bench(
            model.set_backend(config.run.backend).to(resolve_device(config.run.device, world)),
            bench,
            tokenizer,
            build_transform("clip_test", model.config.image_size, decoding=config.data.decoding),
            distributed=world.size > 1,
        )
        if world.main:
            found = dataclasses.asdict(result)
            scores = found.pop("scores")
            if output is not None:
                about = {"task": ALIGN_BENCH, "recipe": ZERO_SHOT, "tables": [TABLE], "samples": len(bench)}
                about |= {"digest": bench.digest, "model": dataclasses.asdict(model.config), **found, **made_by()}
                write_results(output / "results.json", about, scores)
            print(json.dumps({**scores, **found}))
    return 0
