"""ALIGN-BENCH shared by three processes: the scores of one, to the digit."""

import json
import subprocess
import sys

import pytest
from exported_model import export
from ranks import environment

import look_alikes
from sclkern.cli import main
from sclkern.data.convert import Options, convert


def test_three_processes_score_what_one_does(tmp_path, make_model, capsys):
    tree = look_alikes.align_bench(tmp_path / "set", count=4)
    convert("align-bench", tree.root, tmp_path / "data", Options(), workers=1)
    export(make_model, tmp_path / "model")
    folders = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    command = ["evaluate", "align-bench", *folders, "run.device=cpu"]
    assert main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "-m",
        "sclkern.cli",
    ]
    done = subprocess.run([*torchrun, *command], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == alone
    assert alone["pictures"] == 4 and alone["global_box"] == pytest.approx(alone["chance_global_box"], abs=0.3)
