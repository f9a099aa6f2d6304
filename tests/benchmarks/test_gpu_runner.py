"""``benchmarks/gpu`` with stages of small files in place of the GPU's."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import runner
from benchmarks.gpu.plugin import LOG
from benchmarks.gpu.stages import Stage, files_that_use_a_gpu, stages

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_fails(n):
    assert n == 0, f"n is {n}"

@pytest.mark.skip(reason="no such device")
def test_is_skipped():
    pass
"""


@pytest.fixture
def stage(tmp_path):
    """(source, **options) -> a stage of one file."""

    def make(source=TESTS, name="small", **options):
        file = tmp_path / f"test_{name}.py"
        file.write_text(source)
        options_of_pytest = ["-c", str(tmp_path / "pytest.ini"), "--rootdir", str(tmp_path), str(file)]
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        return Stage(name, name, options_of_pytest, 1, **options)

    return make


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.records, "RESULTS", tmp_path / "results")
    return runner.Run(tmp_path / "out", "abc1234", 60)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_outcome_is_recorded_and_summarised(run, stage, capsys):
    assert runner.execute([stage()], run) == 1
    row, summary = rows(run.records)
    assert (row["passed"], row["failed"], row["skipped"], row["finished"]) == (1, 2, 1, True)
    assert list(row["failures"].values()) == ["AssertionError: n is 1", "AssertionError: n is 2"]
    assert row["skip_reasons"] == {"no such device": 1}
    assert summary["not_clean"] == ["small"] and summary["passed"] == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("small: 1 passed, 2 failed, 1 skipped; in ")
    assert printed[1].endswith("2 x test_small.py::test_fails 1: AssertionError: n is 1")
    assert json.loads(printed[-1]) == summary
    assert "assert n == 0" in run.log.read_text()


def test_what_ends_the_budget_loses_nothing(run, stage):
    # Longer than the stage has, and deaf to the request to stop.
    slow = "import time\ndef test_first(): pass\ndef test_endless():\n    time.sleep(300)\n"
    row = run.run(stage(slow), 6)
    assert row["problem"] == "cut off after 6 s" and not row["finished"] and row["passed"] == 1
    assert rows(run.records) == [row]
    assert rows(run.test_log)[0]["test"].endswith("test_first")


