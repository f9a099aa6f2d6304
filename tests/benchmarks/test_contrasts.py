"""Contrasts of other libraries: the same gradients as float64, and memory that is computed as it would be measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.harness import contrasts
from benchmarks.harness.contrasts import CONTRASTS, Contrast
from benchmarks.harness.implementations import UnsupportedError
from benchmarks.harness.live_bytes import computed_peak, counted, measured_peak
from benchmarks.harness.verification import GPU, WrongResultError

ROWS = 48
ALL = [pytest.param(kind, contrast, id=f"{kind}-{contrast.name}") for kind in CONTRASTS for contrast in CONTRASTS[kind]]


def named(kind: str, name: str) -> Contrast:
    return next(contrast for contrast in CONTRASTS[kind] if contrast.name == name)


def error_of(kind: str, contrast: Contrast) -> float:
    features, scale = contrasts.make_features(kind, ROWS), contrasts.make_scale(kind)
    exact = contrasts.exact_gradients(kind, features, scale)
    return contrasts.check(kind, contrast, contrasts.gradients(contrast, features, scale), exact)


@pytest.mark.parametrize(("kind", "contrast"), ALL)
def test_every_implementation_has_the_gradients_of_float64(kind, contrast):
    # The compiler changes nothing of what is to be shown, and takes a minute.
    contrast = dataclasses.replace(contrast, compiled=False)
    try:
        assert error_of(kind, contrasts.prepared(contrast)) < 2e-5
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_the_formula_is_that_of_autograd():
    features = [column.double().requires_grad_() for column in contrasts.make_features("clip", ROWS)]
    scale = contrasts.make_scale("clip").double().requires_grad_()
    expected = torch.autograd.grad(contrasts.plain_clip_loss(features, scale), [*features, scale])
    # In several blocks.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrasts, "BLOCK", 7 * ROWS)
        found = contrasts.exact_gradients("clip", features, scale.detach())
    torch.testing.assert_close(found, list(expected), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", CONTRASTS)
def test_a_wrong_gradient_is_not_timed(kind):
    right = named(kind, "sclkern")

    def of_other_features(features, scale):
        return right.loss([features[0], features[1].roll(1, 0), *features[2:]], scale)

    with pytest.raises(WrongResultError, match=f"{kind} by sclkern: a gradient is off by .* not timed"):
        error_of(kind, dataclasses.replace(right, loss=of_other_features))


def test_a_gradient_that_is_missing_is_not_timed():
    right = named("clip", "sclkern")
    constant = dataclasses.replace(right, loss=lambda features, scale: right.loss(features, scale.detach()))
    with pytest.raises(WrongResultError, match="2 gradients, expected 3"):
        error_of("clip", constant)


@pytest.mark.skipif(GPU, reason="what needs a GPU has one")
def test_what_needs_a_gpu_says_so():
    with pytest.raises(UnsupportedError, match="inf-cl: needs a GPU"):
        contrasts.prepared(named("clip", "inf-cl"))


@pytest.mark.skipif(GPU, reason="a CPU's allocator is traced")
@pytest.mark.parametrize(
    ("kind", "contrast"),
    [case for case in ALL if contrasts.countable(case.values[1]) and case.values[0] != "ranking-hard"],
)
def test_computed_memory_is_what_is_measured(kind, contrast):
    rows, scale = 256, contrasts.make_scale(kind)
    features = contrasts.make_features(kind, rows)
    measured = measured_peak(lambda: contrasts.gradients(contrast, features, scale))
    computed = computed_peak(
        lambda: (contrasts.empty_features(kind, rows), contrasts.make_scale(kind)),
        lambda inputs: contrasts.gradients(contrast, *inputs),
        contrast.repeating,
    )
    assert computed == pytest.approx(measured, rel=1e-3)
    assert measured > contrast.quadratic * rows * rows * 4


def test_live_bytes_follow_what_is_held():
    with counted() as counter:
        first = torch.ones(1000)
        second = first[:10].reshape(2, 5)
        assert counter.live == 4000
        third = first + 1
        del first
        # The view holds the storage.
        assert counter.live == 8000
        del second, third
        torch.ones(10).add_(1)
    assert (counter.live, counter.peak) == (0, 8000)


def test_inputs_are_not_counted_and_a_loop_can_be_cut_short():
    given = torch.ones(1000)
    with counted(most_operators=5) as counter:
        while True:
            given.view(10, 100).mul_(1.0)
    assert (counter.peak, counter.operators) == (0, 5)


def test_only_what_fits_is_measured(monkeypatch):
    monkeypatch.setattr(contrasts, "MOST_BYTES", 5 * 2**30)
    sizes = (1024, 4096, 16384, 65536)
    assert all(contrasts.fits(named("clip", "sclkern"), "clip", rows) for rows in sizes)
    fits = [contrasts.fits(named("clip", "open_clip"), "clip", rows) for rows in sizes]
    assert fits == [True, True, True, False]
    assert not contrasts.fits(named("ranking-hard", "sentence-transformers"), "ranking-hard", 16384)
