"""Kernels of a step compiled ahead: which, for which GPU, and found again by the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig, cli
from sclkern.errors import UserError
from sclkern.kernels.config import assume, current_arch
from sclkern.step import StepConfig
from sclkern.tools import warmup

TINY = ["--config", "demo", "run.batch_size=4", "objectives.recipe=[mlsc]", "model.text_layers=0"]
TINY += ["model.vision_layers=0", "model.fusion_layers=1"]


def found(rows=4, **options):
    config = SCLConfig.preset("tiny").replace(text_layers=0, vision_layers=0, fusion_layers=1)
    return warmup.kernels_of(config, ObjectiveConfig(recipe=("mlsc",)), StepConfig(), rows=rows, **options)


def test_the_kernels_of_a_step_are_those_that_its_ops_launch():
    kernels = found(widths=(16,))
    names = {kernel.name for kernel in kernels}
    assert {"bias_gelu_forward_kernel", "bias_gelu_backward_kernel", "attention_backward_key_kernel"} <= names
    assert "embed_patches_forward_kernel" in names and len(set(kernels)) == len(kernels)
    dtypes = {value.dtype for kernel in kernels for _, value in kernel.arguments if isinstance(value, warmup.Argument)}
    assert torch.bfloat16 in dtypes
    # Sizes with which the compiler makes the same code are one kernel.
    other = [kernel for kernel in found(rows=12, widths=(16,)) if kernel.name.startswith("bias_gelu")]
    assert set(other) == {kernel for kernel in kernels if kernel.name.startswith("bias_gelu")}


def test_launchers_select_for_the_gpu_that_is_named():
    here, gpu = current_arch(torch.device("cuda", 0)), torch.device("cuda", 0)
    with warmup.selected_for("sm_120"):
        assert current_arch(gpu) == "sm_120"
        with warmup.selected_for(None):
            assert current_arch(gpu) == "sm_120"
    assert current_arch(gpu) == here
    with pytest.raises(ValueError, match="arch: got 'sm_1'"), assume("sm_1"):
        pass
    assert set(found(widths=(16,), precision=None)) != set(found(widths=(16,)))


# In a process of its own, because Triton's target is set for good: the binder of a launch on tensors, with the cache
# that another process filled, and a compiler that reports what it had to compile.
LOOKS_UP = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from sclkern.kernels import bias_gelu, launch

class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **others: hits.append(cache_hit)
for dtype in (torch.bfloat16, torch.float16):
    x, bias = torch.randn(48, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    with launch.recorded() as launches:
        bias_gelu.bias_gelu_forward(x, bias, bias_gelu.EXACT)
    for one in launches:
        one.kernel.warmup(grid=one.grid, **one.arguments)
print(hits)
"""
FILLS = """
import sys, torch
from sclkern.kernels import bias_gelu, launch
from sclkern.tools import warmup
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode(), torch.device("cuda"), launch.recorded() as launches:
    x, bias = torch.randn(96, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    bias_gelu.bias_gelu_forward(x, bias, bias_gelu.EXACT)
kernels = [warmup.kernel_of(one) for one in launches]
if __name__ == "__main__":
    outcome = warmup.compile_ahead(kernels, warmup.TARGETS["sm_90"])
    assert (outcome.kernels, outcome.compiled, outcome.failed) == (1, 1, ()), outcome
"""


def run(source: str, folder: Path) -> str:
    file = folder / "script.py"
    file.write_text(source)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_launcher_finds_what_was_compiled_ahead(tmp_path):
    assert "compiling 1 kernels" in run(FILLS, tmp_path)
    # The dtype that was not compiled ahead is not found.
    assert run(LOOKS_UP, tmp_path) == "[True, False]"


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What is to be compiled, in place of compiling it."""
    seen = []

    def compile_ahead(kernels, target, say=print):
        say(f"compiling {len(kernels)} kernels")
        seen.append((len(kernels), target))
        return warmup.Outcome(len(kernels), len(kernels), (), 1.25, tmp_path)

    monkeypatch.setattr(warmup, "compile_ahead", compile_ahead)
    monkeypatch.setattr(warmup, "cache_folder", lambda: tmp_path)
    return seen


def test_the_command_names_what_it_did(compiled, capsys):
    assert cli.main(["warmup", "--target", "sm_89", "--json", *TINY]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "sm_89" and report["compiled"] == report["kernels"] == compiled[0][0] > 10
    assert compiled[0][1] == ("cuda", 89, 32) and report["rows"] == 4
    assert cli.main(["warmup", "--target", "sm_90", *TINY]) == 0
    assert "others are compiled when they come" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is the target")
def test_without_a_gpu_the_target_is_to_be_named(capsys, monkeypatch):
    assert cli.main(["warmup", *TINY]) == 2
    assert "--target" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1 interprets kernels"):
        warmup.require_compiler()


def test_a_run_compiles_once(compiled, monkeypatch):
    from sclkern.cli.config_files import load

    monkeypatch.setattr(warmup, "this_target", lambda: ("cuda", 90, 32))
    said = []
    config = load(TINY[1], TINY[2:])
    assert warmup.warm_up(config, said.append).compiled > 10
    assert said[0].startswith("compiling")
    assert warmup.warm_up(config, said.append) is None and len(compiled) == 1
    assert warmup.warm_up(config, said.append, (16,)) is not None
    # Other sizes of a step are other kernels; eager ops have none.
    assert warmup.warm_up(load(TINY[1], [*TINY[2:], "run.precision=bfloat16"]), said.append) is not None
    assert warmup.warm_up(load(TINY[1], [*TINY[2:], "run.backend=eager"]), said.append) is None
