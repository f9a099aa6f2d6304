"""Seeds of dropout: one draw a step, which a recomputation sees again."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cpu_kernels
from sclkern import ObjectiveConfig, nn, random
from sclkern.ops import dispatch
from sclkern.random import one_seed_draw, seed_tensor, seeds_again
from sclkern.step import StepConfig


class Draws(TorchDispatchMode):
    """Counts what is drawn from torch's generator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "randint" in function._opname or "bernoulli" in function._opname or "rand_like" in function._opname:
            self.found.append(function._opname)
        return function(*args, **(kwargs or {}))


def seeds(count):
    return [seed_tensor(None, "cpu") for _ in range(count)]


def values(tensors):
    return [tensor.item() for tensor in tensors]


def test_seeds_of_a_context_are_views_of_one_tensor():
    torch.manual_seed(1)
    with Draws() as draws, one_seed_draw():
        taken = seeds(random.DRAWN_SEEDS)
    assert draws.found == ["randint"]
    assert len(set(values(taken))) == random.DRAWN_SEEDS
    # What a kernel is launched on directly.
    assert all(seed.shape == (1,) and seed.data_ptr() % 16 == 0 for seed in taken)
    torch.manual_seed(1)
    with one_seed_draw():
        assert values(seeds(random.DRAWN_SEEDS)) == values(taken)
        assert len({*values(taken), *values(seeds(1))}) == random.DRAWN_SEEDS + 1


def test_a_context_in_another_goes_on_with_it():
    with Draws() as draws, one_seed_draw():
        first = seeds(2)
        with one_seed_draw():
            second = seeds(2)
        third = seeds(2)
    assert draws.found == ["randint"] and len({*values(first), *values(second), *values(third)}) == 6


def test_outside_and_for_a_given_seed_nothing_changes():
    with Draws() as draws:
        seeds(2)
        with one_seed_draw():
            assert seed_tensor(7, "cpu").item() == 7
    assert draws.found == ["randint"] * 2


@pytest.mark.parametrize("drawn", [2, 256])
@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": seeds_again}],
    ids=["reentrant", "not reentrant", "with the seeds"],
)
def test_a_recomputation_takes_the_same(monkeypatch, options, drawn):
    """In a context or not, before the draw and after it, and when the draw ends on the way."""
    monkeypatch.setattr(random, "DRAWN_SEEDS", drawn)
    x = torch.ones(3, requires_grad=True)
    for before, around in ((0, True), (1, True), (0, False)):
        calls = []

        def function(x, calls=calls):
            calls.append([*values(seeds(3)), torch.rand(()).item()])
            return (x * 2).exp()

        with one_seed_draw() if around else torch.enable_grad():
            outside = values(seeds(before))
            out = checkpoint(function, x, **options)
            outside += values(seeds(2))
        torch.rand(5)
        torch.autograd.grad(out.sum().square(), x, retain_graph=True) if "context_fn" in options else None
        out.sum().backward()
        assert len(calls) >= 2 and all(call == calls[0] for call in calls)
        assert len({*outside, *calls[0][:3]}) == before + 5


def test_checkpoints_of_a_context_draw_once():
    x = torch.ones(3, requires_grad=True)

    def inner(x):
        seeds(2)
        return (x * 2).sin()

    def function(x):
        seeds(1)
        return checkpoint(inner, x, use_reentrant=False, context_fn=seeds_again)

    with Draws() as draws, one_seed_draw():
        seeds(1)
        for _ in range(3):
            x = checkpoint(function, x, use_reentrant=False, context_fn=seeds_again)
        x.sum().backward()
    assert draws.found == ["randint"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_switched_off_seeds_are_drawn_apart(mode):
    """A tensor of inference mode could not be saved for a backward."""
    with one_seed_draw():
        with mode():
            apart = seeds(1)
        x = torch.ones(2, requires_grad=True)
        (x * seeds(1)[0]).sum().backward()
    assert values(apart) and x.grad is not None


def test_compiled_code_draws_its_own():
    def function(x):
        return x + seed_tensor(None, "cpu") % 7

    with one_seed_draw():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert compiled(torch.zeros(1)).shape == (1,)


@pytest.fixture
def kernels_run(monkeypatch):
    cpu_kernels.install()
    monkeypatch.setattr(dispatch, "_problems", lambda devices, dtypes: ())


@pytest.mark.parametrize("options", [{}, {"absorb": "never"}, {"pack": False}, {"checkpoint_blocks": True}], ids=str)
@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_a_step_draws_once(kernels_run, make_model, make_batch, recipe, options):
    objectives = ObjectiveConfig(recipe=recipe)
    model = make_model(objectives, dtype=torch.float32, dropout=0.1, text_layers=2).train()
    model.step = StepConfig(**options)
    batch = make_batch(dtype=torch.float32, false_image=objectives.dataset_negatives)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        with Draws() as draws:
            losses = model(batch, seed=1)
        # The embedding's dropout is torch's own.
        assert draws.found.count("randint") == 1
        losses.total.backward()
        found.append([losses.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(model(batch, seed=1).total, found[0][0])


def test_recomputed_blocks_have_the_gradients_of_kept_ones(kernels_run, make_model, make_batch):
    batch = make_batch(dtype=torch.float32)
    found = []
    for recomputed in (False, True):
        model = make_model(dtype=torch.float32, dropout=0.1).train()
        model.step = StepConfig(checkpoint_blocks=recomputed)
        torch.manual_seed(3)
        model(batch, seed=1).total.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def test_a_transformer_encoder_draws_once(kernels_run):
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    layer.dropout1.p = layer.dropout2.p = layer.self_attn.dropout = 0.1
    encoder = nn.TransformerEncoder(layer, 3)
    with Draws() as draws:
        encoder(torch.randn(2, 5, 64, requires_grad=True))
    assert draws.found == ["randint"]
