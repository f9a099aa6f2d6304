"""A training run in a process of its own, so that its memory and its failure do not affect another run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

# Set before torch is imported, for the reason given in sclkern/cli/__init__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from sclkern.data import demo_root
from sclkern.training.config import load_config
from sclkern.training.logs import RunLog, read_metrics
from sclkern.training.pretraining import Pretraining

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "pretrain_base.yaml"


class Measured(Pretraining):
    """The loop as it is, without the files and the retrieval at its end."""

    def save(self, name: str) -> None:
        self.finite.require(self.state.step, self.state.saved_step)

    def validate(self, run_log: RunLog) -> None:
        self.state.validated = self.state.step


def train(overrides: list[str], folder: str) -> None:
    """Train into ``folder`` and write ``outcome.json`` there; runs in a process of its own."""
    outcome: dict[str, Any] = {}
    try:
        run = Measured(load_config(CONFIG, [*overrides, f"run.output_dir={folder}"]))
        outcome = {"ran_on": run.device.type, "parameters": sum(p.numel() for p in run.model.parameters())}
        outcome["finished"] = run.run()
    except Exception as error:
        outcome["problem"] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise
    finally:
        outcome["peak_bytes"] = _peak_bytes(outcome.get("ran_on") == "cuda")
        (Path(folder) / "outcome.json").write_text(json.dumps(outcome))


def _peak_bytes(on_gpu: bool) -> int:
    """The peak of tensors on a GPU, or of the process's resident memory on a CPU."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def run_in_process(overrides: list[str], folder: Path, seconds: float | None) -> tuple[list[dict], dict[str, Any]]:
    """Train in a new process, stopped after ``seconds``; returns the logged steps and the outcome."""
    folder.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=train, args=(overrides, str(folder)))
    process.start()
    try:
        process.join(seconds)
        cut_off = process.is_alive()
    finally:
        if process.is_alive():
            process.terminate()  # the loop ends its step, then itself
            process.join(20)
        if process.is_alive():
            process.kill()
            process.join()
    rows, outcome = results_in(folder)
    finished = outcome.get("finished")  # the process may still be ending
    if cut_off and not finished:
        outcome["problem"] = f"cut off after {seconds:.0f} s"
    elif process.exitcode and not finished and "problem" not in outcome:
        outcome["problem"] = f"ended with status {process.exitcode}"
    return rows, outcome


def results_in(folder: Path) -> tuple[list[dict], dict[str, Any]]:
    """The steps that ``train`` logged, and its outcome, empty if the process was killed."""
    file = folder / "outcome.json"
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    return rows, json.loads(file.read_text()) if file.exists() else {}


def stand_in_tokenizer(folder: Path, vocab_size: int) -> Path:
    """The embedded tokenizer, filled with unused ids up to the model's vocabulary, with its mask token last."""
    shutil.copytree(demo_root() / "tokenizer", folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    mask = next(token for token in content["added_tokens"] if token["content"] == "<mask>")
    content["model"]["vocab"] |= {f"<unused {number}>": number for number in range(mask["id"], vocab_size - 1)}
    mask["id"] = vocab_size - 1
    file.write_text(json.dumps(content))
    return folder


def decoding_processes(batch_size: int, image_size: int) -> int:
    """Loader processes: one a core except two (training and pinning), as far as batches fit into shared memory."""
    in_flight = 4 * (4 * 3 * image_size**2 * batch_size)  # bytes of a worker, with room to spare
    return int(max(0, min(len(os.sched_getaffinity(0)) - 2, shutil.disk_usage("/dev/shm").free // in_flight)))
