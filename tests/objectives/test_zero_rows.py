"""Losses of no rows are 0, and so are their gradients, which are there: every rank of DDP has to have them."""

from __future__ import annotations

import pytest
import torch

from sclkern import ObjectiveConfig, ops, reference
from sclkern import objectives as L
from sclkern.nn import CompletionLoss, LinearCrossEntropy

NONE = torch.zeros(0, dtype=torch.int64)
BACKENDS = ["auto", "eager"]


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def completion(function, **options):
    return lambda backend: lambda a, b, t: function(a, b, temperature=t.abs() + 0.1, backend=backend, **options)


def reference_completion(**options):
    return lambda backend: lambda a, b: reference.completion_loss(a, b, temperature=0.1, **options)


# By name: the loss for a backend, and the shapes of what has gradients.
LOSSES = {
    "completion_loss": (completion(ops.completion_loss), [(0, 8), (0, 8), ()]),
    "one direction": (completion(ops.completion_loss, directions="recovered_to_complete"), [(0, 8), (0, 8), ()]),
    "sum": (completion(ops.completion_loss, reduction="sum"), [(0, 8), (0, 8), ()]),
    "groups of no rows": (completion(ops.completion_loss), [(3, 0, 8), (3, 0, 8), ()]),
    "no groups": (completion(ops.completion_loss), [(0, 4, 8), (0, 4, 8), ()]),
    "no groups, valid": (
        completion(ops.completion_loss, valid=torch.ones(0, 4, dtype=torch.bool)), [(0, 4, 8), (0, 4, 8), ()],
    ),
    "no rows, valid": (completion(ops.completion_loss, valid=torch.ones(0).bool()), [(0, 8), (0, 8), ()]),
    "no valid rows": (completion(ops.completion_loss, valid=torch.zeros(4).bool()), [(4, 8), (4, 8), ()]),
    "the definition": (reference_completion(), [(0, 8), (0, 8)]),
    "the definition of groups": (reference_completion(), [(0, 4, 8), (0, 4, 8)]),
    "CompletionLoss": (lambda backend: CompletionLoss(0.1, backend=backend), [(0, 8), (0, 8)]),
    "linear_cross_entropy": (
        lambda backend: lambda h, w, b: ops.linear_cross_entropy(h, w, b, NONE, backend=backend),
        [(0, 8), (9, 8), (9,)],
    ),
    "nothing to predict": (
        lambda backend: lambda h, w, b: ops.linear_cross_entropy(h, w, b, torch.full((3,), -100), backend=backend),
        [(3, 8), (9, 8), (9,)],
    ),
    "linear_cross_entropy, the definition": (
        lambda backend: lambda h, w, b: reference.linear_cross_entropy(h, w, b, NONE), [(0, 8), (9, 8), (9,)],
    ),
    "LinearCrossEntropy": (lambda backend: lambda h: LinearCrossEntropy(8, 9, backend=backend)(h, NONE), [(0, 8)]),
    "itm": (lambda backend: lambda x: L.image_text_matching(x, NONE), [(0, 2)]),
    "vqa": (lambda backend: lambda x: L.visual_question_answering(x, torch.zeros(0, 5)), [(0, 5)]),
    "nlvr2": (lambda backend: lambda x: L.visual_reasoning(x, NONE), [(0, 2)]),
    "nlvr2 without labels": (lambda backend: lambda x: L.visual_reasoning(x, torch.full((3,), -100)), [(3, 2)]),
    "mlm": (
        lambda backend: lambda h, w, b: L.masked_language_modeling(h, w, b, NONE, backend=backend)[0],
        [(0, 8), (9, 8), (9,)],
    ),
    "itc": (lambda backend: lambda a, b, t: L.image_text_contrast(a, b, t.abs() + 1, backend=backend),
            [(0, 8), (0, 8), ()]),
    **{
        f"mvsc {norm} {directions}": (
            lambda backend, norm=norm, directions=directions: lambda a: L.masked_vision_semantic_completion(
                a, torch.ones(0, 2, 8), frame_norm=norm, directions=directions, backend=backend
            ),
            [(0, 2, 8)],
        )
        for norm in ("features", "published") for directions in ("both", "recovered_to_complete")
    },
    "mlsc": (
        lambda backend: lambda a: L.masked_language_semantic_completion(a, torch.ones(0, 8), backend=backend),
        [(0, 8)],
    ),
    "mltc": (
        lambda backend: lambda a: L.masked_local_token_completion(
            a, torch.ones(0, 3, 8), torch.ones(0, 3).bool(), backend=backend
        ),
        [(0, 3, 8)],
    ),
    "mltc of no tokens": (
        lambda backend: lambda a: L.masked_local_token_completion(
            a, torch.ones(2, 0, 8), torch.ones(2, 0).bool(), backend=backend
        ),
        [(2, 0, 8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_no_rows_is_zero(name, backend):
    make, shapes = LOSSES[name]
    leaves = [leaf(*shape) for shape in shapes]
    loss = make(backend)(*leaves)
    assert loss.shape == () and loss.item() == 0 and loss.requires_grad
    loss.backward()
    for tensor in leaves:
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape and not tensor.grad.any()


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("frames", [None, 2])
def test_a_step_of_no_rows(make_model, make_batch, frames, backend):
    objectives = ObjectiveConfig("glscl", itm_negatives="dataset")
    model = make_model(objectives, max_frames=frames or 0).train().set_backend(backend)
    batch = {name: tensor[:0] for name, tensor in make_batch(frames=frames, false_image=True).items()}
    full = model(make_batch(frames=frames, false_image=True), seed=0)
    full.total.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = model(batch, seed=0)
    assert losses.named().keys() == full.named().keys()
    assert all(loss.item() == 0 for loss in losses.named().values())
    assert all(metric.isfinite() for metric in losses.metrics.values())
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == reached
    assert not any(gradient.any() for gradient in gradients.values())
