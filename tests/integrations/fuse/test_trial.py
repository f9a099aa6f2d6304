"""Modules that look like those the ops can compute, and are not: they are left, or give what they gave."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from handwritten import Attention, Mlp, Output
from torch import nn

import sclkern
from sclkern.integrations.fuse import trial


class RelativeBias(Attention):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 16, 16))

    def scores(self, query, key):
        length = query.shape[2]
        return super().scores(query, key) + self.bias[:, :length, :length]


class HeadScale(Attention):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(2, 1, 1))

    def scores(self, query, key):
        return self.scale * super().scores(query, key)


class ZeroGate(Attention):
    """A projection hidden in a list, with a gate that is zero until it learns."""

    def __init__(self):
        super().__init__()
        self.gates = [torch.zeros(1)]

    def forward(self, hidden_states, attention_mask=None):
        out = super().forward(hidden_states, attention_mask)[0]
        return (out + self.gates[0] * hidden_states,)


class TalkingHeads(Attention):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.mix.weight)

    def maps(self, scores):
        return self.mix(super().maps(scores).movedim(1, -1)).movedim(-1, 1)


class Alibi(Attention):
    """Slopes as a list of Python's numbers."""

    def __init__(self):
        super().__init__()
        self.slopes = [0.01, 0.02]

    def scores(self, query, key):
        position = torch.arange(query.shape[2])
        slopes = torch.tensor(self.slopes)[:, None, None].to(query)
        return super().scores(query, key) - slopes * (position[:, None] - position).abs()


class Window(Attention):
    """A local window that five tokens, or two hundred, do not show."""

    reach = 8

    def scores(self, query, key):
        position = torch.arange(query.shape[2])
        return super().scores(query, key).masked_fill((position[:, None] - position).abs() > self.reach, -1e9)


class WideWindow(Window):
    reach = 600


class CausalChunks(Attention):
    def scores(self, query, key):
        scores, length = super().scores(query, key), query.shape[2]
        return scores if length <= 8 else scores.masked_fill(torch.ones(length, length).triu(1).bool(), -1e9)


class SoftCap(Attention):
    def scores(self, query, key):
        return 50.0 * torch.tanh(super().scores(query, key) / 50.0)


class QueryKeyNorm(Attention):
    def scores(self, query, key):
        return super().scores(F.normalize(query, dim=-1), F.normalize(key, dim=-1))


class Doubled(Attention):
    def forward(self, hidden_states, attention_mask=None):
        return (1.02 * super().forward(hidden_states, attention_mask)[0],)


class DropOutput(Attention):
    def maps(self, scores):
        return scores.softmax(-1)

    def forward(self, hidden_states, attention_mask=None):
        return (self.dropout(super().forward(hidden_states, attention_mask)[0]),)


class DropScores(Attention):
    def maps(self, scores):
        return self.dropout(scores).softmax(-1)


class DropKeys(Attention):
    """The same keys for all heads and queries."""

    def maps(self, scores):
        kept = self.dropout(torch.ones_like(scores[:, :1, :1]))
        return scores.softmax(-1) * kept


class DropAlsoFunctionally(Attention):
    def maps(self, scores):
        return F.dropout(super().maps(scores), 0.1, self.training)


class Counting(Attention):
    calls = 0

    def forward(self, hidden_states, attention_mask=None):
        self.calls += 1
        return super().forward(hidden_states, attention_mask)


class ManyResults(Attention):
    def forward(self, hidden_states, attention_mask=None):
        out = super().forward(hidden_states, attention_mask)[0]
        return out, out.mean()


class ListOfResults(Attention):
    def forward(self, hidden_states, attention_mask=None):
        return [super().forward(hidden_states, attention_mask)[0]]


class Raising(Attention):
    def forward(self, hidden_states, attention_mask=None):
        raise IndexError("no such layer")


