"""Candidates reach the launch, what is wrong or fails is recorded and not timed, the report says what to change."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sclkern.ops.dispatch import interpreted

if interpreted():
    pytest.skip("an interpreted kernel is not launched", allow_module_level=True)

from benchmarks.harness import timing, verification
from benchmarks.tuning import __main__ as program
from benchmarks.tuning import candidates, launches, run
from benchmarks.tuning.candidates import Candidate
from benchmarks.tuning.plan import MAX_REGISTERS, PLAN, examined, plan_table, survivors
from benchmarks.tuning.report import report
from sclkern.errors import UserError
from sclkern.kernels.config import LAUNCHER_NUMBERS
from sclkern.tools.bench import records
from sclkern.tools.bench.roofline import H200
from sclkern.tools.specs import Size
from sclkern.tools.static.compilation import longest_loop

ROOT = Path(__file__).parents[2]
GROUPS = candidates.groups()
FORWARD = next(group for group in GROUPS if group[0].group[:3] == ("attention", "325", "forward"))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "/".join(group[0].group))
def test_every_candidate_reaches_the_launch(group):
    present, seen = launches.launches(group[0]), set()
    for candidate in group[1:]:
        found = launches.changed(candidate, present)
        assert found, f"{candidate}: launches what the present configuration does"
        wanted = {name: v for name, v in candidate.values.items() if name not in LAUNCHER_NUMBERS}
        kernels = [launch for launch in found if wanted.items() <= launch.arguments.items()]
        assert kernels, (str(candidate), [launch.config for launch in found])
        seen.add(tuple(launch.key for launch in found))
    assert len(seen) == len(group) - 1, "two candidates launch the same"
    # Nothing stays behind.
    assert [launch.key for launch in launches.launches(group[0])] == [launch.key for launch in present]


def test_present_configurations_come_first_and_names_are_unique():
    assert all(not group[0].values and all(c.values for c in group[1:]) for group in GROUPS)
    names = [str(candidate) for group in GROUPS for candidate in group]
    assert len(set(names)) == len(names)
    assert all(candidate.predicted > 0 and candidate.reason for group in GROUPS for candidate in group)


def test_a_name_that_a_kernel_does_not_have_is_an_error():
    wrong = dataclasses.replace(FORWARD[1], values={"BLOCK_ROWS": 64})
    with pytest.raises(ValueError, match="attention_forward_kernel: got BLOCK_ROWS, expected some of BLOCK_QUERIES"):
        launches.launches(wrong)


def test_a_kernel_that_is_not_launched_is_an_error():
    # One tile has all keys of 13: there is no launch by query.
    small = Size("325x13", {"B": 2, "Lq": 325, "Lk": 18, "text": "k"}, 1)
    with pytest.raises(ValueError, match="attention_backward_query_kernel: not launched"):
        launches.launches(Candidate("attention", small, "backward", "attention by query", {"num_warps": 4}))


def test_an_error_inside_leaves_nothing_behind():
    before = [launch.key for launch in launches.launches(FORWARD[0])]
    with pytest.raises(KeyError), launches.configured(FORWARD[1]):
        assert [launch.key for launch in launches.launches(FORWARD[0])] != before
        raise KeyError
    assert [launch.key for launch in launches.launches(FORWARD[0])] == before


INTERPRETED = """
from benchmarks.harness import verification
from benchmarks.harness.op_cases import IMPLEMENTATIONS, Case
from benchmarks.tuning.candidates import Candidate
from benchmarks.tuning.launches import configured, launches
from sclkern.tools.specs import Size
import torch

size = Size("5", {"T": 5}, 1)
case = Case("bias_gelu", size, torch.float32, IMPLEMENTATIONS["bias_gelu"][0], "backward")
for values in ({}, {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 1024}):
    candidate = Candidate("bias_gelu", size, "backward", "bias_gelu", values)
    (launch,) = launches(candidate)
    print(launch.grid)
    with configured(candidate):
        verification.clear_caches()
        assert verification.verify(case)["error"] < 1e-6
