"""SCLModel: losses, the temperature of the contrast, the state."""

from __future__ import annotations

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig, SCLModel

FRAMES = [pytest.param(None, id="images"), pytest.param(3, id="clips")]


def build(make_model, make_batch, frames=None, **options):
    return make_model(max_frames=frames or 0, **options), make_batch(frames=frames)


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_backends_have_equal_losses(make_model, make_batch, recipe, frames):
    model, batch = build(make_model, make_batch, frames, objectives=ObjectiveConfig(recipe=recipe))
    eager = model.set_backend("eager")(batch, seed=3).named()
    for backend in ("auto", "sdpa"):
        for name, loss in model.set_backend(backend)(batch, seed=3).named().items():
            torch.testing.assert_close(eager[name], loss, rtol=1e-9, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("value, expected", [(0.001, 0.01), (-1.0, 0.01), (0.07, 0.07), (3.0, 0.5)])
def test_the_temperature_is_clamped_but_its_gradient_is_not(make_model, value, expected):
    model = make_model()
    with torch.no_grad():
        model.temperature.fill_(value)
    temperature = model.contrast_temperature()
    torch.testing.assert_close(temperature.item(), expected)
    (gradient,) = torch.autograd.grad(3 * temperature, model.temperature)
    assert gradient == 3


def test_a_temperature_outside_the_range_can_come_back(make_model, make_batch):
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        model.temperature.fill_(0.9)
    model(batch, seed=0).itc.backward()
    assert model.temperature.grad.abs() > 0


def test_the_published_temperature_is_free(make_model):
    model = make_model(ObjectiveConfig(itc_temperature="published"))
    with torch.no_grad():
        model.temperature.fill_(3.0)
    assert model.contrast_temperature() is model.temperature


@pytest.mark.parametrize("frames", FRAMES)
def test_a_state_dict_carries_the_whole_model(make_model, make_batch, frames):
    model, batch = build(make_model, make_batch, frames, seed=1)
    other = make_model(max_frames=frames or 0, seed=2)
    before = model(batch, seed=4).named()
    assert not torch.equal(other(batch, seed=4).total, before["total"])
    other.load_state_dict(model.state_dict())
    for name, loss in other(batch, seed=4).named().items():
        assert torch.equal(loss, before[name]), name


def test_padding_embeddings_start_at_zero_and_stay_there(make_batch):
    model = SCLModel(SCLConfig.preset("tiny"))
    model(make_batch(dtype=torch.float32), seed=0).total.backward()
    for embedding in (model.text.word, model.text.position):
        assert (embedding.weight[1] == 0).all()
        assert (embedding.weight.grad[1] == 0).all()