class Rotary(Attention):
    def forward(self, hidden_states, attention_mask=None, position_ids=None):
        if position_ids is not None:
            hidden_states = hidden_states * torch.cos(position_ids[..., None].float())
        return super().forward(hidden_states, attention_mask)


class Sinusoidal(Attention):
    """As RoFormer's, which always gets its positions."""

    def forward(self, hidden_states, attention_mask=None, sinusoidal_pos=None):
        hidden_states = hidden_states if sinusoidal_pos is None else hidden_states + sinusoidal_pos
        return super().forward(hidden_states, attention_mask)


class NeedsBoxes(Attention):
    def forward(self, hidden_states, boxes, attention_mask=None):
        return super().forward(hidden_states + boxes, attention_mask)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (RelativeBias, "it also has the parameter bias"),
        (HeadScale, "it also has the buffer scale"),
        (ZeroGate, "its code reads gates, which is list"),
        (TalkingHeads, "it also has mix"),
        (Alibi, "computes something else"),
        (Window, "computes something else with 64 tokens"),
        (WideWindow, "computes something else with 1100 tokens"),
        (CausalChunks, "computes something else with 64 tokens"),
        (SoftCap, "something else|other gradients"),
        (QueryKeyNorm, "computes something else"),
        (Doubled, "computes something else"),
        (DropOutput, "in training, where its dropout has another place"),
        (DropScores, "in training"),
        (DropKeys, "in training"),
        (DropAlsoFunctionally, "in training with dropout 0"),
        (Counting, "its forward changes calls"),
        (ManyResults, "it returns more than its attention"),
        (ListOfResults, "its forward returns list"),
        (Rotary, "its position_ids may change the result of any call"),
        (Sinusoidal, "its sinusoidal_pos may change the result of any call"),
        (NeedsBoxes, "its forward needs boxes too"),
        (Raising, "it cannot be tried: IndexError: no such layer"),
    ],
)
def test_an_attention_that_does_more_is_left(cls, why):
    model = nn.Sequential(cls(), nn.Identity())
    before = copy.deepcopy(vars(model[0]))
    report = sclkern.fuse(model, strict=False)
    assert not report.replaced
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(report.left[0].why)
    assert type(model[0]) is cls and vars(model[0]).keys() == before.keys()
    assert getattr(model[0], "calls", 0) == 0


class OneMask(Attention):
    """As RemBERT's: its mask is that of the context, where one is given."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, past_key_values=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            self.heads(layer(x))
            for layer, x in ((self.query, hidden_states), (self.key, context), (self.value, context))
        )
        maps = self.maps(self.masked(self.scores(query, key), attention_mask))
        return (maps @ value).transpose(1, 2).flatten(-2)


class SameLength(OneMask):
    """As MegatronBERT's, which takes no context of another length."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None):
        if encoder_hidden_states is not None and encoder_hidden_states.shape != hidden_states.shape:
            raise RuntimeError("shapes")
        return super().forward(hidden_states, attention_mask, encoder_hidden_states)


class IgnoredBool(Attention):
    def masked(self, scores, mask):
        return scores if mask is None else scores.masked_fill(mask.bool(), -1e9)

    def forward(self, hidden_states, attention_mask=None):
        return super().forward(hidden_states, attention_mask)


class AttendedBool(Attention):
    def masked(self, scores, mask):
        if mask is None or mask.is_floating_point():
            return super().masked(scores, mask)
        return scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min)


class Temperature(Attention):
    temperature = 1.0

    def scores(self, query, key):
        return super().scores(query, key) / self.temperature


class CausalFlag(Attention):
    def scores(self, query, key):
        scores = super().scores(query, key)
        causal = getattr(self, "is_causal", False)
        return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e9) if causal else scores


def _pruned(module):
    module.num_attention_heads = 1
    for name in ("query", "key", "value"):
        layer = getattr(module, name)
        layer.weight, layer.bias, layer.out_features = (
            nn.Parameter(layer.weight[:32]),
            nn.Parameter(layer.bias[:32]),
            32,
        )


