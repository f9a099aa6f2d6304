"""The arithmetic a run logs beside its speed."""

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig
from sclkern.step import StepConfig
from sclkern.step.flops import describe_plan
from sclkern.training.config import load_config
from sclkern.training.throughput import first_pass_flops, flops_a_pair, peak_flops, precision_remark


def test_flops_are_those_of_the_plan():
    config, objectives = SCLConfig.preset("tiny"), ObjectiveConfig()
    for step in (StepConfig(absorb="never"), StepConfig.published()):
        padded = 13 if step.pack else config.max_text_len
        described = describe_plan(config, objectives, step, caption_tokens=13)
        assert flops_a_pair(config, objectives, step, 13.2, padded) == described["flops"]


@pytest.fixture
def gpu(monkeypatch):
    """(name, capability) -> a device of that name."""

    def make(name, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda")

    return make


# Names as torch gives them, with dense TFLOP/s in bfloat16 and in float32.
NAMES = {
    "NVIDIA B200": (2250, 75),
    "NVIDIA H200": (989, 67),
    "NVIDIA H200 NVL": (835, 60),
    "NVIDIA H100 80GB HBM3": (989, 67),
    "NVIDIA H100 NVL": (835, 60),
    "NVIDIA H100 PCIe": (756, 51),
    "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 19.5),
    "NVIDIA L40S": (362, 91.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 3090": (71, 35.6),
}


def test_a_peak_is_that_of_the_data_sheet(gpu):
    assert peak_flops(torch.device("cpu"), "float32") is None
    for name, peaks in NAMES.items():
        device = gpu(name)
        assert tuple(peak_flops(device, kind) / 1e12 for kind in ("bfloat16", "float32")) == peaks, name


@pytest.mark.parametrize(
    "name",
    ["Some other GPU", "NVIDIA GB200", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_the_peak_of_a_relative_is_not_guessed(gpu, name):
    assert peak_flops(gpu(name), "bfloat16") is None


def test_float32_on_a_gpu_is_remarked_upon_with_the_remedy(gpu, monkeypatch):
    said = precision_remark(gpu("NVIDIA H200"), "float32")
    assert "at most 67 of 989 TFLOP/s" in said and "run.precision=bfloat16" in said
    assert "TFLOP" not in precision_remark(gpu("Some other GPU"), "float32")
    assert precision_remark(gpu("NVIDIA H200"), "bfloat16") is None
    assert precision_remark(gpu("Tesla V100-SXM2-32GB", (7, 0)), "float32") is None
    assert precision_remark(torch.device("cpu"), "float32") is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision_remark(gpu("NVIDIA H200"), "float32") is None
    finally:
        torch.set_float32_matmul_precision(before)


def first_pass(recipe, accumulation, contrastive, **options):
    overrides = {"batch_size": 8, "accumulation": accumulation, "contrastive_batch": contrastive}
    config = load_config(
        None, ["model.preset=tiny", f"objectives.recipe={recipe}", *(f"run.{k}={v}" for k, v in overrides.items())]
    )
    return first_pass_flops(config, 13, 13, device="cpu", **options)


def test_the_first_pass_of_a_contrastive_batch_is_what_its_features_need():
    assert first_pass("scl", 2, "null") == first_pass("scl", 1, 8) == first_pass("[itm, mlm]", 2, 16) == 0
    itc, scl = first_pass("[itc]", 2, 16), first_pass("scl", 2, 16)
    config, objectives = SCLConfig.preset("tiny"), ObjectiveConfig(recipe=("itc",))
    # Of ITC alone the whole forward, a third of the step, except that pixels need no gradient.
    assert itc == pytest.approx(flops_a_pair(config, objectives, StepConfig(), 13, 13) / 3, rel=0.05)
    assert itc < scl < flops_a_pair(config, ObjectiveConfig(), StepConfig(), 13, 13) / 3