"""


def test_a_candidate_computes_the_same_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # 5 rows in tiles of 32 and of 2, 3072 columns in tiles of 128 and of 1024.
    assert done.stdout.split("\n")[:2] == ["(1, 24)", "(3, 3)"]


def test_the_plan_has_every_candidate():
    plan = json.loads(PLAN.read_text())
    rows = {row["case"]: row for row in plan["candidates"]}
    every = {str(c): c for group in GROUPS for c in group}
    assert rows.keys() == every.keys(), "`python -m benchmarks.tuning --plan` writes it anew"
    assert plan["target"] == "sm_90" and plan["triton"]
    for name, row in rows.items():
        assert row["predicted"] == every[name].predicted and row["reason"] == every[name].reason
        assert row["kernels"] or row["dropped"]
    assert not any(rows[str(group[0])]["dropped"] for group in GROUPS)


def test_what_spills_is_dropped():
    group = [Candidate("linear_cross_entropy", GROUPS[0][0].size, "forward", "words")]
    group = [dataclasses.replace(group[0], size=Size("125", {"N": 125}, 1))]
    group.append(dataclasses.replace(group[0], values={"BLOCK": 32768, "num_warps": 8}))
    present, greedy = examined([group])
    assert present["dropped"] is None and present["kernels"][0]["registers"] <= MAX_REGISTERS
    assert "spills" in greedy["dropped"]
    table = plan_table([present, greedy])
    assert "| linear_cross_entropy | 1 | 0 |" in table


def test_groups_are_chosen_by_name():
    (first, *_) = chosen = program.selected("attention", "325")
    assert {group[0].op for group in chosen} == {"attention"} and first[0].size.name == "325"
    with pytest.raises(UserError, match="--op: got nothing, expected some of attention"):
        program.selected("nothing", None)
    with pytest.raises(UserError, match="no candidate"):
        program.selected("bias_gelu", "4x197")


def test_a_cut_off_run_has_the_most_promising_of_every_group():
    order = run.ordered(GROUPS)
    assert [group[0].group for group in order[: len(GROUPS)]] == [group[0].group for group in GROUPS]
    assert all(not group[0].values for group in order)
    once = [str(c) for group in order for c in group[1:]]
    assert sorted(once) == sorted(str(c) for group in GROUPS for c in group[1:])


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(group, seconds of each, lost) -> records; "wrong" and "broken" stand for what happens instead."""

    def device(case):
        outcome = times.pop(0)
        if outcome == "broken":
            raise RuntimeError("out of resources: shared memory\nmore")
        return {"device_quartiles": [0.99 * outcome, outcome, 1.01 * outcome], "captured": True}

    def verify(case):
        if times[0] == "wrong":
            times.pop(0)
            raise verification.WrongResultError("out is off by 1.0")
        return {"error": 1e-3, "eager_error": 1e-3, "checked_at": case.size.name}

    monkeypatch.setattr(verification, "verify", verify)
    monkeypatch.setattr(timing, "on_device", device)
    times = []

    def measured_run(group, outcomes, lost=False, done=None, seconds=60.0):
        times[:] = outcomes

        def record(case, **values):
            records.append(case, results=tmp_path, **values)

        run.tune([group], time.monotonic() + seconds, "now", H200, {}, done or {}, record, lambda: lost)
        return records.read([tmp_path]) if any(tmp_path.iterdir()) else []

    return measured_run


def test_every_outcome_is_recorded(measured):
    rows = measured(FORWARD[:5], [100e-6, 80e-6, "wrong", "broken", 99e-6])
    assert [row["outcome"] for row in rows] == ["measured", "measured", "wrong", "failed", "measured"]
    assert [row["case"] for row in rows] == [f"tune/{candidate}" for candidate in FORWARD[:5]]
    assert rows[1]["ratio"] == pytest.approx(0.8) and rows[1]["predicted"] == FORWARD[1].predicted
    assert 0 < rows[1]["roofline_fraction"] < 1 and rows[1]["sets"] == ["attention_forward_kernel"]
    assert "seconds" not in rows[2] and rows[3]["problem"] == "RuntimeError: out of resources: shared memory"
    told = report(rows)
    assert "| attention | 325 | forward | attention forward | 100.0 | 30% |" in told
    change = f"{FORWARD[1].config} for attention_forward_kernel in kernels/config_tables.py (20% less time)"
    assert f"- attention 325 forward: {change}" in told
    assert "wrong, out is off by 1.0" in told and "failed, RuntimeError" in told


def test_without_the_present_configuration_there_is_nothing_to_compare(measured):
    rows = measured(FORWARD[:4], ["wrong"])
    assert [row["outcome"] for row in rows] == ["wrong"]
    assert "keep" not in report(rows) and "wrong, out is off by 1.0" in report(rows)


def test_what_is_not_faster_is_kept(measured):
    told = report(measured(GROUPS[0][:2], [100e-6, 98.5e-6]))
    assert "keep the present one (the best other takes 0.98 of it)" in told and "config_tables" not in told


