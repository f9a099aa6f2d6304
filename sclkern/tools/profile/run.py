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
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from sclkern import __version__
from sclkern.errors import UserError
from sclkern.profiling import DOMAIN, PHASES, collective, format_table, phase, phase_spans, phase_table, ranges
from sclkern.tools.profile.plot import plot_profile
from sclkern.training.config import PretrainConfig
from sclkern.training.logs import RunLog, SilentLog
from sclkern.training.pretraining import Pretraining
from sclkern.training.setup import resolve_device
from sclkern.training.world import World

TOOLS = {"nsys": "NVIDIA Nsight Systems", "ncu": "NVIDIA Nsight Compute"}
NO_PERMISSION = "ERR_NVGPUCTRPERM"


def record_steps(
    config: PretrainConfig, *, steps: int, warmup: int, output: str | Path, world: World | None = None
) -> dict[str, Any]:
    """Record steps with torch.profiler and write ``trace.json``, ``phases.json``, ``phases.txt`` and ``profile.png``.

    Each process of several writes its own, from its own trace; their collectives are phases.

    Args:
        config: of the run; its ``run.output_dir`` and intervals of logging, saving and validation are not used.
        steps: steps to record.
        warmup: steps to take before.
        output: folder to write.
        world: the processes that train together; None is this one by itself.

    Returns:
        The contents of ``phases.json``: machine, versions, configuration in short, and the table by phase.

    Raises:
        UserError: a count is too small, or the run cannot start (see ``Pretraining``).
    """
    _check_counts(steps, warmup)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    with _new_run(config, world) as run:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        recorder = torch.profiler.profile(activities=activities, acc_events=True)
        _take_steps(run, steps, warmup, recorder)
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        described = {**_describe(config, run.device, parameters), "steps": steps, "warmup": warmup}
        described |= {"rank": run.world.rank, "world_size": run.world.size}
    trace = output / "trace.json"
    recorder.export_chrome_trace(str(trace))
    spans = phase_spans(json.loads(trace.read_text()))
    rows = phase_table(spans)
    profile = {
        **described,
        "load_average_before": round(load, 2),
        "step_seconds": [span["seconds"] for span in spans if span["phase"] == "step"],
        "ranges": len(spans),
        "range_seconds_off": _seconds_when_off(),
        "phases": rows,
    }
    (output / "phases.json").write_text(json.dumps(profile, indent=1) + "\n")
    (output / "phases.txt").write_text(format_table(rows) + "\n")
    plot_profile(spans, rows, output / "profile.png")
    return profile


def mark_steps(config: PretrainConfig, *, steps: int, warmup: int, world: World | None = None) -> None:
    """Take the steps between cudaProfilerStart and cudaProfilerStop, with NVTX ranges, for nsys or ncu to record.

    Args:
        config: as in ``record_steps``.
        steps: steps to record.
        warmup: steps to take before.
        world: as in ``record_steps``.

    Raises:
        UserError: as ``record_steps``.
    """
    _check_counts(steps, warmup)
    # NVTX ranges belong to a thread: a backward in a thread of autograd would lie outside them.
    with _new_run(config, world) as run, torch.autograd.set_multithreading_enabled(False):
        _take_steps(run, steps, warmup, _cuda_profiler(run.device))


def tool_commands(arguments: Sequence[str], *, steps: int, output: str | Path, ncu_phase: str) -> dict[str, list[str]]:
    """Build the command lines of nsys and ncu.

    Args:
        arguments: further arguments of ``sclkern profile``.
        steps: steps that nsys records; ncu records one, because it repeats every kernel for each set of counters.
        output: folder of the reports.
        ncu_phase: phase whose kernels ncu records.

    Returns:
        Tool -> command line.
    """
    ours = [sys.executable, "-m", "sclkern.cli", "profile", "--mark-only"]
    nsys = ["nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx,osrt"]
    nsys += ["--cuda-graph-trace=node", "--force-overwrite=true", f"--output={Path(output) / 'nsys'}"]
    ncu = ["ncu", "--profile-from-start=off", "--nvtx", "--nvtx-include", f"{DOMAIN}@{ncu_phase}/", "--set=full"]
    ncu += ["--target-processes=all", "--force-overwrite", f"--export={Path(output) / 'ncu'}"]
    return {"nsys": [*nsys, *ours, f"--steps={steps}", *arguments], "ncu": [*ncu, *ours, "--steps=1", *arguments]}


