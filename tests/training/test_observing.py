"""What a run shows of itself: negatives, learning rates, the slowest process, waits, and their warnings."""

import time
from dataclasses import replace

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.profiling import collective
from sclkern.training.config import PretrainConfig
from sclkern.training.negatives import count_negatives
from sclkern.training.observing import (
    Meetings,
    Processes,
    learning_rates,
)
from sclkern.training.optim import build_optimizer
from sclkern.training.sections import OptimizerConfig, RunConfig

CPU = torch.device("cpu")


def config_of(recipe="scl", **run):
    options = {"batch_size": 8, "accumulation": 4, **run}
    return PretrainConfig(model=SCLConfig.preset("tiny"), objectives=ObjectiveConfig(recipe), run=RunConfig(**options))


def described(own, data=0.0, memory=1.0, step=1.0):
    return {"step_seconds": step, "own_seconds": own, "data_seconds": data, "memory_gb": memory}


def test_negatives_are_those_of_all_processes_or_of_the_contrastive_batch():
    assert count_negatives(config_of(), 1) == {"itc": 7, "mvsc": 7, "mlsc": 7}
    assert count_negatives(config_of("glscl"), 3) == {"itc": 23, "mvsc": 23, "mlsc": 23}
    assert count_negatives(config_of(contrastive_batch=64), 2) == {"itc": 63, "mvsc": 63, "mlsc": 63}
    published = config_of()
    published = replace(published, objectives=ObjectiveConfig(negatives="published"))
    assert count_negatives(published, 3) == {"itc": 23, "mvsc": 23, "mlsc": 7}
    assert count_negatives(config_of(["itm", "mlm"]), 2) == {}


def test_learning_rates_are_those_of_the_groups():
    model = SCLModel(SCLConfig.preset("tiny"))
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-4, fusion_factor=5, head_factor=3))
    rates = learning_rates(optimizer)
    expected = {"learning_rate": 1e-4, "learning_rate_fusion": 5e-4, "learning_rate_heads": 3e-4}
    assert rates == pytest.approx(expected)


def test_the_slowest_process_is_named_by_its_own_time():
    processes = Processes(CPU, 2)
    # All steps take as long, because all wait for rank 1.
    ranks = [described(0.6), described(1.0, memory=3.0), described(0.5), described(0.6)]
    found = processes.compare(ranks)
    assert found["slowest_rank"] == 1 and found["slowest_lag"] == pytest.approx(1 / 0.6 - 1)
    assert found["memory_gb"] == 3.0
    assert processes.compare([described(1.0)]) == {"memory_gb": 1.0}
    lines = [processes.warnings(ranks, 10) for _ in range(5)]
    assert [len(line) for line in lines] == [0, 0, 1, 0, 0]
    assert lines[2][0].startswith("rank 1 is the slowest: its steps take 67% longer than the median")
    # Not one that is slow now and then.
    others = Processes(CPU, 2)
    for number in range(6):
        slow = [described(1.0 if rank == number % 2 else 0.5) for rank in range(3)]
        assert others.warnings(slow, 10) == []


def test_waiting_for_data_is_said_once_with_the_remedy():
    processes = Processes(CPU, 3)
    waits = [described(1.0, data=0.05), described(1.0, data=0.2)]
    assert processes.warnings(waits, 10) == []
    (line,) = processes.warnings(waits, 10)
    assert line.startswith("a step waits for data 20% of its time (mean of 20 steps): raise data.num_workers (now 3;")
    assert processes.warnings(waits, 50) == []
    few = Processes(CPU, 3)
    assert not any(few.warnings([described(1.0, data=0.09)], 10) for _ in range(5))


def test_own_time_is_without_the_waits_for_others():
    own = Processes(CPU, 0).own(2.0, 0.5, 0.75)
    assert own["own_seconds"] == 1.25 and own["data_seconds"] == 0.5 and own["memory_gb"] > 0.01


def test_exchanges_are_timed_while_there_are_other_processes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with Meetings(CPU, alone=False) as meetings, collective("all-gather"):
        now[0] += 3.0
    with collective("all-gather"):
        now[0] += 5.0
    assert meetings.seconds() == 3.0 and meetings.seconds() == 0.0
    with Meetings(CPU, alone=True) as alone, collective("all-gather"):
        now[0] += 3.0
    assert alone.seconds() == 0.0


def test_what_follows_the_last_gradient_of_a_backward_is_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    weight = torch.ones(3, requires_grad=True)
    hidden = weight * 2

    def own_work(grad):
        now[0] += 1.0
        # What DDP does with its first bucket: its own wait runs when all gradients are there.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: now.__setitem__(0, now[0] + 4.0))

    hidden.register_hook(own_work)
    loss = hidden.sum()
    meetings = Meetings(CPU, alone=False)
    with meetings.backward(loss):
        loss.backward()
    assert meetings.seconds() == 4.0
