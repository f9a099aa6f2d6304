"""What only a GPU can show; `make gpu` runs these. They import the model alone, none of the data or training code."""

from pathlib import Path

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.parity import run_parity
from sclkern.step import draw_masks, run_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GOLDEN = Path(__file__).parent / "golden"


def make(recipe="glscl", preset="tiny", rows=8, length=12, **changes):
    torch.manual_seed(0)
    config = SCLConfig.preset(preset).replace(**changes)
    model = SCLModel(config, ObjectiveConfig(recipe=recipe)).cuda()
    ids = torch.randint(5, config.vocab_size - 1, (rows, length))
    lengths = torch.randint(3, length + 1, (rows,))
    column = torch.arange(length)
    ids[:, 0] = 0
    ids = torch.where(column == lengths[:, None] - 1, 2, torch.where(column >= lengths[:, None], 1, ids))
    image = torch.randn(rows, 3, config.image_size, config.image_size)
    return model, {"image": image.cuda(), "text_ids": ids.cuda(), "text_mask": (ids != 1).cuda()}


@pytest.mark.parametrize("case", ["image", "video"])
def test_recorded_numbers_hold_on_the_gpu(case):
    failed = [row for row in run_parity(GOLDEN / f"{case}.safetensors", "cuda") if not row.ok]
    assert not failed, failed


def test_masks_are_those_of_the_cpu():
    model, batch = make()
    on_gpu = draw_masks(model, batch, seed=3)
    on_cpu = draw_masks(model.cpu(), {k: v.cpu() for k, v in batch.items()}, seed=3)
    for name in ("keep", "replace", "itm_labels", "itm_keys"):
        assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name)), name
    for name in ("mlm", "completion"):
        for ours, theirs in zip(getattr(on_gpu, name), getattr(on_cpu, name), strict=True):
            assert torch.equal(ours.cpu(), theirs), name


@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_the_step_does_not_synchronise(recipe):
    model, batch = make(recipe)
    seed = torch.tensor(5, device="cuda")
    run_step(model, batch, draw_masks(model, batch, seed)).total.backward()  # libraries start up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(model, batch, draw_masks(model, batch, seed)).total.backward()
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


def test_the_base_model_takes_a_step():
    model, batch = make("glscl", "base", rows=16, length=13)
    with torch.autocast("cuda", torch.bfloat16):
        losses = model(batch, seed=1)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    unused = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert unused == []
