from pathlib import Path

import pytest
import torch

from sclkern.training import forecast
from sclkern.training.config import build_config
from sclkern.training.forecast import Forecast, checkpoint_bytes


@pytest.fixture
def optimizer():
    parameter = torch.nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(100)
    optimizer.step()
    return optimizer


def test_a_checkpoint_holds_weights_and_moments(optimizer):
    assert checkpoint_bytes(optimizer) == 3 * 400 + 4


def test_hours_and_space_are_told_once(monkeypatch, optimizer, tmp_path):
    times = iter([100.0, 100.0 + 19 * 36])
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(times))
    counts = Forecast(build_config({"run": {"max_steps": 120, "keep": 3}}).run, Path(tmp_path))
    told = [counts.count_step(step, optimizer) for step in range(1, 41)]
    assert told[19].startswith(
        "100 steps left, 1.0 h at 36 s a step, without validations; checkpoints take 4.82e-06 GB (4"
    )
    assert [text for text in told if text] == [told[19]]


def test_too_little_space_comes_with_the_remedy(monkeypatch, optimizer, tmp_path):
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    counts = Forecast(build_config({"run": {"max_steps": 120}}).run, Path(tmp_path))
    told = [counts.count_step(step, optimizer) for step in range(1, 21)]
    assert told[-1].endswith("are free; free more, or set a smaller run.keep")
