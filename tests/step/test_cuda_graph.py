"""CUDA graphs of the step: what is kept between replays, without a GPU; equal to plain steps, with one."""

from __future__ import annotations

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.errors import UserError
from sclkern.step import CapturedStep, StepConfig, check_capture, match_labels
from step_testing import losses_of, masks_of

WIDTHS = [(9, 40), (12, 48), (9, 40)]


class Emulated(CapturedStep):
    """A replay runs the step again, and writes its losses where the first were."""

    captured = 0

    def _check(self):
        pass

    def _warm_up(self, inputs):
        for _ in range(2):
            self._step(inputs)

    def _capture(self, step):
        self.captured += 1
        # A graph that is recorded has run nothing.
        before = {name: buffer.clone() for name, buffer in self._gradients.items()}
        outputs = step()
        for name, buffer in self._gradients.items():
            buffer.copy_(before[name])

        def replay():
            found = step()
            for name, value in found.named().items():
                outputs.named()[name].copy_(value)
            for name, value in found.metrics.items():
                outputs.metrics[name].copy_(value)

        return replay, outputs


def make(device="cpu"):
    torch.manual_seed(0)
    # Heads of other tasks get no gradient.
    config = SCLConfig.preset("tiny").replace(heads=("itm", "mlm", "itc", "vqa"), vqa_answers=3)
    return SCLModel(config, ObjectiveConfig(recipe="scl")).to(device).train()


def batch_of(width, tokens, seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (rows, width), generator=generator)
    mask = torch.arange(width) < torch.randint(4, 9, (rows, 1), generator=generator)
    image = torch.randn(rows, 3, 32, 32, generator=generator)
    return {"image": image, "text_ids": ids.masked_fill(~mask, 1), "text_mask": mask, "text_tokens": tokens}


def plain(model, batch, seed, scale, precision=None):
    device = next(model.parameters()).device
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    torch.manual_seed(seed)
    with torch.autocast(device.type, precision, enabled=precision is not None, cache_enabled=False):
        losses = losses_of(model, batch, masks_of(model, batch, seed))
    (losses.total * scale).backward()
    return losses


def assert_equal_training(captured_class, device, precision=None):
    """Two micro-batches a step, three steps, two shapes; gradients cleared in both ways."""
    ours, theirs = make(device), make(device)
    captured = captured_class(ours, scale=0.5, precision=precision)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, theirs)]
    for step, (width, tokens) in enumerate(WIDTHS):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step != 1)
        for micro in range(2):
            seed = 10 * step + micro
            batch = batch_of(width, tokens, seed)
            found, expected = captured(batch, seed), plain(theirs, batch, seed, 0.5, precision)
            for name, loss in expected.named().items():
                assert torch.equal(found.named()[name], loss.detach()), (step, micro, name)
            assert found.metrics.keys() == expected.metrics.keys()
            assert not found.total.requires_grad
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), (step, name)
        for optimizer in optimizers:
            optimizer.step()
    return captured


def test_replays_train_as_plain_steps_do():
    captured = assert_equal_training(Emulated, "cpu")
    assert captured.captured == 2  # one for each shape, not for each batch
    names = set(dict(captured.model.named_parameters())) - set(captured._gradients)
    assert {name.partition(".")[0] for name in names} == {"vqa_head", "vision"}, names
    assert "vision.mask_token" in names


def test_gradients_that_others_left_are_added_to():
    model = make()
    captured = Emulated(model)
    batch = batch_of(*WIDTHS[0], 1)
    captured(batch, 1)
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    captured(batch, 1)
    for name, parameter in model.named_parameters():
        expected = 1 + alone.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_other_settings_of_the_model_are_captured_again():
    model, batch = make(), batch_of(*WIDTHS[0], 1) | {"names": ["a", "b", "c", "d"]}
    captured = Emulated(model)
    captured(batch, 1)
    captured(batch, 2)
    assert captured.captured == 1
    model.step = StepConfig(absorb="never", pack=False)
    found = captured(batch, 1)
    assert captured.captured == 2
    model.objectives = ObjectiveConfig(recipe="scl", itc_weight=0.0)
    assert captured(batch, 1).total < found.total
    model.set_backend("eager")
    captured(batch, 1)
    assert captured.captured == 4


def test_losses_are_not_overwritten_by_the_next_replay():
    captured = Emulated(make())
    first = captured(batch_of(*WIDTHS[0], 1), 1)
    kept = first.total.item()
    second = captured(batch_of(*WIDTHS[0], 2), 2)
    assert first.total.item() == kept != second.total.item()


def test_a_batch_that_lacks_something_is_refused_before_anything_is_recorded():
    captured = Emulated(make())
    batch = batch_of(*WIDTHS[0], 1)
    with pytest.raises(ValueError, match="text_mask"):
        captured({key: value for key, value in batch.items() if key != "text_mask"}, 1)
    with pytest.raises(ValueError, match="text_tokens 3, expected room"):
        captured({**batch, "text_tokens": 3}, 1)
    assert captured.captured == 0


def test_places_labels_images_and_counts_are_copied_into_the_graph():
    model = make()
    captured = Emulated(model)
    for start in (0, 4):
        batch = batch_of(*WIDTHS[0], start)
        place = torch.arange(start, start + 4)
        batch |= {"place": place, "match_labels": match_labels(start, place)}
        batch["false_place"] = place.flip(0)[batch["match_labels"] == 0]
        batch["image_id"] = torch.tensor([5, 6, 5, 7]) if start else torch.tensor([6, 6, 5, 5])
        counts = {"mlm": torch.tensor(3.5 + start, dtype=torch.float64)}
        found = captured(batch, 5, counts=counts)
        model.zero_grad()
        expected = model(batch, seed=5, counts=counts)
        for name, loss in expected.named().items():
            assert torch.equal(found.named()[name], loss.detach()), (start, name)
    assert captured.captured == 1


def test_without_a_gpu_it_is_refused():
    with pytest.raises(UserError, match="cuda_graphs: needs a GPU, the device is cpu"):
        CapturedStep(make())


def test_blocks_that_are_computed_again_are_refused():
    with pytest.raises(UserError, match=r"cannot be had with step\.checkpoint_blocks=true"):
        check_capture(torch.device("cuda"), StepConfig(checkpoint_blocks=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_graphs_train_as_plain_steps_do(precision):
    captured = assert_equal_training(CapturedStep, "cuda", precision)
    assert len(captured._recorded) == 2