def run_tool(tool: str, command: Sequence[str], config: PretrainConfig, *, output: str | Path) -> None:
    """Make the folder that a tool writes to, run the tool and pass on what it prints.

    Args:
        tool: "nsys" or "ncu".
        command: its command line from ``tool_commands``.
        config: of the run.
        output: folder of the report.

    Raises:
        UserError: the tool is not installed, the run is not on a GPU, the tool failed, or it may not read the counters.
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
        raise UserError(f"--{tool}: {tool} ended with status {process.returncode}; its output above says why")


def permission_advice(tool: str) -> str:
    """The message for a user who may not read the GPU's counters."""
    return (
        f"--{tool}: this user may not read the GPU's performance counters ({NO_PERMISSION}); an administrator can "
        "allow it on the host (driver option NVreg_RestrictProfilingToAdminUsers=0, or for a container "
        "--cap-add=SYS_ADMIN); --nsys and torch.profiler (neither option) need no counters"
    )


def format_commands(commands: dict[str, list[str]]) -> str:
    """Format ``tool_commands`` as text to copy."""
    return "\n".join(f"{TOOLS[tool]}:\n  {shlex.join(command)}" for tool, command in commands.items())


def format_profile(profile: dict[str, Any]) -> str:
    """Format a profile as text.

    Args:
        profile: from ``record_steps``.

    Returns:
        The run in two lines, then the table by phase.
    """
    times = [1e3 * seconds for seconds in profile["step_seconds"]]
    return (
        f"{profile['parameters'] / 1e6:.1f} M parameters, recipe {profile['recipe']}, batch {profile['batch_size']} x "
        f"{profile['accumulation']}, {profile['precision']}, on {profile['device']} with {profile['threads']} threads\n"
        f"{profile['steps']} steps after {profile['warmup']}: median {statistics.median(times):.1f} ms, "
        f"{min(times):.1f} to {max(times):.1f}; times of all steps, without the phases within:\n\n"
        + format_table(profile["phases"])
    )


def check_phase(name: str, config: PretrainConfig) -> None:
    """Check the name of a phase.

    Args:
        name: of ``--phase``.
        config: of the run; its model and objectives add phases.

    Raises:
        UserError: a step of this run has no such phase.
    """
    layers = [f"fusion layer {number}" for number in range(config.model.fusion_layers)]
    losses = [f"loss {objective.name}" for objective in config.objectives.selected]
    known = [known for known in PHASES if known != "communication"] + layers + losses
    if name not in known:
        raise UserError(f"--phase: got {name!r}, expected one of {', '.join(known)}")


def _check_counts(steps: int, warmup: int) -> None:
    if steps < 1:
        raise UserError(f"--steps: got {steps}, expected 1 or more")
    if warmup < 0:
        raise UserError(f"--warmup: got {warmup}, expected 0 or more")


@contextmanager
def _new_run(config: PretrainConfig, world: World | None) -> Iterator[Pretraining]:
    """A new run whose folder, with its logs, is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sclkern-profile-") as folder:
        # Without logging, which reads the losses back; most steps of a run do not.
        yield Pretraining(replace(config, run=replace(config.run, output_dir=folder, log_every=2**31)), world=world)


def _take_steps(run: Pretraining, steps: int, warmup: int, record: AbstractContextManager[Any]) -> None:
    """Train ``warmup`` steps, then ``steps`` under ``record``, each a phase."""
    if isinstance(run.parallel.call, DistributedDataParallel):
        # DDP reads the annotations of a function, and wants classes there, not their names.
        run.parallel.call.register_comm_hook(None, lambda _, bucket: _reduced_in_a_range(bucket))
    log = RunLog(run.directory, start=0, total=warmup + steps) if run.world.main else SilentLog()
    with log as run_log:
        batches = run.batches()
        run.clock.restart()
        for _ in range(warmup):
            run.train_step(batches, run_log)
        _synchronize(run.device)
        with record, ranges():
            for _ in range(steps):
                with phase("step"):
                    run.train_step(batches, run_log)
            # Work that the GPU has not finished belongs to the steps that launched it.
            _synchronize(run.device)
        batches.close()


def _reduced_in_a_range(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with a bucket of gradients by itself, which it does without a word to a profiler."""
    group = dist.group.WORLD
    assert group is not None  # there is a bucket
    with collective("all-reduce of gradients"):
        return allreduce_hook(group, bucket)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def _describe(config: PretrainConfig, device: torch.device, parameters: int) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "sclkern": __version__,
        "torch": torch.__version__,
        "parameters": parameters,
        "recipe": config.objectives.recipe_name,
        "batch_size": config.run.batch_size,
        "accumulation": config.run.accumulation,
        "precision": config.run.precision,
        "backend": config.run.backend,
        "num_workers": config.data.num_workers,
    }


def _seconds_when_off(calls: int = 10_000) -> float:
    """Cost of ``with phase(...)`` when it is off: the least of five measurements, in seconds."""

    def enter_and_leave() -> None:
        with phase("step"):
            pass

    return min(timeit.repeat(enter_and_leave, number=calls, repeat=5)) / calls
