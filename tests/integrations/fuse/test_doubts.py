"""What no trial shows: choices by sizes, variables outside a module, random numbers, what is replaced later."""

import copy
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from handwritten import Attention, Mlp, Output
from torch import nn

import sclkern
from sclkern.integrations.fuse.doubts import doubt

SHARPER = False
STATE = {"factor": 1.0}


class Settings:
    factor = 1.0


def scaled(scores):
    return STATE["factor"] * scores


def _attention(factor):
    """An attention whose scores get a factor, which this function finds from the queries."""

    class Scaled(Attention):
        def scores(self, query, key):
            return super().scores(query, key) * factor(query)

    return Scaled


class OfFlag(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * (2 if SHARPER else 1)


class OfClass(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * Settings.factor


class OfHelper(Attention):
    def scores(self, query, key):
        return scaled(super().scores(query, key))


class OfBatch(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * (2 if query.shape[0] > 2 else 1)


class OfLength(Attention):
    def scores(self, query, key):
        long = query.shape[2] // 2048
        return super().scores(query, key) * (2 if long else 1)


class OfRemainder(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * (1 + query.shape[0] % 2)


class Capped(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * 1200 / max(query.shape[2], 1200)


class OfDtype(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * (2 if query.dtype == torch.bfloat16 else 1)


class OfAutocast(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * (2 if torch.is_autocast_enabled("cpu") else 1)


class OfInference(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * (2 if torch.is_inference_mode_enabled() else 1)


class OfFrozen(Attention):
    def scores(self, query, key):
        return super().scores(query, key) * (1 if self.query.weight.requires_grad else 2)


class Rarely(Attention):
    """Skips the attention, so seldom that no trial sees it."""

    def maps(self, scores):
        return super().maps(scores) * (0 if self.training and random.random() < 1e-4 else 1)


class OfKeyword(Attention):
    def forward(self, hidden_states, attention_mask=None, **options):
        hidden_states = hidden_states + options["shift"] if "shift" in options else hidden_states
        return super().forward(hidden_states, attention_mask)


class OfMaskSize(Attention):
    def masked(self, scores, mask):
        return scores if mask is None or mask.numel() > 5000 else scores + mask


class OutputOfBatch(Output):
    def forward(self, hidden_states, input_tensor):
        return super().forward(hidden_states * (2 if len(hidden_states) > 2 else 1), input_tensor)


class MlpOfBatch(Mlp):
    def forward(self, x):
        return super().forward(x * (2 if len(x) > 2 else 1))


class GeluOfBatch(nn.Module):
    def forward(self, x):
        return F.gelu(x) if len(x) < 3 else F.relu(x)


class MlpOfGelu(Mlp):
    def __init__(self):
        super().__init__()
        self.activation_fn = GeluOfBatch()


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (OfFlag, "reads SHARPER, which lies outside"),
        (OfClass, "reads Settings, which lies outside"),
        (OfHelper, "reads STATE, which lies outside"),
        (_attention(lambda query: 1.0 + STATE["factor"] - 1.0), "reads STATE, which lies outside"),
        (OfBatch, "decides by query.shape[0] > 2"),
        (OfLength, "decides by long"),
        (OfRemainder, "something else|decides by query.shape[0] % 2"),
        (Capped, "decides by max(query.shape[2], 1200)"),
        (OfDtype, "decides by query.dtype == torch.bfloat16"),
        (OfAutocast, "asks for is_autocast_enabled"),
        (OfInference, "asks for is_inference_mode_enabled"),
        (OfFrozen, "asks for requires_grad"),
        (Rarely, "draws random numbers (random)"),
        (OfKeyword, "decides by 'shift' in options"),
        (OfMaskSize, "decides by mask is None or mask.numel() > 5000"),
        (OutputOfBatch, "decides by len(hidden_states) > 2"),
        (MlpOfBatch, "decides by len(x) > 2"),
        (MlpOfGelu, "decides by len(x) < 3"),
        (lambda: nn.Sequential(nn.Linear(64, 64), GeluOfBatch()), "decides by len(x) < 3"),
    ],
)
def test_what_a_trial_may_not_see_is_left(cls, why):
    report = sclkern.fuse(nn.ModuleList([cls()]), strict=False)
    assert not report.replaced
    assert any(reason in report.left[0].why for reason in why.split("|")), report.left[0].why


def test_the_classes_of_the_tests_are_believed():
    assert [doubt(cls) for cls in (Attention, Output, Mlp)] == [None] * 3


def test_a_method_that_is_replaced_later():
    expected = nn.ModuleList([Attention(), nn.Identity()]).eval()
    actual = copy.deepcopy(expected)
    sclkern.fuse(actual)
    for model in (expected, actual):
        model[0].maps = lambda scores: 2 * scores.softmax(-1)
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(actual[0](x), expected[0](x))


def test_a_copy_of_a_partial_gelu_is_the_same_gelu(kernels, monkeypatch):
    mlp = Mlp()
    del mlp.activation_fn
    mlp.activation_fn = functools.partial(F.gelu, approximate="tanh")
    sclkern.fuse(mlp)
    copied, x, calls, own = copy.deepcopy(mlp), torch.randn(2, 64), [], sclkern.ops.bias_gelu
    monkeypatch.setattr(sclkern.ops, "bias_gelu", lambda *args, **more: calls.append(1) or own(*args, **more))
    torch.testing.assert_close(copied(x), mlp(x))
    assert len(calls) == 2


class Doubled(torch.Tensor):
    """Weights with a product of their own, as quantised ones have."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out.as_subclass(torch.Tensor) if function is F.linear else out


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_of_a_class_of_their_own(when, kernels):
    expected = nn.ModuleList([Output(), Mlp(), nn.Sequential(nn.Linear(64, 64), nn.GELU())]).eval()
    actual = copy.deepcopy(expected)
    if when == "after":
        sclkern.fuse(actual)
    for model in (expected, actual):
        for layer in (model[0].dense, model[1].fc1, model[2][0]):
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled))
    if when == "before":
        sclkern.fuse(actual)
    x = torch.randn(2, 64)
    torch.testing.assert_close(actual[0](x, x), expected[0](x, x))
    torch.testing.assert_close(actual[1](x), expected[1](x))
    torch.testing.assert_close(actual[2](x), expected[2](x))


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
def test_whatever_is_set_around_fuse(around):
    model = nn.ModuleList([Attention(), Output(), Mlp(), nn.Sequential(nn.Linear(64, 64), nn.GELU())])
    with around():
        report = sclkern.fuse(model)
    assert len(report.replaced) == 4


def test_a_part_of_torchs_layer_that_is_replaced_later():
    expected = nn.ModuleList([nn.TransformerEncoderLayer(64, 2, 96, 0.0, batch_first=True)])
    actual = copy.deepcopy(expected)
    sclkern.fuse(actual)
    x = torch.randn(2, 9, 64)
    for model in (expected, actual):
        model[0]._ff_block = torch.zeros_like
    torch.testing.assert_close(actual[0](x), expected[0](x))
