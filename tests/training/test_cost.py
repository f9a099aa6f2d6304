"""What a run says of its cost before it begins."""

from types import SimpleNamespace

import torch

from sclkern.training import memory
from sclkern.training.config import load_config
from sclkern.training.memory import describe_cost


def described(device, *overrides, first_pass=0.0):
    config = load_config(None, ["model.preset=tiny", "run.batch_size=8", "run.accumulation=2", *overrides])
    throughput = SimpleNamespace(flops=5e9, first_pass=first_pass, num_frames=1)
    return describe_cost(config, throughput, [8, 12], torch.device(device), 4)


def test_arithmetic_and_memory():
    plan = "planned: 5 GFLOP a pair, 0.32 TFLOP a step"
    assert described("cpu").startswith(f"{plan}; memory at the peak of a step, estimated: 0.0")
    both = f"{plan} and 0.064 in the first pass of its contrastive batch; memory"
    assert described("cpu", "run.contrastive_batch=64", first_pass=1e9).startswith(both)


def test_a_gpu_with_too_little_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24e9))
    assert described("cuda").count("of the 24 GB of a GPU") == 1 and "set a smaller" not in described("cuda")
    estimate = memory.MemoryEstimate(30e9, 0, 0, 0, 0, 0, 0)
    monkeypatch.setattr(memory, "memory_of_run", lambda *_, **options: estimate)
    remedy = "; set a smaller run.batch_size{}, and a larger run.accumulation for the same batch of a step"
    assert described("cuda").endswith(
        "30.00 GB of the 24 GB of a GPU (weights 30.00)" + remedy.format(" or step.checkpoint_blocks=true")
    )
    assert described("cuda", "step.checkpoint_blocks=true").endswith(remedy.format(""))
    monkeypatch.setattr(memory, "memory_of_run", lambda *_, **options: 1 / 0)
    assert described("cuda").endswith("; memory cannot be estimated (ZeroDivisionError: division by zero)")
