"""``sclkern profile`` under torchrun: a report for each rank, in which collectives are phases."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_run import overrides

ROOT = Path(__file__).parents[2]


def test_each_rank_writes_a_report_with_its_collectives(tmp_path):
    arguments = [item for item in overrides("not-written", run__device="cpu") if not item.startswith("run.max_steps")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command += ["-m", "sclkern.cli", "profile", "--steps=2", "--warmup=0", f"--output={tmp_path}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "collective all-gather" in done.stdout and "likewise for each rank, up to rank1" in done.stdout
    for rank in range(2):
        folder = tmp_path / f"rank{rank}"
        profile = json.loads((folder / "phases.json").read_text())
        calls = {row["phase"]: row["calls"] for row in profile["phases"]}
        assert (profile["rank"], profile["world_size"]) == (rank, 2)
        assert calls["collective all-gather"] >= 2 * 6 and calls["collective all-reduce of gradients"] >= 2
        assert (folder / "profile.png").exists() and (folder / "trace.json").exists()
