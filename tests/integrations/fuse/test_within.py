"""A linear layer and its GELU within a longer forward: dropout stays, and only code that is understood is taken."""

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sclkern
from sclkern import ops

EXAMPLES = {
    "DistilBertModel": "FFN",
    "AlbertModel": "AlbertLayer",
    "BartModel": "BartEncoderLayer BartDecoderLayer",
    "Wav2Vec2Model": "Wav2Vec2FeedForward",
}


class Layer(nn.Module):
    """An MLP with both dropouts, as BART's layers have it, and a norm after it."""

    def __init__(self, activation=None):
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(64, 96), nn.Linear(96, 64), nn.LayerNorm(64)
        self.activation_fn = activation or nn.GELU()
        self.activation_dropout = self.dropout = 0.0

    def forward(self, x, **options):
        hidden = self.activation_fn(self.fc1(x))
        hidden = F.dropout(hidden, p=self.activation_dropout, training=self.training)
        return self.norm(x + F.dropout(self.fc2(hidden), p=self.dropout, training=self.training))


class Twice(Layer):
    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x))) + self.fc1.weight.sum()


class Scaled(Layer):
    def forward(self, x):
        hidden = self.fc1(x)
        hidden = self.activation_fn(2 * hidden)
        return self.fc2(hidden)


class PassesItselfOn(Layer):
    def forward(self, x):
        return mlp(self, x)


class Keeps(Layer):
    def forward(self, x):
        self.last = self.activation_fn(self.fc1(x))
        return self.fc2(self.last)


class ByName(Layer):
    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x))) * getattr(self, "fc1").bias.sum()  # noqa: B009


class BySuper(Layer):
    def forward(self, x):
        return super().forward(x)


class ByClass(Layer):
    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x))) * len(self.__class__.__name__)


class Property(Layer):
    @property
    def size(self):
        return self.fc1.weight.norm()

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x))) / self.size


def mlp(layer, x):
    return layer.fc2(layer.activation_fn(layer.fc1(x)))


def count(monkeypatch):
    calls = []
    op = ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda *args, **options: calls.append(args) or op(*args, **options))
    return calls


def gradients(layer, x):
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("mode", [True, False])
def test_equal_with_its_dropouts(dropouts, mode, kernels, monkeypatch):
    layer, x = Layer().train(mode), torch.randn(2, 5, 64)
    layer.activation_dropout, layer.dropout = dropouts
    expected = gradients(layer, x)
    report = sclkern.fuse(layer, only="linear_gelu")
    assert [entry.by for entry in report.replaced] == ["ops.bias_gelu (none)"]
    calls = count(monkeypatch)
    for ours, theirs in zip(gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == 1
    report.revert()
    assert type(layer) is Layer and all(map(torch.equal, gradients(layer, x), expected))


def test_the_same_elements_are_dropped(kernels):
    layer, x = Layer(), torch.randn(2, 5, 64)
    layer.activation_dropout = layer.dropout = 0.5
    torch.manual_seed(3)
    expected = layer(x)
    sclkern.fuse(layer, only="linear_gelu")
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Twice, "once, and use neither elsewhere"),
        (Scaled, "once, and use neither elsewhere"),
        (PassesItselfOn, "uses self for more than its attributes"),
        (Keeps, "its code sets self.last"),
        (ByName, "uses self for more than its attributes"),
        (BySuper, "uses self for more than its attributes"),
        (ByClass, "uses __class__, which says what self is"),
        (Property, "uses size, which is a property"),
    ],
)
def test_what_is_left(cls, why, kernels):
    layer, x = cls(), torch.randn(2, 5, 64)
    expected = layer(x)
    report = sclkern.fuse(layer, only="linear_gelu", strict=False)
    assert not report.replaced and why in report.left[0].why
    assert torch.equal(layer(x), expected)


def test_other_layers_are_left():
    layer = Layer(nn.ReLU())
    assert sclkern.fuse(layer, only="linear_gelu", strict=False).left[0].why == "ReLU is no GELU"
    layer = Layer()
    layer.fc1 = nn.Linear(64, 96, bias=False)
    assert sclkern.fuse(layer, only="linear_gelu", strict=False).left[0].why == "its fc1 has no bias"
    layer = Layer()
    layer.forward = lambda x: x
    assert "replaced on this instance" in sclkern.fuse(layer, only="linear_gelu", strict=False).left[0].why


def test_what_changes_after_it_was_fused(kernels, monkeypatch):
    layer, x = Layer(), torch.randn(2, 5, 64)
    sclkern.fuse(layer, only="linear_gelu")
    calls, other = count(monkeypatch), copy.deepcopy(layer)
    seen = []
    layer.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(layer(x), other(x))
    # The copy has no hook.
    assert len(seen) == 1 and len(calls) == 1
    layer.activation_fn = other.activation_fn = nn.ReLU()
    torch.testing.assert_close(layer(x), layer.norm(x + layer.fc2(layer.fc1(x).relu())))
    assert len(calls) == 1


def test_twice_checkpointed_and_compiled(kernels):
    layer, x = Layer(), torch.randn(2, 5, 64)
    expected = gradients(layer, x)
    sclkern.fuse(layer, only="linear_gelu")
    assert [left.why for left in sclkern.fuse(layer, strict=False).left] == ["fused already"]
    out = checkpoint(layer, x, use_reentrant=False)
    layer.zero_grad()
    out.square().sum().backward()
    for ours, theirs in zip([out, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected[0])


@pytest.mark.parametrize("name", EXAMPLES)
def test_models(name, kernels, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from swapped_models.table import MODELS, Model
    from swapped_models.tiny import stir, tiny

    cls = getattr(transformers, name)
    entry = MODELS.get(name, Model())
    torch.manual_seed(0)
    model = stir(cls._from_config(tiny(cls.config_class, **entry.sizes), attn_implementation="eager")).train()
    ids = {"input_ids": torch.randint(4, 60, (2, 7))}
    inputs = {"input_values": torch.randn(2, 2000)} if name.startswith("Wav2Vec2") else ids

    expected = run(model, inputs)
    if name == "BartModel":
        model.gradient_checkpointing_enable()
    report = sclkern.fuse(model, only="linear_gelu")
    assert {entry.module for entry in report.replaced} == set(EXAMPLES[name].split())
    calls = count(monkeypatch)
    for ours, theirs in zip(run(model, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(calls) >= len(report.replaced)


def run(model, inputs):
    torch.manual_seed(1)
    # Wav2Vec2 draws what it masks from NumPy.
    numpy.random.seed(1)
    model.zero_grad()
    out = model(**inputs).last_hidden_state
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
