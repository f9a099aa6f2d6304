"""``sclkern profile``: a few steps of the pre-training loop, recorded by torch.profiler or marked for Nsight."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sclkern import __version__
from sclkern.errors import UserError
from sclkern.profiling import DOMAIN, PHASES, format_table, phase, phase_spans, phase_table, ranges
from sclkern.tools.profile.picture import draw_profile
from sclkern.training.config import PretrainConfig
from sclkern.training.logs import RunLog
from sclkern.training.loop import Pretraining
from sclkern.training.setup import resolve_device

TOOLS = {"nsys": "NVIDIA Nsight Systems", "ncu": "NVIDIA Nsight Compute"}
NO_PERMISSION = "ERR_NVGPUCTRPERM"


class ProfiledRun(Pretraining):
    """A new run that takes a few steps and leaves nothing behind: neither logs nor checkpoints."""

    def take_steps(self, steps: int, warmup: int, record: AbstractContextManager[Any]) -> Any:
        """Train ``warmup`` steps, then ``steps`` under ``record``; returns what ``record`` gave on entry."""
        self.log = RunLog(self.directory, start=0, total=warmup + steps)
        try:
            batches = self._batches()
            self._restart_clock()
            for _ in range(warmup):
                self._train_step(batches)
            self._wait()
            with record as recorded, ranges():
                for _ in range(steps):
                    with phase("step"):
                        self._train_step(batches)
                # What a GPU has still to do belongs to the steps that asked for it.
                self._wait()
            batches.close()
        finally:
            self.log.close()
        return recorded

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def record_steps(config: PretrainConfig, *, steps: int, warmup: int, output: str | Path) -> dict[str, Any]:
    """Record steps with torch.profiler and write ``trace.json``, ``phases.json``, ``phases.txt`` and ``profile.png``.

    Args:
        config: of the run; its ``run.output_dir`` and intervals of logging, saving and validation are not used.
        steps, warmup: how many are recorded, and how many are taken before.
        output: folder to write.

    Returns:
        The contents of ``phases.json``: machine, versions, configuration in short, and the table by phase.

    Raises:
        UserError: no steps, or the run cannot start (see ``Pretraining``).
    """
    _check_counts(steps, warmup)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    with _new_run(config) as run:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        recorder = torch.profiler.profile(activities=activities, acc_events=True)
        run.take_steps(steps, warmup, recorder)
        described = _describe(run, steps, warmup)
    trace = output / "trace.json"
    recorder.export_chrome_trace(str(trace))
    spans = phase_spans(json.loads(trace.read_text()))
    rows = phase_table(spans)
    found = {
        **described,
        "load_average_before": round(load, 2),
        "step_seconds": [span["seconds"] for span in spans if span["phase"] == "step"],
        "ranges": len(spans),
        "range_seconds_off": _seconds_when_off(),
        "phases": rows,
    }
    (output / "phases.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / "phases.txt").write_text(format_table(rows) + "\n")
    draw_profile(spans, rows, output / "profile.png")
    return found


def mark_steps(config: PretrainConfig, *, steps: int, warmup: int) -> None:
    """Take the steps between cudaProfilerStart and cudaProfilerStop, with NVTX ranges, for nsys or ncu to record.

    Raises:
        UserError: as ``record_steps``.
    """
    _check_counts(steps, warmup)
    # In a thread of autograd's own, the backward would be outside of the NVTX ranges, which are a thread's.
    with _new_run(config) as run, torch.autograd.set_multithreading_enabled(False):
        run.take_steps(steps, warmup, _cuda_profiler(run.device))


def tool_commands(arguments: Sequence[str], *, steps: int, output: str | Path, ncu_phase: str) -> dict[str, list[str]]:
    """The command lines that record the same steps with nsys, and the first of them with ncu, which runs every kernel
    again for each set of counters.

    Args:
        arguments: further ones of ``sclkern profile``. ncu_phase: whose kernels ncu records.
    """
    own = [sys.executable, "-m", "sclkern.cli", "profile", "--mark-only"]
    nsys = ["nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx,osrt"]
    nsys += ["--cuda-graph-trace=node", "--force-overwrite=true", f"--output={Path(output) / 'nsys'}"]
    ncu = ["ncu", "--profile-from-start=off", "--nvtx", "--nvtx-include", f"{DOMAIN}@{ncu_phase}/", "--set=full"]
    ncu += ["--target-processes=all", "--force-overwrite", f"--export={Path(output) / 'ncu'}"]
    return {"nsys": [*nsys, *own, f"--steps={steps}", *arguments], "ncu": [*ncu, *own, "--steps=1", *arguments]}


def run_tool(tool: str, command: Sequence[str], config: PretrainConfig, *, output: str | Path) -> None:
    """Make the folder that a command of ``tool_commands`` writes to, run it and pass on what it prints.

    Raises:
        UserError: the tool is not there, the run is not on a GPU, the tool failed, or it may not read the counters.
    """
    if shutil.which(tool) is None:
        raise UserError(f"--{tool}: {tool} is not on the PATH; install {TOOLS[tool]}, or leave --{tool} out")
    if (device := resolve_device(config.run.device)).type != "cuda":
        raise UserError(f"--{tool}: records a GPU, and run.device is {device}; leave --{tool} out for torch.profiler")
    Path(output).mkdir(parents=True, exist_ok=True)
    refused = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            refused |= NO_PERMISSION in line
    if refused:
        raise UserError(permission_advice(tool))
    if process.returncode:
        raise UserError(f"--{tool}: {tool} ended with status {process.returncode}; its output above tells why")


def permission_advice(tool: str) -> str:
    return (
        f"--{tool}: this user may not read the GPU's performance counters ({NO_PERMISSION}); an administrator can "
        "allow it on the host (driver option NVreg_RestrictProfilingToAdminUsers=0, or for a container "
        "--cap-add=SYS_ADMIN); --nsys and torch.profiler (neither option) need no counters"
    )


def format_commands(commands: dict[str, list[str]]) -> str:
    return "\n".join(f"{TOOLS[tool]}:\n  {shlex.join(command)}" for tool, command in commands.items())


def format_profile(found: dict[str, Any]) -> str:
    """What ``record_steps`` returns, as text: the run in two lines, then the table."""
    times = [1e3 * seconds for seconds in found["step_seconds"]]
    return (
        f"{found['parameters'] / 1e6:.1f} M parameters, recipe {found['recipe']}, batch {found['batch_size']} x "
        f"{found['accumulation']}, {found['precision']}, on {found['device']} with {found['threads']} threads\n"
        f"{found['steps']} steps after {found['warmup']}: median {statistics.median(times):.1f} ms, "
        f"{min(times):.1f} to {max(times):.1f}; times of all steps, without the phases within:\n\n"
        + format_table(found["phases"])
    )


def check_phase(name: str, config: PretrainConfig) -> None:
    """Raise a ``UserError`` unless this is the name of an NVTX range of a step."""
    layers = [f"fusion layer {number}" for number in range(config.model.fusion_layers)]
    known = [known for known in PHASES if known != "communication"]
    if name not in known + layers:
        raise UserError(f"--phase: got {name!r}, expected one of {', '.join(known + layers)}")


def _check_counts(steps: int, warmup: int) -> None:
    if steps < 1:
        raise UserError(f"--steps: got {steps}, expected 1 or more")
    if warmup < 0:
        raise UserError(f"--warmup: got {warmup}, expected 0 or more")


@contextmanager
def _new_run(config: PretrainConfig) -> Iterator[ProfiledRun]:
    with tempfile.TemporaryDirectory(prefix="sclkern-profile-") as folder:
        # No logging: it reads the losses back, which a step between two logged ones does not.
        yield ProfiledRun(replace(config, run=replace(config.run, output_dir=folder, log_every=2**31)))


@contextmanager
def _cuda_profiler(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()


def _describe(run: ProfiledRun, steps: int, warmup: int) -> dict[str, Any]:
    config, on_gpu = run.config, run.device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": torch.cuda.get_device_name(run.device) if on_gpu else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "sclkern": __version__,
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "recipe": config.objectives.recipe,
        "batch_size": config.run.batch_size,
        "accumulation": config.run.accumulation,
        "precision": config.run.precision,
        "backend": config.run.backend,
        "num_workers": config.data.num_workers,
        "steps": steps,
        "warmup": warmup,
    }


def _seconds_when_off(calls: int = 10_000) -> float:
    """What ``with phase(...)`` costs where nobody asked for it, the least of five measurements."""

    def enter_and_leave() -> None:
        with phase("step"):
            pass

    return min(timeit.repeat(enter_and_leave, number=calls, repeat=5)) / calls
