"""open_clip's losses: beside the real package, in its own training loop."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from open_clip import loss as theirs
from open_clip_train.train import train_one_epoch

from sclkern.errors import UserError
from sclkern.integrations.open_clip import ClipLoss, SigLipLoss
from tiny_clip import WIDTH, pairs, tiny_clip

ROWS = 24


def features(seed=0):
    """Not of unit length, with positives that are close."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(ROWS, WIDTH, generator=generator) / 3
    text = 0.6 * image + torch.randn(ROWS, WIDTH, generator=generator) / 4
    return image, text


def value_and_gradients(loss, *arguments, **named):
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    value = loss(*leaves, **named)
    scalar = sum(value.values()) if isinstance(value, dict) else value
    scalar.backward()
    return value, [leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_same(ours, other):
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_arguments_are_those_of_the_package(name, method):
    def arguments(module):
        signature = inspect.signature(getattr(getattr(module, name), method))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert arguments(sys.modules["sclkern.integrations.open_clip"]) == arguments(theirs)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("scale", [torch.tensor(14.3), torch.tensor([14.3]), torch.tensor(0.7)])
@pytest.mark.parametrize("bias", [None, torch.tensor(-2.5), torch.tensor([-2.5])])
@pytest.mark.parametrize("output_dict", [False, True])
def test_values_and_gradients(name, scale, bias, output_dict):
    arguments = *features(), scale, bias
    ours = value_and_gradients(globals()[name](), *arguments, output_dict=output_dict)
    assert_same(ours, value_and_gradients(getattr(theirs, name)(), *arguments, output_dict=output_dict))


def test_a_bias_takes_part():
    """DDP waits for the gradient of every parameter."""
    _, (*_, gradient) = value_and_gradients(ClipLoss(), *features(), torch.tensor(10.0), torch.tensor(-2.5))
    assert gradient == 0.0


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_half_features_keep_a_precise_scale(name):
    image, text = (x.bfloat16() for x in features())
    (exact, _), (ours, _) = (
        value_and_gradients(loss, *x, scale, torch.tensor(-2.5))
        for loss, x, scale in [
            (getattr(theirs, name)(), (image.double(), text.double()), torch.tensor(0.3).bfloat16().double()),
            (globals()[name](), (image, text), torch.tensor(0.3).bfloat16()),
        ]
    )
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_is_not_supported_is_named():
    with pytest.raises(UserError, match="use_horovod: got True, expected False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(UserError, match="dist_impl: got 'ring', expected None or one of bidir, shift"):
        SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_mistakes_are_named(name):
    image, text = features()
    loss = globals()[name]
    with pytest.raises(UserError, match=r"world_size: got 2, but torch\.distributed has no process group"):
        loss(world_size=2)(image, text, 10.0, None)
    with pytest.raises(UserError, match=r"logit_scale: got shape \(2,\), expected one number"):
        loss()(image, text, torch.ones(2), None)
    with pytest.raises(UserError, match=r"logit_bias: got shape \(2,\), expected one number"):
        loss()(image, text, 10.0, torch.ones(2))


def test_features_that_do_not_belong_together_are_named():
    image, text = features()
    with pytest.raises(UserError, match=r"got \(24, 16\) and \(23, 16\), expected \(B, D\) of both"):
        SigLipLoss()(image, text[1:], 10.0, None)
    with pytest.raises(UserError, match=r"torch\.int64 on cpu, expected floating numbers on one device"):
        SigLipLoss()(image, text.long(), 10.0, None)


def test_the_package_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    source = inspect.getsource(sys.modules["sclkern.integrations.open_clip"])
    namespace = {"__name__": "again"}
    exec(compile(source, "open_clip.py", "exec"), namespace)
    assert namespace["ClipLoss"]()(*features(), 10.0) > 0


class Loader:
    """What open_clip's loop reads of its data: three batches."""

    num_batches, num_samples = 3, 24

    def __iter__(self):
        return iter([pairs(8, seed) for seed in range(3)])


@pytest.mark.parametrize(
    ("name", "bias"), [("ClipLoss", None), ("ClipLoss", -3.0), ("SigLipLoss", -3.0)], ids=["clip", "biased", "siglip"]
)
def test_in_the_training_loop_of_the_package(name, bias):
    """One changed line: the loss."""
    arguments = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=1.0,
        horovod=False, rank=0, local_rank=0, world_size=1, log_local=False, log_every_n_steps=1, batch_size=8,
        wandb=False,
    )  # fmt: skip
    trained = []
    for losses in (globals()[name](), getattr(theirs, name)()):
        model = tiny_clip(init_logit_bias=bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = {"train": SimpleNamespace(dataloader=Loader(), set_epoch=lambda epoch: None)}
        train_one_epoch(model, data, losses, 0, optimizer, None, None, None, arguments)
        trained.append(model.state_dict())
    assert not torch.equal(trained[0]["logit_scale"], tiny_clip().logit_scale)
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)
