"""``sclkern plan``: what a training step computes, its arithmetic, and its launches."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sclkern.cli.config_files import load
from sclkern.errors import UserError
from sclkern.evaluation.cost import plan_retrieval
from sclkern.evaluation.reranking import Reranking
from sclkern.step.flops import describe_plan, format_plan
from sclkern.tools import scaling
from sclkern.tools.ledger import budget as step_budget
from sclkern.tools.ledger.step import format_ledger, measure
from sclkern.training.memory import memory_of_run
from sclkern.training.throughput import first_pass_flops


def run(options: argparse.Namespace) -> int:
    """Print the plan of a step, or its ledger, as text or JSON; 1 if the ledger's budget is exceeded."""
    if options.ledger and options.gpus:
        raise UserError("--gpus: got --ledger too, which is of one GPU; give one of them")
    if options.check or options.update:
        if not options.ledger:
            raise UserError("--check and --update: belong to --ledger")
        return _budget(options)
    of_gpus = {"--link": options.link, "--rate": options.rate, "--parallel": options.parallel}
    if options.retrieval:
        return _retrieval(options)
    if alone := [name for name, value in of_gpus.items() if value is not None and not options.gpus]:
        raise UserError(f"{alone[0]}: got {of_gpus[alone[0]]} without --gpus, to which it belongs; add --gpus 8")
    config = load(options.config, options.overrides)
    if options.parallel:
        config = replace(config, run=replace(config.run, parallel=options.parallel))
    frames = options.frames
    if frames is None:
        frames = config.data.num_frames if config.model.max_frames else 1
    sizes = {"caption_tokens": options.caption_tokens, "num_frames": frames}
    device = None if config.run.device == "auto" else config.run.device.partition(":")[0]
    described = describe_plan(
        config.model, config.objectives, config.step, **sizes, device=device, backend=config.run.backend
    )
    sizes["padded_tokens"] = min(options.caption_tokens + 5, config.model.max_text_len)
    text: Callable[[dict[str, Any]], str]
    if options.ledger:
        rows = config.run.batch_size
        described = measure(config.model, config.objectives, config.step, rows=rows, **sizes)
        text = format_ledger
    elif options.gpus:
        link = scaling.LINK if options.link is None else 1e9 * options.link
        rate = scaling.RATE if options.rate is None else 1e12 * options.rate
        calculator = scaling.Calculator(config, link, rate=rate, **sizes)
        described = scaling.describe_scale(calculator, _numbers(options.gpus))
        text = scaling.format_scale
    else:
        memory = memory_of_run(config, **sizes)
        first_pass = first_pass_flops(config, **sizes, device=device)
        described["first_pass"] = {"contrastive_batch": config.run.contrastive_batch, "flops": first_pass}
        described["memory"] = {"rows": config.run.batch_size, **asdict(memory), "total": memory.total}
        text = _format
    print(json.dumps(described, indent=1) if options.json else text(described))
    return 0


def _retrieval(options: argparse.Namespace) -> int:
    if given := [name for name in ("ledger", "gpus", "link", "parallel") if getattr(options, name)]:
        raise UserError(f"--{given[0]}: got --retrieval too, which plans no step; give one of them")
    config = load(options.config, options.overrides)
    sizes, _, candidates = options.retrieval.partition(":")
    try:
        images, texts = (int(number) for number in sizes.split("x"))
        count = None if candidates == "all" else int(candidates or config.evaluation.rerank)
    except ValueError:
        raise UserError(
            f"--retrieval: got {options.retrieval!r}, expected images x texts, such as 5000x25010, and how many "
            "candidates are re-ranked, such as 5000x25010:256 or 5000x25010:all"
        ) from None
    frames = options.frames or (config.data.num_frames if config.model.max_frames else 1)
    reranking = None if count == 0 else Reranking(count)
    plan = plan_retrieval(
        config.model, images, texts, reranking, text_tokens=options.caption_tokens, num_frames=frames
    )  # fmt: skip
    rate = scaling.RATE if options.rate is None else 1e12 * options.rate
    described = {**asdict(plan), "flops": plan.flops, "rate": rate, "seconds": plan.seconds(rate)}
    print(json.dumps(described, indent=1) if options.json else plan.describe(rate))
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--gpus: got {text!r}, expected numbers such as 8,64,256") from None


def _format(described: dict[str, Any]) -> str:
    memory = described["memory"]
    lines = [format_plan(described)]
    first_pass = described["first_pass"]
    if first_pass["flops"]:
        share = first_pass["flops"] / described["flops"]
        lines.append(
            f"first pass of a contrastive batch of {first_pass['contrastive_batch']} pairs: "
            f"{first_pass['flops'] / 1e9:.2f} GFLOP more, {share:.0%} of the step"
        )
    lines += ["", f"{'a GPU at the peak of training, estimated':50} {'GB':>6}"]
    lines += [f"{name:50} {size / 1e9:6.2f}" for name, size in memory.items() if name != "rows" and size]
    return "\n".join([*lines, f"with micro-batches of {memory['rows']}; beside it the CUDA context, and validation"])


def _budget(options: argparse.Namespace) -> int:
    file = Path(options.budget) if options.budget else step_budget.BUDGET
    if not file.exists():
        raise UserError(f"--budget: {file} does not exist")
    found = step_budget.figures()
    if options.update:
        step_budget.write(found, file)
    budget = step_budget.read(file)
    failed = step_budget.check(found, budget)
    if options.json:
        print(json.dumps({"cases": found, "failed": failed}, indent=1))
    else:
        print(step_budget.format_comparison(found, budget))
        print("".join(f"FAILED {line}\n" for line in failed), end="")
    return 1 if failed else 0
