"""Every path that needs a GPU, from start to end, small, on a stub of one (``tests/helpers/stub_gpu``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import runner
from benchmarks.gpu.stages import stages
from stub_gpu import environment

ROOT = Path(__file__).parents[2]
GROUPS = ["smoke,tests", "step", "models,ops", "contrast", "tune,training"]


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process whose torch sees the stub."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment() | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_groups_are_all():
    # compute-sanitizer is a program for a GPU.
    assert {stage.group for stage in stages()} - {"sanitizer"} == {name for some in GROUPS for name in some.split(",")}


@pytest.mark.parametrize("groups", GROUPS)
def test_every_stage_ends_cleanly(tmp_path, groups):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", groups, "--output", str(tmp_path)]
    command += ["--budget", "1500"]
    # Under xdist, which pytest-benchmark knows by these, it times nothing.
    apart = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True)
    log = "".join(file.read_text()[-6000:] for file in tmp_path.rglob("*-gpu.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:] + log
    (folder,) = tmp_path.iterdir()
    assert folder.name == "nvidia-h200"
    rows = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    wanted = {stage.name for stage in stages() if stage.group in groups.split(",")}
    assert {row["stage"] for row in rows if "stage" in row} == wanted
    assert all(row["finished"] for row in rows if "stage" in row)
    cases = {row["case"].partition("/")[0] for row in rows}
    # Each kind of benchmark has left a record.
    assert cases >= {
        {"models": "model", "ops": "op"}.get(group, group)
        for group in groups.split(",")
        if group not in ("smoke", "tests")
    }
    captured = [row["captured"] for row in rows if "captured" in row]
    assert captured == [True] * len(captured)


CAPTURES = """
import torch
from benchmarks.harness import timing
from sclkern.step.cuda_graph import capture

def fails(run):
    stream = torch.cuda.Stream()
    graph, problem = timing.captured([run], stream)
    assert graph is None and problem, run
    return problem

x = torch.ones(4, device="cuda")
assert "waits for the device" in fails(lambda: x.sum().item())
assert "waits for the device" in fails(lambda: x[x > 0])
before = torch.cuda.current_stream()
try:
    with capture(torch.cuda.CUDAGraph()):
        x.sum().item()
except RuntimeError as error:
    assert "capturing" in str(error)
else:
    raise AssertionError("a read was captured")
assert torch.cuda.current_stream() is before and not torch.cuda.is_current_stream_capturing()
graph, problem = timing.captured([lambda: x.add_(1)], torch.cuda.Stream())
assert problem is None
held = x.clone()
graph.replay()
assert torch.equal(x, held + 1)
"""


def test_a_capture_that_fails_leaves_the_process_as_it_was():
    python("-c", CAPTURES)


HALF_OPEN = """
import torch
x = torch.ones(4, device="cuda")
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
except RuntimeError:
    pass
assert torch.cuda.is_current_stream_capturing()
"""


def test_the_stub_keeps_a_failed_capture_open_as_cuda_does():
    python("-c", HALF_OPEN)


AHEAD = """
from benchmarks.gpu import compile_ahead
from sclkern.tools.specs import SPECS
kernels = compile_ahead.kernels()
names = {kernel.name for kernel in kernels}
print(len(kernels), sorted(names))
from sclkern.kernels.config import KERNELS
missing = {name for of_pass in KERNELS.values() for name in of_pass} - names
print("missing", sorted(missing))
assert len(names) > 20 and len(missing) < 8, missing
"""


def test_what_is_compiled_ahead_covers_the_kernels():
    python("-c", AHEAD)


def test_compilation_beside_the_stages_ends_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    package = tmp_path / "benchmarks" / "gpu"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "compile_ahead.py").write_text("import time; print('begun', flush=True); time.sleep(300)")
    run = runner.Run(tmp_path / "out", "abc1234", 60)
    with command.compiling_ahead(run):
        end = time.monotonic() + 60
        while "begun" not in run.log.read_text() and time.monotonic() < end:
            time.sleep(0.05)
    assert run.log.read_text() == "begun\n"


def test_a_profile_has_the_times_of_the_device(tmp_path):
    arguments = ["--config", "demo", "--steps=1", "--warmup=1", f"--output={tmp_path}", "run.batch_size=4"]
    done = python("-m", "sclkern.cli", "profile", *arguments, "data.num_workers=0")
    assert "device ms" in done.stdout
    rows = json.loads((tmp_path / "phases.json").read_text())["phases"]
    assert {"backward", "image encoder", "optimiser"} <= {row["phase"] for row in rows if row["device_seconds"]}
