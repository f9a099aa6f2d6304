"""``cached_step``: the gradients of one big batch, of the losses of the real package."""

import pytest
import torch
from open_clip import loss as theirs
from torch import nn

from sclkern.errors import UserError
from sclkern.integrations.cached_step import cached_step
from tiny_clip import pairs, tiny_clip


class Dropped(nn.Module):
    """open_clip's model behind layers that draw random numbers, whose buffers also change."""

    def __init__(self, **options):
        super().__init__()
        self.clip = tiny_clip(**options)
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.3)

    def forward(self, images, texts):
        return self.clip(self.dropout(self.norm(images)), texts)


@pytest.mark.parametrize(
    ("name", "bias"), [("ClipLoss", None), ("SigLipLoss", torch.tensor(-3.0))], ids=["clip", "siglip"]
)
def test_cached_step_is_one_big_batch(name, bias):
    batches = [pairs(rows, seed=rows) for rows in (6, 4, 2)]
    models = [Dropped(init_logit_bias=bias).double() for _ in range(2)]
    batches = [(images.double(), texts) for images, texts in batches]
    state = torch.get_rng_state()
    losses = cached_step(models[0], batches, getattr(theirs, name)())
    after = torch.get_rng_state()

    torch.set_rng_state(state)
    outputs = [models[1](*batch) for batch in batches]
    whole = {key: torch.cat([part[key] for part in outputs]) for key in ("image_features", "text_features")}
    shared = {key: value for key, value in outputs[0].items() if key not in whole}
    total = getattr(theirs, name)()(**whole, **{"logit_bias": None, **shared})
    total.backward()

    torch.testing.assert_close(losses, {"contrastive_loss": total.detach(), "loss": total.detach()})
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(dict(model.named_buffers()) for model in models))
    # What is drawn next is what would be drawn without the second pass.
    assert torch.equal(after, torch.get_rng_state())


def test_cached_step_with_float32_and_a_scaler():
    """The gradients of the package's own loss, evaluated once over all micro-batches, and of a locked tower none."""
    batches = [pairs(4, seed) for seed in range(3)]
    model, whole = tiny_clip(), tiny_clip()
    for one in (model, whole):
        one.lock_text_tower(unlocked_layers=0, freeze_layer_norm=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    cached_step(model, batches, theirs.ClipLoss(), scaler=scaler)
    outputs = whole(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    theirs.ClipLoss()(**outputs).backward()
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            torch.testing.assert_close(one.grad / 64, other.grad, rtol=1e-5, atol=1e-6)


def test_mistakes_of_a_cached_step_are_named():
    with pytest.raises(UserError, match="batches: got none"):
        cached_step(tiny_clip(), [], theirs.ClipLoss())
    tuples = tiny_clip()
    tuples.output_dict = False
    with pytest.raises(UserError, match=r"returned tuple, expected a dictionary; .* takes output_dict=True"):
        cached_step(tuples, [pairs(2)], theirs.ClipLoss())

    class Uneven(nn.Module):
        def forward(self, rows):
            return {"image_features": rows, "text_features": rows[1:]}

    with pytest.raises(UserError, match="expected the same number of each"):
        cached_step(Uneven(), [(torch.ones(3, 2),)], theirs.ClipLoss())
