"""Models of transformers and timm, with random weights: a training step as they are, and after ``sclkern.fuse``.

The peak of memory of each is recorded beside the time. A model is timed only after outputs and gradients of both,
without dropout, agreed in float32 in the same process. On a GPU the whole base models, on a CPU two layers of them at
full width.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import sclkern
from benchmarks.harness.live_bytes import measured_peak
from sclkern.errors import UserError

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


def _clip(layers: dict) -> nn.Module:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=layers, vision_config=layers))


def _siglip(layers: dict) -> nn.Module:
    # Ids of the first and last token, which its default vocabulary lacks.
    text = {**layers, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=layers))


class _Pictures(nn.Module):
    """A model of pictures alone, called as the others are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, **text: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(pixel_values)}


def _vit(layers: dict) -> nn.Module:
    depth = {"depth": layers["num_hidden_layers"]} if layers else {}
    return _Pictures(timm.create_model("vit_base_patch16_224", **depth))


def _bert_mlm(layers: dict) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**layers))


# Models that have a contrastive loss compute it.
LOSSES = {"clip": {"return_loss": True}, "siglip": {"return_loss": True}}
MODELS: dict[str, tuple[Callable[[dict], nn.Module], int]] = {
    "vilt": (_vilt, 384),
    "blip": (_blip, 384),
    "bridgetower": (_bridgetower, 288),
    "clip": (_clip, 224),
    "siglip": (_siglip, 224),
    "timm-vit": (_vit, 224),
    "bert-mlm": (_bert_mlm, 0),
}
# Tokens of a row, where it is longer than a caption; 15 % of them have a label, and training returns the loss alone.
LONG = {"bert-mlm": 512 if GPU else 128}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and a batch in which half of the tokens of one row are padding."""
    torch.manual_seed(0)
    (make, side), tokens = MODELS[name], LONG.get(name, TOKENS)
    model = make({} if GPU else {"num_hidden_layers": 2}).to(DEVICE)
    mask = torch.ones(ROWS, tokens, dtype=torch.long, device=DEVICE)
    mask[0, tokens // 2 :] = 0
    ids = torch.randint(5, 1000, (ROWS, tokens), device=DEVICE)
    inputs = {"input_ids": ids, "attention_mask": mask, **LOSSES.get(name, {})}
    if side:
        inputs["pixel_values"] = torch.randn(ROWS, 3, side, side, device=DEVICE)
    if name in LONG:
        unlabelled = (torch.rand(ids.shape, device=DEVICE) > 0.15) | (mask == 0)
        inputs["labels"] = ids.masked_fill(unlabelled, -100)
    return model, inputs


def fuse(name: str, model: nn.Module) -> sclkern.FuseReport:
    """``sclkern.fuse``, without the logits of a model for masked language modelling."""
    return sclkern.fuse(model, skip_logits=name in LONG)


def step(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run forward and backward; returns the outputs."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU and model.training):
        out = model(**inputs)
    if "labels" in inputs:
        out = {"loss": out["loss"]}
    outputs = {name: value for name, value in out.items() if isinstance(value, Tensor)}
    sum(value.float().square().mean() for value in outputs.values()).backward()
    return outputs


@functools.cache
def checked(name: str) -> tuple[float, int, int]:
    """The largest error of fused against unfused, without dropout; how many modules were replaced, and how many left.

    Raises:
        AssertionError: above ``TOLERANCE``, or nothing was replaced.
    """
    model, inputs = build(name)
    # Zeros, as biases and mask tokens begin, would leave errors unseen.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # A loss of labels leaves its logits out in training alone.
    model.train(name in LONG)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def values() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        # ViLT draws a random order of its patches.
        torch.manual_seed(1)
        outputs = {key: value.detach() for key, value in step(model, inputs).items()}
        return outputs | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected = values()
    with fuse(name, model) as report:
        replaced, left = len(report.active), len(report.left)
        fused = values()
    assert fused.keys() == expected.keys()
    # A gradient that is rounding only, such as a key bias's, is measured against the largest value of all.
    smallest = 1e-3 * max(value.abs().max().item() for value in expected.values())
    scale = {key: max(value.abs().max().item(), smallest) for key, value in expected.items()}
    worst = max((fused[key] - value).abs().max().item() / scale[key] for key, value in expected.items())
    assert worst < TOLERANCE, (name, worst)
    return worst, replaced, left


@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark, record, name):
    try:
        error, replaced, left = checked(name)
    except UserError as problem:
        pytest.skip(str(problem))
    (unfused, inputs), (fused, _) = build(name), build(name)
    fuse(name, fused)

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

    peaks = {}
    for way, model in (("unfused", unfused), ("fused", fused)):
        model.train()
        run(model)
        peaks[way] = measured_peak(functools.partial(run, model))
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
            peak_bytes=peaks[variant],
            modules_replaced=replaced,
            modules_left=left,
        )