def test_what_is_interrupted_is_recorded_and_leaves_no_process(run, stage, monkeypatch):
    started = []
    usual = subprocess.Popen.wait

    def interrupted(process, timeout=None):
        started.append(process)
        if len(started) == 1:
            raise KeyboardInterrupt
        return usual(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(stage("import time\ntime.sleep(300)\n"), 60)
    (row,) = rows(run.records)
    assert row["problem"] == "interrupted" and not row["finished"]
    assert started[0].poll() is not None


def test_without_time_a_stage_is_not_begun(run, stage):
    assert run.run(stage(), 1)["problem"] == "no time left"


def test_stages_share_what_is_left(run, stage, monkeypatch):
    given = []
    monkeypatch.setattr(run, "run", lambda stage, seconds: given.append(seconds) or {"stage": "", "finished": True})
    selected = [Stage("a", "a", [], 1, max_seconds=2), Stage("b", "b", [], 1), Stage("c", "c", [], 3)]
    assert runner.execute(selected, run) == 0
    assert given[0] == 2 and given[1] == pytest.approx(15, abs=1) and given[2] == pytest.approx(60, abs=1)


def test_finished_stages_are_left_out_on_resuming(run, stage, monkeypatch):
    run.run(stage(name="whole"), 60)
    run.run(stage(name="cut"), 1)
    assert runner.Run(run.folder.parent, "abc1234", 60).finished() == {"whole"}
    assert runner.Run(run.folder.parent, "fffffff", 60).finished() == set()


def test_a_file_that_cannot_be_imported_is_a_failure(run, stage):
    row = run.run(stage("import no_such_package\n"), 60)
    assert row["failed"] == 1 and row["finished"]
    assert "no_such_package" in next(iter(row["failures"].values()))


def test_a_missing_tool_is_reported(run, stage):
    row = run.run(stage(prefix=["no-such-sanitizer"]), 60)
    assert row["problem"] == "no-such-sanitizer is not on PATH" and not row["finished"]


def test_errors_of_the_sanitizer_are_counted(run, stage):
    source = "def test_prints(capfd):\n    with capfd.disabled(): print('========= ERROR SUMMARY: 3 errors')\n"
    row = run.run(stage(source), 60)
    assert row["sanitizer_errors"] == 3 and "3 memory errors" in runner.describe(row)


def test_failures_fill_no_more_than_a_few_lines():
    failures = {f"tests/test_{i}.py::test_x[{n}]": "E" * 400 for i in range(30) for n in range(9)}
    printed = runner.describe({"stage": "s", "failed": 270, "failures": failures, "seconds": 1.0}).splitlines()
    assert len(printed) == 2 + runner.MAX_SHOWN and max(map(len, printed)) <= 200
    assert printed[-1] == "  and 18 more functions"


def test_a_failure_stays_one_whatever_follows():
    lines = [{"test": "t", "outcome": outcome, "seconds": 1, "reason": outcome} for outcome in ("failed", "skipped")]
    assert runner.summarise([json.dumps(line) for line in lines])["failed"] == 1


def test_stages_name_files_that_exist():
    for stage in stages():
        if stage.module:
            assert importlib.util.find_spec(stage.arguments[0]), stage.name
            continue
        named = [word for word in stage.arguments if "/" in word]
        assert named and all((ROOT / word).exists() for word in named), stage.name
    everywhere = {word for stage in stages() for word in stage.arguments}
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert f"tests/gpu/{file.name}" in everywhere


def test_files_that_run_kernels_are_chosen():
    chosen = {str(Path(file).relative_to(ROOT)) for file in files_that_use_a_gpu()}
    assert {"tests/ops", "tests/nn", "tests/step/test_synchronisation.py"} <= chosen
    assert not {"tests/test_cli.py", "tests/gpu/test_smoke.py", "tests/ops/test_attention.py"} & chosen


def test_a_stage_may_be_a_module(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = tmp_path / "stage_module.py"
    file.write_text("import sys; print(sys.argv[1:]); sys.exit(int(len(sys.argv) != 5))")
    row = run.run(Stage("tune", "tune", ["stage_module"], 1, module=True), 50)
    assert row["finished"] and "problem" not in row
    assert f"['--budget', '45', '--results', '{run.output}']" in run.log.read_text()
    file.write_text("raise ValueError('no rates')")
    row = run.run(Stage("tune", "tune", ["stage_module"], 1, module=True), 50)
    assert not row["finished"] and row["problem"] == "ValueError: no rates"


def test_options():
    assert not {"sanitizer", "tune", "training"} & set(command.parse([]).groups)
    assert "smoke" in command.parse([]).groups and command.parse(["--only", "tune"]).groups == ["tune"]
    assert command.parse(["--only", "smoke,sanitizer"]).groups == ["smoke", "sanitizer"]
    with pytest.raises(SystemExit):
        command.parse(["--only", "everything"])


# As where a GPU machine's packages are missing.
WITHOUT = """
import importlib.machinery, sys

MISSING = {"hypothesis", "pydantic", "pyarrow", "tensorboard", "matplotlib", "nvtx", "ruff", "av"}

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
"""


def run_without(tmp_path, *arguments):
    """pytest in a process that lacks those packages: the line of each test, and of each file not collected."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    each = tmp_path / "each.log"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, LOG: str(each), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "benchmarks.gpu.plugin", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return rows(each) if each.exists() else []


def test_what_runs_on_a_gpu_is_collected_without_what_its_machine_may_lack(tmp_path):
    wanted = (
        "tests/gpu",
        "tests/ops",
        "tests/nn",
        "tests/step/test_synchronisation.py",
        "benchmarks/cases/test_step.py",
    )
    assert run_without(tmp_path, "--collect-only", *wanted) == []


USES_HYPOTHESIS = """
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

@st.composite
def numbers(draw):
    return draw(st.integers(0, 3) | st.none())

@pytest.mark.parametrize("kind", ["a", "b"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow, *HealthCheck])
@given(number=numbers(), other=st.lists(st.sampled_from([1, 2]), min_size=1).map(len))
@example(number=1, other=2)
def test_drawn(kind, number, other):
    raise AssertionError

def test_plain():
    pass
"""


def test_without_hypothesis_its_tests_alone_are_skipped(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    file = tmp_path / "test_drawn.py"
    file.write_text(USES_HYPOTHESIS)
    tests = run_without(tmp_path, "-c", str(tmp_path / "pytest.ini"), str(file))
    assert [(t["outcome"], t.get("reason")) for t in tests] == [
        ("skipped", "hypothesis is not installed"),
        ("skipped", "hypothesis is not installed"),
        ("passed", None),
    ]


def test_the_most_important_records_come_in_the_first_half():
    by_default = [stage for stage in stages() if stage.group not in command.ONLY_BY_NAME]
    assert [stage.name for stage in by_default[:4]] == ["smoke", "tests/accuracy", "step/64", "ops/1"]
    assert sum(stage.weight for stage in by_default) == command.parse([]).budget == 400
    assert sum(stage.weight for stage in by_default[:4]) == 200
    # Each case of the step runs in one stage.
    steps = {stage.name: stage.arguments[-1] for stage in by_default if stage.group == "step"}
    assert steps == {
        "step/64": "64-planned or (64-separate and not compiled)",
        "step": "not 64-planned and not (64-separate and not compiled)",
    }
