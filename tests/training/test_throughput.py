"""The arithmetic a run logs beside its speed."""

import torch

from sclkern import ObjectiveConfig, SCLConfig
from sclkern.step import StepConfig
from sclkern.step.flops import describe_plan
from sclkern.training.throughput import flops_a_pair, peak_flops


def test_flops_are_those_of_the_plan():
    config, objectives = SCLConfig.preset("tiny"), ObjectiveConfig()
    for step in (StepConfig(absorb="never"), StepConfig.published()):
        padded = 13 if step.pack else config.max_text_len
        described = describe_plan(config, objectives, step, caption_tokens=13)
        assert flops_a_pair(config, objectives, step, 13.2, padded) == described["flops"]


def test_a_peak_is_known_of_few_devices(monkeypatch):
    assert peak_flops(torch.device("cpu"), "float32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda"), "bfloat16") == 989e12
    assert peak_flops(torch.device("cuda"), "float32") == 67e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some other GPU")
    assert peak_flops(torch.device("cuda"), "bfloat16") is None
