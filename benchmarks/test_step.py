"""The whole training step, forward and backward, each view in a pass of its own: attention backends side by side.

A case is timed only after its losses and gradients agreed with the eager backend's in float32 in the same process.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.step import draw_masks, run_step

GPU = torch.cuda.is_available()
# Captions of 13 tokens are the usual length of COCO's.
CASES = (
    [("base", rows, backend) for rows in (16, 64) for backend in ("eager", "sdpa")]
    if GPU
    else [("demo", 64, backend) for backend in ("eager", "sdpa")]
)


def build(preset: str, rows: int):
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"
    config = SCLConfig.preset(preset)
    model = SCLModel(config, ObjectiveConfig("scl")).to(device)
    ids = torch.randint(5, config.vocab_size - 1, (rows, 13), device=device)
    ids[:, 0], ids[:, -1] = config.bos_id, config.eos_id
    image = torch.randn(rows, 3, config.image_size, config.image_size, device=device)
    return model, {"image": image, "text_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool)}


def check(model: SCLModel, batch: dict, backend: str) -> None:
    """Losses and the gradient of every parameter against the eager backend, without dropout."""
    model.eval()
    small = {k: v[:4] for k, v in batch.items()}
    results = []
    for name in ("eager", backend):
        model.set_attention_backend(name).zero_grad()
        losses = run_step(model, small, draw_masks(model, small, 0))
        losses.total.backward()
        results.append(
            (losses.total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (loss, gradients), (other, others) = results
    torch.testing.assert_close(other, loss, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-2, atol=1e-4 * max(1.0, gradient.abs().max().item()))
    model.train().zero_grad()


@pytest.mark.parametrize(("preset", "rows", "backend"), CASES)
def test_step(benchmark, record, preset, rows, backend):
    model, batch = build(preset, rows)
    check(model, batch, backend)
    precision = torch.bfloat16 if GPU else torch.float32

    def step() -> None:
        with torch.autocast("cuda" if GPU else "cpu", precision, enabled=GPU):
            losses = run_step(model, batch, draw_masks(model, batch, 1))
        losses.total.backward()
        model.zero_grad(set_to_none=True)
        if GPU:
            torch.cuda.synchronize()

    if GPU:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
    times = benchmark.stats.stats.data
    record(
        f"step/{preset}/{backend}",
        rows=rows,
        dtype=str(precision).removeprefix("torch."),
        median_seconds=statistics.median(times),
        quartiles_seconds=statistics.quantiles(times, n=4),
        pairs_per_second=rows / statistics.median(times),
        peak_bytes=torch.cuda.max_memory_allocated() if GPU else None,
    )
