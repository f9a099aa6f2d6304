"""A run by flash-attn and apex on a stub of a GPU: what asks for the device, its age and its dtypes runs as on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from stub_gpu import environment
from tiny_run import NO_LAYERS, overrides, small_data

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import pytest
import torch
import stand_ins
from sclkern.libraries import apex, flash
from sclkern.training.config import load_config
from sclkern.training.pretraining import Pretraining

stand_ins.install(pytest.MonkeyPatch())
# As on a GPU that has the libraries.
for library in (apex, flash):
    library.DEVICE_TYPES = {"cuda"}
flash.DTYPES = {torch.float16, torch.bfloat16}
run = Pretraining(load_config(None, sys.argv[1:]))
assert run.run() and next(run.model.parameters()).device.type == "cuda"
print({name for name, *_ in stand_ins.calls}, type(run.optimizer).__name__)
"""


def test_a_run(tmp_path):
    changes = {**NO_LAYERS, **small_data(tmp_path), "model__vision_layers": 1, "run__max_steps": 2}
    changes |= {"run__device": "cuda", "run__backend": "flash", "run__precision": "bfloat16"}
    changes |= {"run__layer_norm": "apex", "optimizer__name": "apex"}
    command = [sys.executable, "-c", CODE, *overrides(tmp_path / "run", **changes)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "{'flash_attn_varlen_func'} FusedAdam"
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (row["kind"], row["backend"]) == ("run", "flash (flash-attn 2.8.3.post2)")
