"""Benchmarks time no wrong result, give the reason of every skip, and cover every op."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import baselines, op_cases, profiler_trace, verification
from benchmarks.harness.implementations import DTYPES, UnsupportedError
from sclkern import ops
from sclkern.profiling import phase
from sclkern.tools.specs import Size

ROOT = Path(__file__).parents[2]
SMALL = Size("4x9", {"T": 36}, 1)
DROPPED = Size("4x9 dropped", {"T": 36}, 1, 0.1)
BROKEN = """
import torch
from sclkern import ops

right = ops.bias_gelu

def wrong(x, bias, **options):
    out = right(x, bias, **options)
    return out + 0.01 * (torch.arange(len(out)) == 5)[:, None]

ops.bias_gelu = wrong
"""


@pytest.fixture(autouse=True)
def fresh_checks():
    verification.clear_caches()


def case(op: str, name: str = "sclkern", size: Size = SMALL) -> op_cases.Case:
    implementation = next(known for known in op_cases.IMPLEMENTATIONS[op] if known.name == name)
    return op_cases.Case(op, size, torch.float32, implementation, "both")


def test_every_op_has_its_implementations():
    assert set(op_cases.IMPLEMENTATIONS) == set(ops.OPS)
    for op, implementations in op_cases.IMPLEMENTATIONS.items():
        names = [implementation.name for implementation in implementations]
        assert names[:3] == ["sclkern", "eager", "compile"], op
        assert len(set(names)) == len(names), op


def test_a_trace_gives_the_peak_of_memory_and_the_phases():
    def call():
        with phase("backward"):
            first = torch.ones(1000, 1000)
            second = first + 1
            del first
            third = second.sum()
        return second, third

    trace = profiler_trace.record_trace(call)
    assert 8e6 <= profiler_trace.peak_bytes(trace) < 8.1e6
    shares = profiler_trace.shares(trace)
    assert set(shares) == {"backward", "other"} and sum(shares.values()) == pytest.approx(1)
    assert profiler_trace.device_counts(trace) == {"launches": 0, "kernels": 0}


def test_launches_and_kernels_are_counted_separately():
    names = [
        ("cuda_runtime", "cudaGraphLaunch"),
        ("cuda_runtime", "cudaStreamSynchronize"),
        ("cuda_driver", "cuLaunchKernelEx"),
    ]
    names += [("kernel", "a"), ("kernel", "b"), ("gpu_memcpy", "Memcpy HtoD"), ("cpu_op", "aten::add")]
    events = [{"ph": "X", "cat": kind, "name": name} for kind, name in names]
    assert profiler_trace.device_counts({"traceEvents": events}) == {"launches": 2, "kernels": 3}


def test_every_case_has_a_name_and_a_priority():
    for gpu in (False, True):
        cases = op_cases.cases(gpu)
        assert len(set(map(str, cases))) == len(cases)
        assert {case.op for case in cases if case.implementation.name == "sclkern"} == set(ops.OPS)
        assert {case.priority for case in cases} <= {1, 2, 3}


# The first name of the option is kept beside the second.
@pytest.mark.parametrize("option", ["--importance", "--priority"])
def test_priority_selects_the_cases(option):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", option, "2"]
    done = subprocess.run([*command, "benchmarks/cases/test_ops.py"], cwd=ROOT, capture_output=True, text=True)
    selected = {line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "::test_op[" in line}
    gpu = torch.cuda.is_available()
    assert selected == {str(case) for case in op_cases.cases(gpu) if case.priority == 2}


@pytest.mark.parametrize(("op", "size"), [("bias_gelu", SMALL), ("dropout_add_layer_norm", DROPPED)], ids=str)
@pytest.mark.parametrize("name", ["sclkern", "eager"])
def test_a_right_result_passes(op, size, name):
    checked = verification.verify(case(op, name, size))
    assert 0 <= checked["error"] <= 1e-6


def test_one_wrong_row_is_not_timed(monkeypatch):
    right = ops.bias_gelu

    def wrong(x, bias):
        return torch.cat([right(x, bias)[:-1], torch.zeros_like(x[-1:])])

    monkeypatch.setattr(ops, "bias_gelu", wrong)
    with pytest.raises(verification.WrongResultError, match="bias_gelu 4x9 by sclkern: out is off by"):
        verification.verify(case("bias_gelu"))


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    right = ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda x, bias: right(x, 0.9 * bias + 0.1 * bias.detach()))
    with pytest.raises(verification.WrongResultError, match="gradient of bias is off by"):
        verification.verify(case("bias_gelu"))


def test_another_dropout_mask_is_not_timed(monkeypatch):
    right = ops.dropout_add_layer_norm

    def wrong(*arguments, seed=None, **options):
        return right(*arguments, seed=None if seed is None else seed + 1, **options)

    monkeypatch.setattr(ops, "dropout_add_layer_norm", wrong)
    with pytest.raises(verification.WrongResultError):
        verification.verify(case("dropout_add_layer_norm", size=DROPPED))


def test_a_result_that_is_not_finite_is_not_timed(monkeypatch):
    right = ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda x, bias: right(x, bias) * float("nan"))
    with pytest.raises(verification.WrongResultError):
        verification.verify(case("bias_gelu"))


def test_a_wrong_draw_is_not_timed(monkeypatch):
    right = ops.select_patches
    monkeypatch.setattr(ops, "select_patches", lambda **options: right(**options).flip(0))
    with pytest.raises(verification.WrongResultError, match="select_patches"):
        verification.verify(case("select_patches", size=Size("4", {"B": 4, "K": 8}, 1)))


def test_a_wrong_op_leaves_no_record(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # benchmarks refuse to run in a worker
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "broken", "--benchmark-only"]
    command += ["benchmarks/cases/test_ops.py", "--results", str(tmp_path / "results")]
    command += ["-k", "bias_gelu and forward and (sclkern or eager)"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "WrongResultError: bias_gelu" in done.stdout and "not timed" in done.stdout
    rows = [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    # The definition beside it was measured.
    assert {row["way"] for row in rows if row["case"].startswith("op/")} == {"eager"}
    (row,) = [row for row in rows if row["case"].startswith("op/")]
    assert row["seconds"] > 0 and row["roofline_fraction"] > 0 and row["copy_bytes_per_second"] > 0


def test_a_library_that_is_not_installed_says_so():
    with pytest.raises(UnsupportedError, match=r"^some-library: not installed$"):
        baselines.load("some-library", "no_such_library.functional", "function")


def test_a_library_with_another_interface_says_so():
    with pytest.raises(
        UnsupportedError, match=r"^some-library: dumps has no argument colour in the installed version$"
    ):
        baselines.load("some-library", "json", "dumps", "indent", "colour")
    with pytest.raises(UnsupportedError, match=r"^some-library: json\.nothing is missing"):
        baselines.load("some-library", "json", "nothing")


def test_an_apex_other_than_nvidias_is_recognised(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedError, match="NVIDIA"):
        baselines.load("apex", "apex.normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine")
    sys.modules.pop("apex", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these backends")
def test_a_backend_that_torch_cannot_force_gives_its_reason():
    item = case("attention", "sdpa-cudnn", Size("5x7", {"B": 1, "Lq": 5, "Lk": 18, "text": "k"}, 1))
    with pytest.raises(UnsupportedError, match=r"^torch SDPA cudnn: "):
        verification.verify(item)


def test_baselines_name_their_library_and_dtypes():
    for libraries in baselines.BASELINES.values():
        for library in libraries:
            assert library.package and library.slack >= 1 and set(library.dtypes) <= set(DTYPES)
