"""Profiles: which phases a recorded step has, where its time is counted, and what is asked of nsys and ncu."""

import contextlib
import io
import json
import os
import re
import shlex
import sys
import types
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sclkern
from sclkern import ObjectiveConfig, SCLConfig, SCLModel, profiling
from sclkern.cli import main, parse
from sclkern.tools.profile import run as profile
from tiny_run import overrides

ROOT = Path(__file__).parents[2]
LAYERS = ["fusion layer 0", "fusion layer 1"]
LOSSES = [f"loss {name}" for name in ("itc", "itm", "mlm", "mvsc", "mlsc", "mltc")]
# A single process communicates with no other.
OF_A_STEP = [*(name for name in profiling.PHASES if name != "communication"), *LAYERS, *LOSSES]
# The recipe with every loss.
OPTIONS = {"objectives__recipe": "glscl", "model__patch_mask_token": "true", "run__device": "cpu"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a profile of two steps, and what was printed."""
    directory = tmp_path_factory.mktemp("profile")
    arguments = [item for item in overrides("not-written", **OPTIONS) if not item.startswith("run.max_steps")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["profile", "--steps", "2", "--warmup", "1", "--output", str(directory / "out"), *arguments])
    assert code == 0
    return directory / "out", printed.getvalue()


@pytest.fixture(scope="module")
def spans(recorded):
    return profiling.phase_spans(json.loads((recorded[0] / "trace.json").read_text()))


def test_the_trace_has_every_phase_of_every_step(spans):
    names = [span["phase"] for span in spans]
    assert {name: names.count(name) for name in OF_A_STEP} == dict.fromkeys(OF_A_STEP, 2)
    assert set(names) == set(OF_A_STEP)


def test_phases_lie_within_the_ones_that_contain_them(spans):
    holders = []
    for span in spans:
        del holders[span["depth"] :]
        assert len(holders) == span["depth"]
        for holder in holders:
            assert holder["start"] <= span["start"]
            assert span["start"] + span["seconds"] <= holder["start"] + holder["seconds"] + 1e-6
        expected = {"step": (), **dict.fromkeys(LAYERS, ("step", "fusion"))}
        assert tuple(holder["phase"] for holder in holders) == expected.get(span["phase"], ("step",))
        holders.append(span)


def test_the_table_counts_all_time_once(recorded):
    written = json.loads((recorded[0] / "phases.json").read_text())
    rows = written["phases"]
    assert {row["phase"] for row in rows} == {"other", *OF_A_STEP} - {"step"}
    assert all(row["calls"] == 2 and row["seconds"] >= 0 for row in rows)
    assert sum(row["seconds"] for row in rows) == pytest.approx(sum(written["step_seconds"]), rel=1e-6)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows == sorted(rows, key=lambda row: -row["seconds"])
    assert len(written["step_seconds"]) == written["steps"] == 2
    assert all(row["device_seconds"] is None and row["device_share"] is None for row in rows)


def test_a_profile_leaves_a_plot_and_the_printed_table_and_nothing_of_a_run(recorded):
    directory, printed = recorded
    assert {path.name for path in directory.iterdir()} == {"trace.json", "phases.json", "phases.txt", "profile.png"}
    assert matplotlib.image.imread(directory / "profile.png").std() > 0
    assert (directory / "phases.txt").read_text() in printed
    assert not Path("not-written").exists()


def test_the_commands_for_nsys_and_ncu_repeat_the_profile(recorded, monkeypatch):
    directory, printed = recorded
    nsys, ncu = (shlex.split(line) for line in printed.splitlines() if line.startswith(("  nsys ", "  ncu ")))
    assert {"--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--cuda-graph-trace=node"} <= set(nsys)
    assert {"--trace=cuda,nvtx,osrt", f"--output={directory / 'nsys'}"} <= set(nsys)
    assert {"--profile-from-start=off", "--nvtx", "--set=full", f"--export={directory / 'ncu'}"} <= set(ncu)
    assert ncu[ncu.index("--nvtx-include") + 1] == "sclkern@backward/"
    seen = []
    monkeypatch.setattr(profile, "mark_steps", lambda config, **counts: seen.append((config, counts)))
    for command in (nsys, ncu):
        assert command[command.index(sys.executable) :][:4] == [sys.executable, "-m", "sclkern.cli", "profile"]
        assert main(command[command.index("sclkern.cli") + 1 :]) == 0
    assert [(counts["steps"], counts["warmup"]) for _, counts in seen] == [(2, 1), (1, 1)]
    assert seen[0][0] == seen[1][0]
    assert seen[0][0].objectives.recipe == "glscl"


class Ranges:
    """A stand-in for the package nvtx, which keeps no record that could be read."""

    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def annotate(self, message, domain):
        self.seen.append((domain, message))
        yield


def test_marked_steps_are_nvtx_ranges_and_the_steps_before_are_not(monkeypatch):
    ranges = Ranges()
    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=ranges.annotate))
    assert main(["profile", "--mark-only", "--steps", "1", "--warmup", "1", *overrides("unused", **OPTIONS)]) == 0
    assert sorted(ranges.seen) == sorted(("sclkern", name) for name in OF_A_STEP)


def test_steps_on_a_gpu_lie_between_start_and_stop_of_its_profiler(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    with pytest.raises(ZeroDivisionError), profile._cuda_profiler(torch.device("cuda")):
        seen.append("step")
        _ = 1 / 0
    with profile._cuda_profiler(torch.device("cpu")):
        pass
    assert seen == ["start", "step", "stop"]


def recorded_names(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as recorder:
        run()
    return [event.name for event in recorder.events()]


def named_sine(x):
    for number in range(2):
        with profiling.phase(f"fusion layer {number}"):
            x = x.sin()
    return x


def test_off_there_are_no_ranges(monkeypatch):
    ranges = Ranges()
    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=ranges.annotate))
    assert not set(LAYERS) & set(recorded_names(lambda: named_sine(torch.ones(3))))
    with profiling.ranges():
        assert set(LAYERS) <= set(recorded_names(lambda: named_sine(torch.ones(3))))
    assert not set(LAYERS) & set(recorded_names(lambda: named_sine(torch.ones(3))))
    assert ranges.seen == [("sclkern", name) for name in LAYERS]


def test_the_package_nvtx_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # import raises
    with profiling.ranges():
        assert set(LAYERS) <= set(recorded_names(lambda: named_sine(torch.ones(3))))


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_named_code_compiles_in_one_graph(on):
    torch._dynamo.reset()
    with profiling.ranges() if on else contextlib.nullcontext():
        compiled = torch.compile(named_sine, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(torch.ones(3)), torch.ones(3).sin().sin())


def test_a_step_with_ranges_reads_nothing_back():
    # Fake tensors have a device and no values: a kernel cannot run on them, and reading one raises.
    with FakeTensorMode(), profiling.ranges():
        with torch.device("cuda"):
            model = SCLModel(SCLConfig.preset("tiny"), ObjectiveConfig(recipe="glscl"))
            ids = torch.zeros(4, 9, dtype=torch.int64)
            batch = {"image": torch.randn(4, 3, 32, 32), "text_ids": ids, "text_mask": ids + 1, "text_tokens": 30}
        names = recorded_names(lambda: model(batch, seed=5))
    assert {"image encoder", "loss mltc", *LAYERS} <= set(names)


def event(name, ts, dur, cat="user_annotation", tid=1, **args):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 1, "tid": tid, "args": args}


GPU_STEP = [
    event("step", 0, 100),
    event("image encoder", 10, 20),
    event("backward", 40, 50),
    event("c10d::allreduce_", 80, 5, "cpu_op"),
    event("cudaLaunchKernel", 15, 1, "cuda_runtime", correlation=1),
    event("cuLaunchKernel", 60, 1, "cuda_driver", tid=2, correlation=2),  # a thread of autograd's
    event("cudaLaunchKernel", 82, 1, "cuda_runtime", tid=3, correlation=3),
    event("cudaMemcpyAsync", 35, 1, "cuda_runtime", correlation=4),
    event("encode_kernel", 300, 7, "kernel", tid=9, correlation=1),
    event("gradient_kernel", 400, 40, "kernel", tid=9, correlation=2),
    event("ncclDevKernel_AllReduce", 500, 9, "kernel", tid=9, correlation=3),
    event("Memcpy HtoD", 200, 2, "gpu_memcpy", tid=9, correlation=4),
    event("of the warm-up", 1, 1000, "kernel", tid=9, correlation=5),
]


def test_work_of_the_device_belongs_to_the_phase_that_launched_it():
    rows = profiling.phase_table(profiling.phase_spans({"traceEvents": GPU_STEP}))
    assert {row["phase"]: (round(1e6 * row["seconds"]), round(1e6 * row["device_seconds"])) for row in rows} == {
        "backward": (45, 40),
        "communication": (5, 9),
        "image encoder": (20, 7),
        "other": (30, 2),
    }
    assert [row["phase"] for row in rows] == ["backward", "communication", "image encoder", "other"]
    assert sum(row["device_share"] for row in rows) == pytest.approx(1)
    table = profiling.format_table(rows).splitlines()
    assert table[0].split() == ["phase", "calls", "host", "ms", "%", "device", "ms", "%"]
    assert table[1].split()[0] == "backward"


def test_a_collective_of_torch_is_communication(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as recorder, profiling.ranges(), profiling.phase("backward"):
            torch.distributed.all_reduce(torch.ones(3))
    finally:
        torch.distributed.destroy_process_group()
    recorder.export_chrome_trace(str(tmp_path / "trace.json"))
    spans = profiling.phase_spans(json.loads((tmp_path / "trace.json").read_text()))
    assert [(span["phase"], span["depth"]) for span in spans] == [("backward", 0), ("communication", 1)]


def test_a_trace_without_phases_or_with_overlapping_ones_is_refused():
    with pytest.raises(ValueError, match="without phases"):
        profiling.phase_spans({"traceEvents": [event("aten::mul", 0, 5, "cpu_op")]})
    with pytest.raises(ValueError, match="'backward' began in 'step' and ended after it"):
        profiling.phase_spans({"traceEvents": [event("step", 0, 10), event("backward", 5, 9)]})


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tool(name, script): a command on the PATH that is said to record a GPU."""
    monkeypatch.setattr(profile, "resolve_device", lambda name: torch.device("cuda"))

    def write(name, script):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")

    return write


def test_ncu_without_permission_is_explained(tool, tmp_path, capfd):
    lines = [
        "==PROF== Connected to process 42",
        "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters",
    ]
    tool("ncu", "\n".join(f"echo '{line}' >&2" for line in lines))  # and an exit status of 0
    assert main(["profile", "--ncu", "--output", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr()
    assert "Connected to process 42" in printed.out
    assert "--ncu: this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM)" in printed.err
    assert "NVreg_RestrictProfilingToAdminUsers=0" in printed.err
    assert "--nsys and torch.profiler" in printed.err


@pytest.mark.parametrize("name", ["nsys", "ncu"])
def test_a_tool_gets_the_printed_command(tool, tmp_path, capfd, name):
    tool(name, 'printf "%s\\n" "$@"')
    arguments = ["--output", str(tmp_path / "out"), "--phase", "fusion layer 1", "run.batch_size=16"]
    assert main(["profile", f"--{name}", *arguments]) == 0
    given = capfd.readouterr().out.splitlines()
    commands = profile.tool_commands(
        ["--config=demo", "--warmup=3", "run.batch_size=16"],
        steps=5,
        output=tmp_path / "out",
        ncu_phase="fusion layer 1",
    )
    assert given == commands[name][1:]
    assert (tmp_path / "out").is_dir()  # neither tool makes it


def test_a_tool_that_fails_or_is_not_installed_is_reported(tool, tmp_path, capfd, monkeypatch):
    arguments = ["profile", "--nsys", "--output", str(tmp_path / "out")]
    tool("nsys", "echo no such option; exit 3")
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert "no such option" in printed.out
    assert "nsys ended with status 3" in printed.err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 2
    assert "nsys is not on the PATH; install NVIDIA Nsight Systems" in capfd.readouterr().err


def test_a_tool_for_gpus_is_not_started_on_a_cpu(tool, tmp_path, capfd, monkeypatch):
    tool("ncu", "echo started")
    monkeypatch.setattr(profile, "resolve_device", lambda name: torch.device("cpu"))
    assert main(["profile", "--ncu", "--output", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr()
    assert "records a GPU, and run.device is cpu" in printed.err
    assert not (tmp_path / "out").exists()
    assert "started" not in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: got 0, expected 1 or more"),
        (["--warmup", "-1"], "--warmup: got -1, expected 0 or more"),
        (["--phase", "fusion layer 2"], "--phase: got 'fusion layer 2', expected one of step, data wait"),
        (["--phase", "loss mltc"], "--phase: got 'loss mltc', expected one of step"),
        (["data.root=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_explained_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["profile", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_default_is_the_demo():
    assert parse(["profile"]).config == "demo"


def test_the_page_names_every_phase_and_its_code_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "profiling.md").read_text()
    assert all(f"`{name}`" in page for name in [*profiling.PHASES, *LAYERS, *LOSSES])
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, re.S).group(1), {})
    rows = profiling.phase_table(profiling.phase_spans(json.loads(Path("trace.json").read_text())))
    assert {"image encoder", "backward", "loss mvsc", *LAYERS} <= {row["phase"] for row in rows}


def test_the_page_shows_what_its_record_holds():
    page = (ROOT / "docs" / "profiling.md").read_text()
    (record,) = (ROOT / "benchmarks" / "results").glob("*/profile-*.json")
    assert record.name in page
    assert profile.format_profile(json.loads(record.read_text())) in page


def test_modules_have_ranges_on_request_and_nothing_otherwise():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 2, 128, activation="gelu", batch_first=True)
    model = torch.nn.ModuleDict({"plain": torch.nn.Linear(64, 64), "layer": layer})
    x = torch.randn(2, 5, 64)
    sclkern.fuse(model)

    def names():
        with torch.profiler.profile() as recorder, profiling.ranges(), profiling.phase("step"):
            model["layer"](model["plain"](x))
        return [event.name for event in recorder.events() if event.name.startswith("module ")]

    assert names() == []
    hooks = [len(module._forward_hooks) for module in model.modules()]
    marks = profiling.mark_modules(model)
    assert marks.names and all(name.startswith("layer") for name in marks.names)
    assert names() == [f"module {name}" for name in marks.names if name in {n.removeprefix("module ") for n in names()}]
    assert names()
    with torch.profiler.profile() as recorder:
        model["layer"](x)
    assert not any(event.name.startswith("module ") for event in recorder.events())
    marks.remove()
    assert names() == [] and [len(module._forward_hooks) for module in model.modules()] == hooks
