"""Host times: ops are timed on the path to their kernels, under a driver that launches nothing."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.jit import JITFunction

from benchmarks import host_time
from benchmarks.harness.idle_driver import kernels_on_a_cpu
from benchmarks.harness.idle_step import step_calls
from sclkern import ops
from sclkern.kernels.config import override
from sclkern.ops.dispatch import interpreted
from sclkern.tools.specs import SPECS

if interpreted():
    pytest.skip("an interpreted kernel is not launched", allow_module_level=True)

# Of the arguments of Triton's launcher, those before the kernel's own.
LAUNCHER = 9


def test_the_program_measures_and_records(tmp_path, capsys):
    assert host_time.main(["--op", "bias_gelu,select_tokens", "--rounds", "2", "--results", str(tmp_path)]) == 0
    assert "layer_norm(x + r)" in capsys.readouterr().out
    rows = [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["host_time/bias_gelu", "host_time/select_tokens"]
    assert rows[0]["both_ratio"] == pytest.approx(rows[0]["both"] / rows[0]["baseline_both"])
    assert "both" not in rows[1] and rows[1]["forward"] > 0


def test_a_step_is_measured_too(tmp_path):
    assert host_time.main(["--step", "--rounds", "1", "--results", str(tmp_path)]) == 0
    rows = [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["host_time/step/float32", "host_time/step/bfloat16"]
    assert all(row["both_ratio"] == pytest.approx(row["both"] / row["baseline_both"]) for row in rows)


def test_the_kernels_of_a_step_are_launched():
    launches, call = [], step_calls("float32")["both"]
    with kernels_on_a_cpu(lambda *arguments: launches.append(arguments)):
        call()
    assert len(launches) > 300


def test_an_op_that_is_not_right_is_not_timed(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="...\nWrongResultError: off by 1")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    monkeypatch.setattr(host_time, "host_times", lambda *arguments: pytest.fail("timed"))
    assert host_time.main(["--op", "bias_gelu"]) == 1
    assert "not timed: WrongResultError: off by 1" in capsys.readouterr().err


def test_an_unknown_op_is_refused(capsys):
    assert host_time.main(["--op", "nothing"]) == 1
    assert "--op: got nothing, expected some of attention" in capsys.readouterr().err


def test_a_profile_names_functions(capsys):
    host_time.profile("bias_gelu", 1)
    assert "bias_gelu_forward" in capsys.readouterr().out


@pytest.fixture
def bound(monkeypatch):
    """Names of the kernels that went through Triton's binder."""
    names, run = [], JITFunction.run

    def watched(self, *arguments, **options):
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", watched)
    return names


def numbers(launch):
    """What a launch has beside tensors: the grid, the numbers of the kernel, and which tensors are absent."""
    return [type(value) if isinstance(value, torch.Tensor) else value for value in (*launch[:3], *launch[LAUNCHER:])]


@pytest.mark.parametrize("op", SPECS)
def test_a_repeated_call_launches_what_the_binder_did(op, bound):
    launches = []
    with kernels_on_a_cpu(lambda *arguments: launches.append(arguments)):
        call = list(host_time.calls_of(op).values())[-1]
        launches.clear()
        with override(()):
            bound.clear()
            call()
            first, by_binder = list(launches), list(bound)
            launches.clear()
            bound.clear()
            call()
    # A kernel may be launched twice alike.
    assert 0 < len(by_binder) <= len(first) and not bound
    assert [numbers(launch) for launch in launches] == [numbers(launch) for launch in first]


def test_other_addresses_dtypes_and_configurations_are_bound_again(bound):
    launches = []
    x, bias = torch.zeros(8, 32), torch.zeros(32)
    with kernels_on_a_cpu(lambda *arguments: launches.append(arguments)):
        ops.bias_gelu(x, bias)
        bound.clear()
        ops.bias_gelu(x, bias)
        assert not bound
        for _ in range(2):
            ops.bias_gelu(x, torch.zeros(33)[1:])
        assert len(bound) == 2, "an address that is no multiple of 16"
        ops.bias_gelu(x, bias.half())
        assert len(bound) == 3
        ops.bias_gelu(x, bias.half())
        assert len(bound) == 3
        with override(["bias_gelu_forward_kernel"], BLOCK_ROWS=2):
            ops.bias_gelu(x, bias)
        assert launches[-1][0] == 4 and len(bound) == 4
        ops.bias_gelu(x, bias)
        assert launches[-1][0] == 1


def test_nothing_stays_behind():
    with kernels_on_a_cpu():
        ops.bias_gelu(torch.zeros(8, 32), torch.zeros(32), backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="kernels need a GPU"):
            ops.bias_gelu(torch.zeros(8, 32), torch.zeros(32), backend="triton")
