"""Weights of a block are cast once under autocast, with the numbers of autocast."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.models import casting, layers
from sclkern.models.layouts import Padded
from sclkern.step import StepConfig

stream = layers.Stream.of


def block(**options):
    torch.manual_seed(0)
    return layers.PostNormBlock(64, 4, 0.0, 1e-5, **options)


def results(module, monkeypatch, *, together):
    """Output of a block under autocast and the gradients of its parameters."""
    torch.manual_seed(1)
    if not together:
        monkeypatch.setattr(casting, "_castable", lambda weight, dtype: False)
    x, context = torch.randn(2, 2, 5, 64)
    cross = (context, Padded()) if hasattr(module, "cross_attention") else ()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = module(stream(x), Padded(), *cross)
    out.square().sum().backward()
    monkeypatch.undo()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    return out.detach(), gradients


@pytest.mark.parametrize("cross", [False, True])
def test_numbers_are_those_of_autocast_to_the_bit(monkeypatch, cross):
    module = block(cross=cross)
    module.mlp.fc1.weight.requires_grad_(False)
    (out, gradients), (other, others) = (results(module, monkeypatch, together=t) for t in (True, False))
    assert torch.equal(out, other)
    assert gradients["mlp.fc1.weight"] is None
    for name, gradient in gradients.items():
        assert (gradient is None) == (others[name] is None)
        assert gradient is None or (gradient.dtype == torch.float32 and torch.equal(gradient, others[name])), name


def test_parameters_are_back_after_the_block_and_after_an_error():
    module = block()
    before = dict(module.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        module(stream(torch.randn(1, 3, 64)), Padded())
        with pytest.raises(RuntimeError):
            module(stream(torch.randn(1, 3, 65)), Padded())
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }


class Copies(TorchDispatchMode):
    """Counts casts to bfloat16 of tensors with the shape of a weight."""

    def __init__(self):
        super().__init__()
        self.together = self.alone = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._foreach_copy_.default:
            self.together += 1
        if func is torch.ops.aten._to_copy.default and args[0].shape[-1:] == (64,) and args[0].ndim == 2:
            self.alone += 1
        return func(*args, **(kwargs or {}))


def test_a_block_casts_its_weights_in_one_call_forward_and_one_backward():
    with Copies() as copies:
        with torch.autocast("cpu", torch.bfloat16):
            out = block()(stream(torch.randn(1, 3, 64)), Padded()).tokens
        assert (copies.together, copies.alone) == (1, 0)
        out.sum().backward()
        assert (copies.together, copies.alone) == (2, 0)


@pytest.mark.parametrize("where", ["float32", "weights in bfloat16", "another layer"])
def test_what_autocast_does_not_cast_is_left_alone(where):
    module = block()
    if where == "weights in bfloat16":
        module.bfloat16()
    if where == "another layer":

        class Other(nn.Linear):
            pass

        for attention_layer in ("in_proj", "out_proj"):
            getattr(module.attention, attention_layer).__class__ = Other
        module.mlp.fc1.__class__ = module.mlp.fc2.__class__ = Other
    with Copies() as copies, torch.autocast("cpu", torch.bfloat16, enabled=where != "float32"):
        module(stream(torch.randn(1, 3, 64, dtype=torch.bfloat16 if "bfloat16" in where else None)), Padded())
    assert copies.together == 0


def test_recomputed_blocks_cast_again_and_give_the_same_gradients():
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = SCLModel(
            SCLConfig.preset("tiny"),
            ObjectiveConfig(itm_negatives="in_batch"),
            StepConfig(checkpoint_blocks=checkpoint),
        ).eval()
        torch.manual_seed(1)
        batch = {"image": torch.randn(2, 3, 32, 32), "text_ids": torch.randint(5, 100, (2, 6)),
                 "text_mask": torch.ones(2, 6, dtype=torch.bool)}  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            total = model(batch, seed=0).total
        total.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is None or torch.equal(gradient, found[1][name]), name
