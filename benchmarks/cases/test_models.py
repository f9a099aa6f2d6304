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
ROWS, WORDS = (32, 16) if GPU else (2, 16)
# Largest error of an output or gradient, in units of its largest value.
TOLERANCE = 1e-3


def _vilt(layers: dict) -> nn.Module:
    return transformers.ViltModel(transformers.ViltConfig(**layers))


def _blip(layers: dict) -> nn.Module:
    return transformers.BlipForImageTextRetrieval(transformers.BlipConfig(text_config=layers, vision_config=layers))


def _bridgetower(layers: dict) -> nn.Module:
    # One more layer in each encoder than in between them.
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
    """Model and a batch in which half of the words of one row are padding."""
    torch.manual_seed(0)
    make, side = MODELS[name]
    model = make({} if GPU else {"num_hidden_layers": 2}).to(DEVICE)
    mask = torch.ones(ROWS, WORDS, dtype=torch.long, device=DEVICE)
    mask[0, WORDS // 2 :] = 0
    inputs = {"input_ids": torch.randint(5, 1000, (ROWS, WORDS), device=DEVICE), "attention_mask": mask}
    return model, inputs | {"pixel_values": torch.randn(ROWS, 3, side, side, device=DEVICE)}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward; the outputs."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU and model.training):
        found = {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}
    sum(value.float().square().mean() for value in found.values()).backward()
    return found


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
        # ViLT draws the order of its patches.
        torch.manual_seed(1)
        found = {key: value.detach() for key, value in step(model, inputs).items()}
        return found | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected = values()
    with sclkern.fuse(model) as report:
        assert not report.left, report
        found = values()
    assert found.keys() == expected.keys()
    # A gradient that is rounding alone, as that of a bias of keys, is measured by the largest of all.
    floor = 1e-3 * max(value.abs().max().item() for value in expected.values())
    scale = {key: max(value.abs().max().item(), floor) for key, value in expected.items()}
    worst = max((found[key] - value).abs().max().item() / scale[key] for key, value in expected.items())
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
        """A step of the other, before each of the fused model: what else the machine does falls on both."""
        begin = time.perf_counter()
        run(unfused)
        times.append(time.perf_counter() - begin)

    for model in (unfused, fused):
        model.train()
        run(model)
        run(model)
    benchmark.pedantic(run, args=(fused,), setup=before, rounds=15 if GPU else 7)
    for way, seconds in (("unfused", times), ("fused", benchmark.stats.stats.data)):
        record(
            f"model/{name}/{way}",
            model=name,
            way=way,
            rows=ROWS,
            dtype="bfloat16" if GPU else "float32",
            transformers=transformers.__version__,
            layers="all" if GPU else "two",
            median_seconds=statistics.median(seconds),
            seconds=sorted(seconds),
            error=error,
        )
