"""Whole pre-training runs: the script's loop as users get it, beside the published structure with eager ops.

The variants are "fused", "graphs" (the same with CUDA graphs) and "eager". They train in bfloat16 from random weights
on the embedded images, with the same seed, data and number of steps.

`python -m benchmarks.training.pretraining` records pairs a second, share of the machine's peak, wait for data, peak
memory and loss curve of each variant. Before that, each variant takes a few steps without dropout in float32, where its
losses must equal those of "eager"; otherwise it is not timed. `--draw FILE.png` draws the recorded curves and trains
nothing.

The embedded images are small (64 x 64) and enlarged for the model, and their captions are not COCO's: rates of decoding
say nothing about other data. A GPU may still work while the host waits for data: the share of the wait is an upper
bound of the time the GPU waits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.training.separate_process import CONFIG, ROOT, decoding_processes, run_in_process, stand_in_tokenizer
from sclkern import SCLConfig
from sclkern.data import demo_root
from sclkern.errors import UserError
from sclkern.step import StepConfig
from sclkern.tools.bench import records
from sclkern.training.config import PretrainConfig, load_config

# Options of each variant, on top of ``common``.
VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {},
    "graphs": {"run.cuda_graphs": True},
    "eager": {
        "run.backend": "eager",
        **{f"step.{key}": value for key, value in asdict(StepConfig.published()).items()},
    },
}
LOSSES = ("total", "itm", "mlm", "itc", "mvsc", "mlsc")
# Relative to a loss, or to 1 where that is larger. In float32 two orders of summation differ by 1e-6 in the first step,
# and each update of AdamW magnifies that.
TOLERANCE = 1e-3
EXACT_BATCH = 16
# Steps that count for no rate: they compile, tune and allocate.
WARM_UP_STEPS = 20
PROFILED_STEPS = 5
# Seconds of a budget kept for each job to come: an earlier one may compile for long.
RESERVE = 60.0


def common(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all variants share: ``pretrain_base.yaml`` on the embedded data, from random weights."""
    model = SCLConfig.preset(options.preset)
    smallest = len(json.loads((demo_root() / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]) + 1
    vocab_size = max(model.vocab_size, smallest)
    return {
        "model.preset": options.preset, "model.vocab_size": vocab_size, "model.mask_id": vocab_size - 1,
        "weights.text": "null", "weights.vision": "null",
        "data.root": "demo", "data.train_tables": "[pairs]", "data.val_tables": "[pairs]",
        "data.train_split": "train", "data.val_split": "val",
        "data.tokenizer": stand_in_tokenizer(folder, vocab_size),
        "data.num_workers": decoding_processes(options.batch_size, model.image_size),
        # The learning rates of the configuration are for pre-trained weights.
        "optimizer.learning_rate": 1e-4, "optimizer.fusion_factor": 1.0, "optimizer.head_factor": 1.0,
        "optimizer.max_grad_norm": 1.0,
        "run.batch_size": options.batch_size, "run.accumulation": 1, "run.device": options.device,
        "run.save_every": 0, "run.val_every": 0, "run.max_steps": options.steps,
        "run.log_every": min(10, max(1, options.steps // 10)),
    }  # fmt: skip


def arguments(*parts: dict[str, Any]) -> list[str]:
    """``key=value`` of the command line; later parts win."""
    return [f"{key}={value}" for key, value in {k: v for part in parts for k, v in part.items()}.items()]


def largest_difference(first: list[dict], second: list[dict]) -> tuple[int, float]:
    """How many steps both runs logged, and the largest difference of their losses, measured as ``TOLERANCE`` is."""
    others = {row["step"]: row for row in second}
    rows = [(row, others[row["step"]]) for row in first if row["step"] in others]
    differences = [
        abs(a[name] - b[name]) / max(1.0, abs(b[name])) if None not in (a[name], b[name]) else float("inf")
        for a, b in rows
        for name in LOSSES
    ]
    return len(rows), max(differences, default=float("inf"))


def summary(rows: list[dict], outcome: dict[str, Any], config: PretrainConfig) -> dict[str, Any]:
    """The record of a run: its outcome, and rates over the logged steps after the warm-up."""
    run = config.run
    warm = [row for row in rows if row["step"] > min(WARM_UP_STEPS, run.max_steps // 2)]
    record: dict[str, Any] = {
        "steps": rows[-1]["step"] if rows else 0,
        "batch_size": run.batch_size,
        "precision": run.precision,
        "backend": run.backend,
        "workers": config.data.num_workers,
        "warm_up": min(WARM_UP_STEPS, run.max_steps // 2),
        "curve": [[row["step"], row["total"]] for row in rows],
        "final_losses": {name: rows[-1][name] for name in LOSSES} if rows else {},
        **outcome,
    }
    for name in ("pairs_per_second", "teraflops_per_second", "mfu", "step_seconds"):
        if warm and name in warm[0]:
            record[name] = statistics.median(row[name] for row in warm)
    if warm:
        # A row holds means over the steps since the previous row.
        counts = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
        spans = list(zip(warm, counts[-len(warm) :], strict=True))
        seconds = sum(row["step_seconds"] * count for row, count in spans)
        record["pairs_per_second_overall"] = run.batch_size * sum(count for _, count in spans) / seconds
        record["data_wait_share"] = sum(row["data_seconds"] * count for row, count in spans) / seconds
    return record


def profile(overrides: list[str], folder: Path, output: Path, seconds: float | None) -> bool:
    """Run ``sclkern profile`` for some steps, copy phases and plot beside the records; True if both exist."""
    command = [sys.executable, "-m", "sclkern.cli", "profile", f"--config={CONFIG}", f"--steps={PROFILED_STEPS}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command += [f"--output={folder}", *overrides]
    try:
        done = subprocess.run(command, timeout=seconds, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        print(done.stdout.partition("\nwritten to")[0])  # the rest names a folder that is not kept
    except subprocess.SubprocessError as error:
        print(f"profile: {type(error).__name__}")
    files = [folder / name for name in ("phases.json", "profile.png") if (folder / name).exists()]
    for file in files:
        shutil.copy(file, output / f"training-{file.name}")
    return len(files) == 2


def draw(rows: list[dict], file: Path) -> None:
    """Draw the loss curves of records, a panel for each machine and preset.

    Raises:
        UserError: there are no records of pre-training.
    """
    panels: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        if row["case"].startswith("training/") and row.get("curve"):
            panels[row["device"], row["case"].split("/")[1]].append(row)
    if not panels:
        raise UserError("--draw: no records of pre-training in --output; train first, without --draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, ((device, preset), runs) in zip(axes.flat, sorted(panels.items()), strict=True):
        for row in runs:
            rate = f", {row['pairs_per_second']:.0f} pairs a second" if "pairs_per_second" in row else ""
            axis.plot(*zip(*row["curve"], strict=True), label=f"{row['case'].split('/')[2]}{rate}")
        axis.set(title=f"{preset}, {runs[0]['precision']}, batch {runs[0]['batch_size']}, {device}", xlabel="step")
        axis.set(ylabel="training loss")
        axis.legend()
    figure.savefig(file, dpi=110)


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--exact-steps", type=int, default=20, help="steps of the comparison in float32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--preset", default="base", help="model: tiny, demo or base")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ways", default="fused,eager", help=f"variants, by commas: {', '.join(VARIANTS)}")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--output", "--results", type=Path, default=records.RESULTS, help="folder of the records")
    parser.add_argument("--profile", action="store_true", help="also profile the fused variant")
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="draw the records in --output, and end")
    options = parser.parse_args(given)
    options.variants = options.ways.split(",")
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"--ways: got {sorted(unknown)}, expected some of {', '.join(VARIANTS)}")
    for name in ("steps", "exact_steps", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected 1 or more")
    return options


class Clock:
    """Divides the rest of a budget of seconds among the jobs to come."""

    def __init__(self, budget: float, jobs: int) -> None:
        self.end, self.jobs = time.monotonic() + budget, jobs

    def share(self) -> float | None:
        """Seconds for the next job; None without a budget."""
        left = max(0.0, self.end - time.monotonic())
        self.jobs -= 1
        return max(left / (self.jobs + 1), left - RESERVE * self.jobs) if math.isfinite(left) else None


def compare(base: dict[str, Any], variants: list[str], steps: int, folder: Path, clock: Clock) -> dict[str, Any]:
    """Run each variant and "eager" without dropout in float32; returns the record of their largest differences."""
    exact = {
        **base, "model.dropout": 0.0, "run.precision": "float32", "run.max_steps": steps, "run.log_every": 1,
        "run.batch_size": min(EXACT_BATCH, base["run.batch_size"]),
    }  # fmt: skip
    runs, problems, comparisons = {}, {}, {}
    for name in ("eager", *variants):
        runs[name], outcome = run_in_process(arguments(exact, VARIANTS[name]), folder / f"exact-{name}", clock.share())
        if "problem" in outcome:
            problems[name] = outcome["problem"]
    for name in variants:
        compared, difference = largest_difference(runs[name], runs["eager"])
        largest = difference if math.isfinite(difference) else None
        comparisons[name] = {"steps": compared, "largest_difference": largest, "agrees": difference <= TOLERANCE}
    return {
        "batch_size": exact["run.batch_size"],
        "precision": "float32",
        "tolerance": TOLERANCE,
        "ways": comparisons,
        "curves": {name: [[row["step"], row["total"]] for row in rows] for name, rows in runs.items()},
        "problems": problems,
    }


def measure(options: argparse.Namespace) -> int:
    """Compare, train and record; returns 1 if a variant disagrees or did not run to its end."""
    problems = []
    # "eager", too, is timed only after another variant agreed with it.
    compared = [name for name in options.variants if name != "eager"] or ["fused"]
    with tempfile.TemporaryDirectory(prefix="sclkern-pretraining-") as temporary:
        folder = Path(temporary)
        base = common(options, folder / "tokenizer")
        configs = {name: load_config(CONFIG, arguments(base, VARIANTS[name])) for name in options.variants}
        clock = Clock(options.budget, 1 + len(compared) + len(configs) + options.profile)
        exact = compare(base, compared, options.exact_steps, folder, clock)
        file = records.append(f"training/{options.preset}/exact", results=options.output, **exact)
        for name, row in exact["ways"].items():
            outcome = f"{row['steps']} steps in float32, losses at most {row['largest_difference']} from eager's"
            print(f"{name}: {outcome}", flush=True)
            if not row["agrees"]:
                reason = exact["problems"].get(name) or exact["problems"].get("eager") or f"allowed: {TOLERANCE}"
                problems.append(f"{name}: not timed, {outcome}: {reason}")
        agreeing = {name for name, row in exact["ways"].items() if row["agrees"]}
        for name in [name for name in configs if name in agreeing or (name == "eager" and agreeing)]:
            rows, outcome = run_in_process(arguments(base, VARIANTS[name]), folder / name, clock.share())
            record = summary(rows, outcome, configs[name])
            records.append(f"training/{options.preset}/{name}", results=options.output, **record)
            print(describe(name, record), flush=True)
            if "problem" in record:
                problems.append(f"{name}: {record['problem']}")
        wanted = options.profile and "fused" in agreeing
        if wanted and not profile(arguments(base), folder / "profile", file.parent, clock.share()):
            problems.append("profile: not made")
    print("; ".join(problems) or f"records: {file}")
    return int(bool(problems))


def describe(name: str, record: dict[str, Any]) -> str:
    """The record of a variant in one line."""
    parts = [f"{name}: {record['steps']} steps of {record['batch_size']} pairs"]
    if "pairs_per_second" in record:
        parts.append(f"{record['pairs_per_second']:.3g} pairs a second")
        parts.append(f"{record['data_wait_share']:.1%} waiting for data")
    if "mfu" in record:
        parts.append(f"{record['mfu']:.1%} of the peak")
    if "peak_bytes" in record:
        parts.append(f"{record['peak_bytes'] / 1e9:.2f} GB")
    if record["curve"]:
        parts.append(f"loss {record['curve'][0][1]:.2f} to {record['curve'][-1][1]:.2f}")
    return ", ".join(parts + ([record["problem"]] if "problem" in record else []))


def main(given: list[str] | None = None) -> int:
    options = parse(given)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar fills a log file
    try:
        if options.draw:
            draw(records.read([options.output]), options.draw)
            return 0
        return measure(options)
    except UserError as error:
        print(f"benchmarks.training.pretraining: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running training is ended
    sys.exit(main())