PADDED = torch.arange(16).expand(2, 1, 1, 16) > 11
CONTEXT = torch.linspace(-1, 1, 2 * 8 * 64).sin().reshape(2, 8, 64)
POSITIONS = torch.arange(16).expand(2, -1)


@pytest.mark.parametrize(
    ("cls", "arguments", "change", "computed"),
    [
        (Attention, {}, None, True),
        (Attention, {"attention_mask": -10000.0 * PADDED}, None, True),
        (Attention, {"position_ids": POSITIONS}, None, True),
        (Attention, {"attention_mask": ~PADDED}, None, False),
        (Attention, {"attention_mask": PADDED.long()}, None, False),
        (Attention, {"attention_mask": -10000.0 * PADDED[..., :1]}, None, False),
        (IgnoredBool, {"attention_mask": PADDED}, None, False),
        (AttendedBool, {"attention_mask": ~PADDED}, None, True),
        (OneMask, {"encoder_hidden_states": CONTEXT, "attention_mask": -10000.0 * PADDED[..., 8:]}, None, True),
        (OneMask, {"encoder_hidden_states": CONTEXT}, None, True),
        (SameLength, {"attention_mask": -10000.0 * PADDED}, None, True),
        (Temperature, {}, lambda module: setattr(module, "temperature", 3.0), False),
        (CausalFlag, {}, None, True),
        (CausalFlag, {}, lambda module: setattr(module, "is_causal", True), False),
        (Attention, {}, _pruned, False),
        (Attention, {}, lambda module: setattr(module, "key", nn.Sequential(module.key, nn.Tanh())), True),
        (Attention, {}, lambda module: setattr(module, "dropout", nn.Threshold(0.1, 0.0)), False),
    ],
)
def test_what_the_op_does_not_compute_the_module_does(cls, arguments, change, computed, monkeypatch):
    torch.manual_seed(0)
    expected = nn.Sequential(cls(), nn.Identity()).eval()
    actual = copy.deepcopy(expected)
    assert [entry.path for entry in sclkern.fuse(actual).active] == ["0"]
    calls, attend = [], sclkern.ops.attention
    monkeypatch.setattr(sclkern.ops, "attention", lambda *args, **options: calls.append(1) or attend(*args, **options))
    for model in (expected, actual):
        if change is not None:
            with torch.no_grad():
                change(model[0])
    x = torch.randn(2, 16, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(actual[0](x, **arguments), expected[0](x, **arguments))
    assert bool(calls) is computed


class Adapter(Output):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 64)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.up(self.dense(hidden_states))) + input_tensor)


class DropResidual(Output):
    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states) + self.dropout(input_tensor))


class DropSum(Output):
    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states) + input_tensor))


class NormTwice(Output):
    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(super().forward(hidden_states, input_tensor))


class DenseTwice(Output):
    def forward(self, hidden_states, input_tensor):
        return super().forward(self.dense(hidden_states), input_tensor)


class Clipped(Output):
    """As in T5 in half precision: large sums alone."""

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm((self.dropout(self.dense(hidden_states)) + input_tensor).clamp(-8, 8))


class WithScale(Output):
    def forward(self, hidden_states, input_tensor, scale=1.0):
        return super().forward(hidden_states, scale * input_tensor)


class DropInside(Mlp):
    def forward(self, x):
        return self.fc2(F.dropout(self.activation_fn(self.fc1(x)), self.p, self.training))


class DropBehind(Mlp):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(super().forward(x))


class NoisyGelu(nn.GELU):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, self.training))


class NoisyMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.activation_fn = NoisyGelu()


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Adapter, "it also has up"),
        (DropResidual, "in training"),
        (DropSum, "in training"),
        (NormTwice, "something else"),
        (DenseTwice, "something else"),
        (Clipped, "something else on a large input"),
        (WithScale, "its forward does not take two tensors"),
        (DropBehind, "its code uses self for more than its attributes"),
        (NoisyMlp, "NoisyGelu is no GELU"),
    ],
)
def test_an_mlp_that_does_more_is_left(cls, why):
    # On a CPU no kernel runs, and what the fused form would compute does not show.
    report = sclkern.fuse(nn.Sequential(cls(), nn.Identity()), strict=False)
    assert not report.replaced and why in report.left[0].why


def test_an_mlp_with_dropout_between_is_taken_and_drops_what_it_dropped():
    model = nn.Sequential(DropInside(), nn.Identity())
    x = torch.randn(3, model[0].fc1.in_features)
    torch.manual_seed(1)
    expected = model.train()(x)
    report = sclkern.fuse(model, strict=False)
    torch.manual_seed(1)
    assert report.replaced[0].by.startswith("ops.bias_gelu")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: setattr(mlp, "activation_fn", nn.ReLU()),
        lambda mlp: setattr(mlp.activation_fn, "approximate", "tanh"),
        lambda mlp: setattr(mlp, "fc2", nn.Sequential(mlp.fc2, nn.Tanh())),
        lambda mlp: setattr(mlp.fc1, "forward", lambda x: x.new_ones(*x.shape[:-1], 96)),
        lambda mlp: mlp.activation_fn.register_forward_hook(lambda module, args, out: 2 * out),
    ],
)
@pytest.mark.parametrize("kind", [Mlp, nn.Sequential])
def test_a_gelu_that_is_replaced_later(change, kind, kernels):
    torch.manual_seed(0)
    mlp = Mlp()
    # The children of a Sequential may have any names.
    model = nn.ModuleList([mlp if kind is Mlp else nn.Sequential(OrderedDict(mlp.named_children()))])
    expected = copy.deepcopy(model)
    assert len(sclkern.fuse(model).active) == 1
    change(expected[0])
    change(model[0])
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(model[0](x), expected[0](x), rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_fused_sequential(kernels):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Dropout(0.0), nn.Linear(96, 64), nn.GELU("tanh"))
    expected, x = copy.deepcopy(model), torch.randn(3, 64)
    assert sclkern.fuse(model).replaced[0].by == "ops.bias_gelu (none, tanh)"
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[:2](x), expected[:2](x), rtol=1e-5, atol=1e-5)
    for changed in (model, expected):
        changed.insert(1, nn.Tanh())
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)


