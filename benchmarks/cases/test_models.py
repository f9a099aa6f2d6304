"""Models of transformers, with random weights: a training step as they are, and after ``sclkern.fuse``.

A model is timed only after outputs and gradients of both, without dropout, agreed in float32 in the same process. On a
GPU the whole base models, on a CPU two layers of them at full width.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import sclkern

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROWS, TOKENS = (32, 16) if GPU else (2, 16)
# Allowed error of an output or gradient, in units of its largest value.
TOLERANCE = 1e-3


def _vilt(layers: dict) -> nn.Module:
    return transformers.ViltModel(transformers.ViltConfig(**layers))


def _blip(layers: dict) -> nn.Module:
    return transformers.BlipForImageTextRetrieval(transformers.BlipConfig(text_config=layers, vision_config=layers))


def _bridgetower(layers: dict) -> nn.Module:
    # Each encoder has one layer more than the fusion.
    more = {name: number + 1 for name, number in layers.items()}
    size = {"image_size": 288}
    config = transformers.BridgeTowerConfig(text_config=more, vision_config=more | size, **layers)
    return transformers.BridgeTowerModel(config)


MODELS: dict[str, tuple[Callable[[dict], nn.Module], int]] = {
    "vilt": (_vilt, 384),
    "blip": (_blip, 384),
    "bridgetower": (_bridgetower, 288),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and a batch in which half of the tokens of one row are padding."""
    torch.manual_seed(0)
    make, side = MODELS[name]
    model = make({} if GPU else {"num_hidden_layers": 2}).to(DEVICE)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long, device=DEVICE)
    mask[0, TOKENS // 2 :] = 0
    inputs = {"input_ids": torch.randint(5, 1000, (ROWS, TOKENS), device=DEVICE), "attention_mask": mask}
    return model, inputs | {"pixel_values": torch.randn(ROWS, 3, side, side, device=DEVICE)}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run forward and backward; returns the outputs."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU and model.training):
        outputs = {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}
    sum(value.float().square().mean() for value in outputs.values()).backward()
    return outputs


@functools.cache
def checked(name: str) -> float:
    """The largest error of fused against unfused, without dropout.

    Raises:
        AssertionError: above ``TOLERANCE``, or nothing was replaced.
    """
    model, inputs = build(name)
    # Zeros, as biases and mask tokens begin, would leave errors unseen.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()

    def values() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        # ViLT draws a random order of its patches.
        torch.manual_seed(1)
        outputs = {key: value.detach() for key, value in step(model, inputs).items()}
        return outputs | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected = values()
    with sclkern.fuse(model) as report:
        assert not report.left, report
        fused = values()
    assert fused.keys() == expected.keys()
    # A gradient that is rounding only, such as a key bias's, is measured against the largest value of all.
    smallest = 1e-3 * max(value.abs().max().item() for value in expected.values())
    scale = {key: max(value.abs().max().item(), smallest) for key, value in expected.items()}
    worst = max((fused[key] - value).abs().max().item() / scale[key] for key, value in expected.items())
    assert worst < TOLERANCE, (name, worst)
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark, record, name):
    error = checked(name)
    (unfused, inputs), (fused, _) = build(name), build(name)
    sclkern.fuse(fused)

    def run(model: nn.Module) -> None:
        step(model, inputs)
        model.zero_grad(set_to_none=True)
        if GPU:
            torch.cuda.synchronize()

    times: list[float] = []

    def before() -> None:
        """A step of the unfused model before every fused one: other load on the machine falls on both."""
        begin = time.perf_counter()
        run(unfused)
        times.append(time.perf_counter() - begin)

    for model in (unfused, fused):
        model.train()
        run(model)
        run(model)
    benchmark.pedantic(run, args=(fused,), setup=before, rounds=15 if GPU else 7)
    for variant, seconds in (("unfused", times), ("fused", benchmark.stats.stats.data)):
        record(
            f"model/{name}/{variant}",
            model=name,
            way=variant,
            rows=ROWS,
            dtype="bfloat16" if GPU else "float32",
            transformers=transformers.__version__,
            layers="all" if GPU else "two",
            median_seconds=statistics.median(seconds),
            seconds=sorted(seconds),
            error=error,
        )
