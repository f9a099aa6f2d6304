"""The hook for wandb and trackio, by stand-ins of the signatures that both have."""

import sys
from types import ModuleType

import pytest

from sclkern import UserError
from sclkern.training.config import load_config
from sclkern.training.pretraining import Pretraining
from sclkern.training.tracking import check_tracker, open_tracker
from tiny_run import NO_LAYERS, overrides, small_data


class TrackedRun:
    def __init__(self, options):
        self.options, self.rows, self.finished = options, [], False

    def log(self, data, step=None, commit=None):
        self.rows.append((step, dict(data)))

    def finish(self, exit_code=None, quiet=None):
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """A package that is installed, and the runs that were begun with it."""
    module, runs = ModuleType(request.param), []

    def init_wandb(entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None, **_):
        runs.append(TrackedRun({"project": project, "name": name, "id": id, "resume": resume, "config": config}))
        return runs[-1]

    def init_trackio(project, name=None, *, resume="never", config=None, embed=True, **_):
        runs.append(TrackedRun({"project": project, "name": name, "resume": resume, "config": config}))
        return runs[-1]

    module.init = init_wandb if request.param == "wandb" else init_trackio
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return request.param, runs


def test_a_missing_package_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="got 'wandb', which is not installed; pip install wandb"):
        check_tracker("wandb")
    check_tracker(None)


def test_nothing_is_written_without_a_tracker(tmp_path):
    assert open_tracker(None, tmp_path, resumed=False, config={}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_goes_on_as_the_same_tracked_run(tracker, tmp_path):
    name, runs = tracker
    for resumed in (False, True, False):
        open_tracker(name, tmp_path, resumed=resumed, config={"run": {"seed": 1}})
    known = [run.options["id" if name == "wandb" else "name"] for run in runs]
    assert known[0] == known[1] != known[2]
    assert all(run.options["resume"] == "allow" and run.options["config"] == {"run": {"seed": 1}} for run in runs)


def test_a_run_sends_what_it_logs(tracker, tmp_path):
    name, runs = tracker
    changes = {**small_data(tmp_path), **NO_LAYERS, "run__max_steps": 2, "run__tracker": name, "evaluation__rerank": 0}
    config = load_config(overrides=overrides(tmp_path / "run", **changes))
    assert Pretraining(config).run()
    (run,) = runs
    steps = {step for step, _ in run.rows}
    logged = set().union(*(data for _, data in run.rows))
    assert steps == {1, 2} and run.finished
    assert {"train/total", "train/grad_norm", "train/learning_rate_fusion", "train/memory_gb", "val/total"} <= logged
    assert {"train/itc_negatives", "train/itc_temperature", "val/recall_sum"} <= logged