class OwnLayer(nn.TransformerEncoderLayer):
    """Its padding mask must be the additive one that ``torch.nn.TransformerEncoder`` makes."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        assert src_key_padding_mask.is_floating_point()
        return src + src_key_padding_mask[..., None].clamp_min(-1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_encoder_with_layers_of_another_class(when):
    layer = nn.TransformerEncoderLayer(64, 2, 96, 0.0, batch_first=True)
    own = OwnLayer(64, 2, 96, 0.0, batch_first=True)
    model = nn.TransformerEncoder(own if when == "before" else layer, 2, enable_nested_tensor=False)
    x, padding = torch.randn(2, 5, 64), torch.arange(5).expand(2, 5) > 3
    report = sclkern.fuse(model, strict=False, only="transformer_encoder")
    if when == "before":
        assert [(entry.path, entry.why) for entry in report.left] == [("", "its layers are OwnLayer that are left")]
    model.layers[1] = own
    model(x, src_key_padding_mask=padding)


def test_a_torch_attention_with_more_keys_or_another_forward_is_left():
    model = nn.ModuleList([nn.MultiheadAttention(64, 2, add_bias_kv=True), nn.MultiheadAttention(64, 2)])
    model.append(nn.TransformerEncoderLayer(64, 2))
    model[1].forward = model[2].forward = lambda *args, **options: args
    report = sclkern.fuse(model, strict=False, only=["attention", "transformer_encoder"])
    assert [(entry.path, entry.why.split(":")[0]) for entry in report.left] == [
        ("0", "add_bias_kv or add_zero_attn adds a key"),
        ("1", "its forward was replaced on this instance"),
        ("2", "its forward was replaced on this instance"),
    ]


class Tower(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.transformer = nn.Sequential(nn.ModuleDict({"attn": nn.MultiheadAttention(64, 2)}))
        self.visual = nn.ModuleDict({"transformer": nn.ModuleDict({"attn": nn.MultiheadAttention(64, 2)})})
        self.register_buffer("attn_mask", mask)


def test_a_torch_attention_whose_owner_holds_a_mask_is_left():
    """open_clip's CLIP has a causal mask for its text model, OpenAI's in each block."""
    mask = torch.full((5, 5), float("-inf")).triu(1)
    assert [entry.path for entry in sclkern.fuse(Tower(mask)).replaced] == ["visual.transformer.attn"]
    assert len(sclkern.fuse(Tower(None)).replaced) == 2
    block = Tower(None)
    block.visual["transformer"].attn_mask = mask
    report = sclkern.fuse(block)
    assert [entry.path for entry in report.replaced] == ["transformer.0.attn"]
    assert report.left[0].why.startswith("its owner gives it attn_mask in every call")


def test_a_causal_decoder_is_left_and_its_cross_attention_is_not():
    model = nn.ModuleDict({"self": OneMask(), "crossattention": OneMask(), "encoder": OneMask()})
    model["self"].is_decoder = model["crossattention"].is_decoder = True
    report = sclkern.fuse(model)
    assert [entry.path for entry in report.replaced] == ["crossattention", "encoder"]
    assert [(entry.path, entry.why) for entry in report.left] == [
        ("self", "causal attention: its own forward computes that")
    ]


class LowRank(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.key.register_forward_hook(lambda *a: None), "its key carries hooks"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.key), "its key is ParametrizedLinear"),
        (lambda m: nn.utils.spectral_norm(m.query), "its query carries hooks"),
        (lambda m: setattr(m, "value", LowRank(64, 64)), "its value is LowRank, not torch's Linear"),
        (lambda m: m.to("meta"), "its parameters are on the meta device"),
        (lambda m: setattr(m, "forward", lambda hidden_states: (hidden_states,)), "its forward was replaced"),
        (
            lambda m: setattr(
                m.key, "weight", nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
            ),
            "its key has weights of int8",
        ),
        (lambda m: setattr(m.value, "forward", lambda x: 2 * x), "its value carries hooks, or another forward"),
    ],
)
def test_changed_parts_are_left(change, why):
    model = nn.Sequential(Attention(), nn.Identity())
    change(model[0])
    report = sclkern.fuse(model, strict=False)
    assert not report.replaced and why in report.left[0].why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_compiled_part(dtype):
    model = nn.Sequential(Attention(), nn.Identity()).eval().to(dtype)
    expected = copy.deepcopy(model)
    model[0] = torch.compile(model[0], backend="eager")
    report = sclkern.fuse(model)
    assert [entry.path for entry in report.active] == ["0._orig_mod"] and not report.left
    x = torch.randn(2, 9, 64, dtype=dtype)
    torch.testing.assert_close(model[0](x), expected[0](x), rtol=1e-2, atol=1e-2)


def test_one_trial_for_equal_modules(monkeypatch):
    tried, own = [], trial.Trial.__init__
    monkeypatch.setattr(trial.Trial, "__init__", lambda *args: tried.append(1) or own(*args))
    for modules, trials in (
        ([Attention() for _ in range(3)], 1),
        ([Attention(), Attention(heads=4), Attention(width=32)], 3),
        ([Output(), Output(), Mlp()], 2),
    ):
        tried.clear()
        assert len(sclkern.fuse(nn.ModuleList(modules), strict=False).replaced) == len(modules)
        assert len(tried) == trials


def test_a_trial_says_nothing_and_draws_nothing():
    model = nn.ModuleList([Attention(), Output(), Mlp()])
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sclkern.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
