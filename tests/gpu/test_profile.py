"""The training loop under a profiler, on a GPU."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("graphs", ["false", "true"], ids=["plain", "graphs"])
def test_a_profile_has_the_time_of_its_kernels(tmp_path, graphs):
    # The configuration of a run needs more than the model does.
    pytest.importorskip("pydantic")
    from sclkern.cli.config_files import load
    from sclkern.tools.profile import run as profile

    options = ["run.device=cuda", "run.batch_size=8", f"run.cuda_graphs={graphs}"]
    config = load("demo", options)
    profiled = profile.record_steps(config, steps=2, warmup=2, output=tmp_path)
    seconds = {row["phase"]: row["device_seconds"] for row in profiled["phases"]}
    if graphs == "true":
        # A replay is in no phase of the model.
        assert seconds["other"] > 0 and seconds["optimiser"] > 0
    else:
        names = ("image encoder", "text encoder", "fusion layer 0", "fusion layer 1", "backward", "optimiser")
        assert all(seconds[name] > 0 for name in names)
    profile.mark_steps(config, steps=1, warmup=1)