def test_a_lost_context_ends_the_process_and_another_goes_on(measured):
    group = GROUPS[0][:4]
    rows = measured(group, [100e-6, "broken"], lost=True)
    assert [row["outcome"] for row in rows] == ["measured", "failed"]
    rows = measured(group, [100e-6, 90e-6, 95e-6], done={str(group[1]): "failed"})
    assert {row["config"]: row["outcome"] for row in rows} == {
        group[0].config: "measured",
        group[1].config: "failed",
        group[2].config: "measured",
        group[3].config: "measured",
    }


def test_without_time_nothing_is_begun(measured):
    assert measured(GROUPS[0], [100e-6], seconds=1) == []


def test_the_report_is_that_of_the_files(measured, tmp_path, capsys):
    measured(GROUPS[0][:2], [100e-6, 80e-6])
    assert program.main(["--report", str(tmp_path)]) == 0
    assert "To change:" in capsys.readouterr().out
    assert report([]) == "No records of tuning."


@pytest.fixture
def device(measured, monkeypatch, tmp_path):
    """As on a machine with a GPU, on which every candidate takes as long as the present one; (folder, commands)."""
    commands = []
    made_on = {**records.environment(), "device": "gpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(records, "environment", lambda: made_on)
    monkeypatch.setattr(records, "device_name", lambda: "gpu")
    monkeypatch.setattr(program, "context_is_lost", lambda: False)
    monkeypatch.setattr(verification, "verify", lambda case: {"error": 0.0})
    monkeypatch.setattr(timing, "on_device", lambda case: {"device_quartiles": [1e-3] * 3})
    rates = {"copy_bytes_per_second": 4e12, "matrix_flops_per_second": {"bfloat16": 8e14}}
    monkeypatch.setattr(program.roofline, "measure", lambda: rates)
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    return tmp_path / "gpu", commands


def test_a_run_measures_what_the_plan_left_and_reports(device, tmp_path, capsys):
    arguments = ["--op", "linear_cross_entropy", "--results", str(tmp_path)]
    assert program.main(["--budget", "300", *arguments]) == 0
    rows = [row for row in records.read([device[0]]) if row["case"].startswith("tune/")]
    left = survivors()
    wanted = {str(c) for group in program.selected("linear_cross_entropy", None) for c in group}
    assert {row["case"] for row in rows} == {f"tune/{name}" for name in wanted & left}
    assert len(wanted & left) < len(wanted)
    told = capsys.readouterr().out
    assert "linear_cross_entropy 125 forward, words: keep the present one" in told and device[1] == []


def test_after_a_lost_context_the_run_goes_on_in_another_process(device, tmp_path, monkeypatch):
    def broken(case):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timing, "on_device", broken)
    monkeypatch.setattr(program, "context_is_lost", lambda: True)
    program.main(["--budget", "300", "--op", "mask_text", "--results", str(tmp_path)])
    (row,) = (row for row in records.read([device[0]]) if row["case"].startswith("tune/"))
    (command,) = device[1]
    assert row["outcome"] == "failed" and "illegal memory access" in row["problem"]
    assert command[command.index("--run") + 1] == row["run"] and 0 < int(command[command.index("--budget") + 1]) <= 300
    # What failed is not tried again, and without the present configuration there is nothing to compare.
    monkeypatch.setattr(program, "context_is_lost", lambda: False)
    monkeypatch.setattr(run, "measure", lambda candidate: pytest.fail("measured again"))
    assert program.main(command[3:]) == 0


def test_what_is_compiled_beforehand_is_what_will_be_launched():
    masks, norm = GROUPS[-1][:2], next(g for g in GROUPS if g[0].choice == "norm forward")[:1]
    jobs = run.precompile([masks, norm, masks])
    for candidate in masks:
        ((compiled,),) = (job.result() for job in jobs[candidate])
        assert compiled.num_warps == candidate.values.get("num_warps", 4)
    # With dropout and without.
    assert len({compiled.hash for job in jobs[norm[0]] for compiled in job.result()}) == 2


def test_the_longest_loop_is_counted():
    lines = ["MOV R1, c[0x0][0x28]", "IADD3 R2, R2, 0x1, RZ", "FFMA R3, R4, R5, R6", "@P0 BRA 0x10", "EXIT", "BRA 0x50"]
    text = "".join(f"        /*{16 * place:04x}*/                   {line} ;\n" for place, line in enumerate(lines))
    assert longest_loop(text) == 3
    assert longest_loop(text.replace("BRA 0x10", "BRA 0x40")) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert program.main(["--budget", "1"]) == 2
    assert "--plan needs none" in capsys.readouterr().out
