"""The model and its step on a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from gpu_model import make
from sclkern.step import StepConfig, match_labels
from sclkern.tools.parity import run_parity
from step_testing import losses_of, masks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ["image", "video"]


@pytest.mark.parametrize("case", CASES)
def test_recorded_numbers_hold_on_the_gpu(case):
    failed = [row for row in run_parity(GOLDEN / f"{case}.safetensors", "cuda").comparisons if not row.ok]
    assert not failed, failed


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_drifts_little_from_the_recorded_numbers(case, record_property):
    with torch.autocast("cuda", torch.bfloat16):
        rows = run_parity(GOLDEN / f"{case}.safetensors", "cuda").comparisons
    drift = {"out": 0.0, "loss": 0.0, "grad": 0.0, "norm": 0.0}
    for row in rows:
        kind = row.name.partition(".")[0]
        # Times the tolerance of float32, which is 1e-4 of the largest value (a thousandth of a gradient's norm).
        drift[kind] = max(drift[kind], row.error / row.tolerance)
    record_property("drift", json.dumps(drift))
    assert drift["out"] <= 2000 and drift["loss"] <= 2000, drift
    assert all(torch.isfinite(torch.tensor(list(drift.values())))), drift


def test_masks_are_those_of_the_cpu():
    model, batch = make()
    on_gpu = masks_of(model, batch, seed=3)
    on_cpu = masks_of(model.cpu(), {k: v.cpu() for k, v in batch.items()}, seed=3)
    for name in ("keep", "replace", "itm_labels", "itm_keys"):
        assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name)), name
    for name in ("mlm", "completion"):
        for ours, theirs in zip(getattr(on_gpu, name), getattr(on_cpu, name), strict=True):
            assert torch.equal(ours.cpu(), theirs), name


def losses_and_gradients(model, batch, step, backend):
    model.step = step
    model.set_backend(backend)
    model.zero_grad(set_to_none=True)
    losses = losses_of(model, batch, masks_of(model, batch, 5))
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.named().items()}, gradients


# A stub, whose GPU is the CPU, cannot tell the two apart.
@pytest.mark.skipif("stub_gpu" in sys.modules, reason="a stub of a GPU")
@pytest.mark.parametrize("step", [StepConfig(), StepConfig(pack=False)], ids=["packed", "padded"])
def test_a_part_of_a_global_batch_drops_what_a_cpu_drops(step):
    model, batch = make(dropout=0.1)
    model.step = step
    place = torch.arange(40, 48)
    labels = match_labels(5, place)
    batch |= {"place": place, "match_labels": labels, "false_place": place.flip(0)[labels == 0]}
    on_cpu = {name: value.cpu() for name, value in batch.items()}
    found = model.train()({name: value.cuda() for name, value in batch.items()}, seed=5)
    expected = model.cpu().set_backend("eager")(on_cpu, seed=5)
    for name, loss in expected.named().items():
        torch.testing.assert_close(
            found.named()[name].cpu(), loss, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("frames", [None, 3], ids=["images", "clips"])
@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_the_planned_step_equals_separate_passes(recipe, frames):
    """Without dropout, kernels against eager ops, in float32."""
    model, batch = make(recipe, frames=frames, max_frames=frames or 0)
    model.eval()
    truth, true_gradients = losses_and_gradients(model, batch, StepConfig.published(), "eager")
    for step in (StepConfig(), StepConfig(absorb="never"), StepConfig(pack=False), StepConfig(checkpoint_blocks=True)):
        losses, gradients = losses_and_gradients(model, batch, step, "auto")
        for name, loss in truth.items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert gradients.keys() == true_gradients.keys()
        scale = max(g.abs().max().item() for g in true_gradients.values())
        for name, gradient in true_gradients.items():
            error = (gradients[name] - gradient).abs().max().item()
            assert error <= 1e-3 * gradient.abs().max().item() + 1e-5 * scale, (step, name, error)


def test_the_step_of_the_base_model_equals_separate_passes():
    model, batch = make("glscl", "base", rows=4, length=13)
    model.eval()
    truth, true_gradients = losses_and_gradients(model, batch, StepConfig.published(), "eager")
    losses, gradients = losses_and_gradients(model, batch, StepConfig(), "auto")
    for name, loss in truth.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    whole = sum(g.double().square().sum() for g in true_gradients.values()).sqrt()
    error = sum((gradients[n] - g).double().square().sum() for n, g in true_gradients.items()).sqrt()
    assert error <= 1e-3 * whole, (error, whole)


@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_the_step_is_the_same_to_the_bit(recipe, poisoned_memory):
    model, batch = make(recipe)
    model.eval()
    first, gradients = losses_and_gradients(model, batch, StepConfig(), "auto")
    for _ in range(5):
        torch.cuda.empty_cache()
        again, other = losses_and_gradients(model, batch, StepConfig(), "auto")
        assert all(torch.equal(again[name], loss) and loss.isfinite() for name, loss in first.items())
        differing = [name for name, gradient in gradients.items() if not torch.equal(gradient, other[name])]
        assert differing == []


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_the_step_does_not_synchronise(recipe, autocast):
    model, batch = make(recipe)
    seed = torch.tensor(5, device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            losses = losses_of(model, batch, masks_of(model, batch, seed))
        losses.total.backward()

    step()  # libraries start up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(dtype):
    model, batch = make()
    model.eval()
    truth = model(batch, seed=1).named()
    with torch.autocast("cuda", dtype):
        losses = model(batch, seed=1)
    losses.total.backward()
    for name, value in losses.named().items():
        torch.testing.assert_close(value.float(), truth[name], rtol=0.05, atol=0.05, msg=lambda m, n=name: f"{n}: {m}")
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_the_base_model_takes_a_step(backend):
    model, batch = make("glscl", "base", rows=16, length=13)
    model.set_backend(backend)
    if backend == "sdpa":
        model.step = StepConfig.published()
    with torch.autocast("cuda", torch.bfloat16):
        losses = model(batch, seed=1)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    unused = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert unused == []


def test_the_base_model_learns():
    """Twenty steps of a fused optimiser in bfloat16 on one batch lower its loss."""
    model, batch = make("scl", "base", rows=16, length=13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    totals = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            losses = model(batch, seed=1)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.detach())
    totals = torch.stack(totals).tolist()
    assert totals[-1] < totals[0], totals
