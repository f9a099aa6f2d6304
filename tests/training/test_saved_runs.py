"""Runs saved by the first version, whose option value "reference" is "published" today, are read and resumed."""

from pathlib import Path

import pytest
import torch
import yaml

from sclkern.training.checkpoint import load_checkpoint, save_checkpoint
from sclkern.training.config import load_config
from sclkern.training.pretraining import Pretraining

# config.yaml of a run of that version, with recipe "glscl", every option "reference" and the step without sharing.
FIRST_VERSION = Path(__file__).parent / "first_version.yaml"


def test_its_configuration_means_the_published_options():
    config = load_config(FIRST_VERSION)
    assert config.objectives == type(config.objectives).published("glscl")
    assert config.step == type(config.step).published()
    assert config.optimizer.no_decay == "published"
    assert config.data.format == "auto"


@pytest.mark.usefixtures("one_thread")
def test_its_checkpoint_is_resumed_bit_for_bit(tmp_path):
    def run(name, *overrides, resume=False):
        config = load_config(FIRST_VERSION, [f"run.output_dir={tmp_path / name}", "run.max_steps=4", *overrides])
        assert Pretraining(config, resume=resume).run() == ("run.stop_at=2" not in overrides)
        return tmp_path / name / "checkpoints" / "latest.pt"

    whole = load_checkpoint(run("whole"))
    latest = run("half", "run.stop_at=2")
    state = load_checkpoint(latest)
    for later in ("data", "validated", "global_batch"):
        del state[later]
    assert set(state) == {"format", "config", "step", "best", "model", "optimizer", "bad_pictures"}
    old = yaml.safe_load(FIRST_VERSION.read_text())
    old["run"] |= {"output_dir": str(tmp_path / "half"), "max_steps": 4, "stop_at": 2}
    del state["format"]
    save_checkpoint(latest, {**state, "config": old})
    resumed = load_checkpoint(run("half", resume=True))
    assert resumed["config"]["objectives"]["negatives"] == "published"
    assert resumed["step"] == whole["step"] == 4
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
