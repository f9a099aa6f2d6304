"""Small models to fuse, random weights away from their initial zeros, each with an input in which padding matters."""

import pytest
import torch
from torch import nn

import cpu_kernels

# No dropout: fused or not, other elements would be dropped. A head has 32 channels, which the kernels take.
TEXT = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "patch_size": 8,
    "image_size": 16,
}


def _text(rows=3, length=6):
    ids = torch.randint(4, 50, (rows, length))
    # The end of the text, which CLIP looks for.
    ids[:, 3] = 3
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _images(rows=3):
    return {"pixel_values": torch.randn(rows, 3, 16, 16)}


def _bert(transformers, **options):
    return transformers.BertModel._from_config(transformers.BertConfig(**TEXT), **options), _text()


def _roberta(transformers, **options):
    return transformers.RobertaModel._from_config(transformers.RobertaConfig(**TEXT), **options), _text()


def _clip(transformers, **options):
    config = transformers.CLIPConfig(
        text_config={**TEXT, "projection_dim": 32}, vision_config={**VISION, "projection_dim": 32}, projection_dim=32
    )
    return transformers.CLIPModel._from_config(config, **options), {**_text(), **_images(), "return_loss": True}


def _bridgetower(transformers, **options):
    vision = {name: VISION[name] for name in ("hidden_size", "patch_size", "image_size")}
    shared = {name: TEXT[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    config = transformers.BridgeTowerConfig(
        text_config={**TEXT, "num_hidden_layers": 3},
        vision_config={**vision, "num_hidden_layers": 3},
        num_hidden_layers=2,
        **shared,
    )
    return transformers.BridgeTowerModel._from_config(config, **options), {**_text(), **_images()}


def _blip(transformers, **options):
    config = transformers.BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 64, "projection_dim": 32, "sep_token_id": 3},
        vision_config={**VISION, "projection_dim": 32},
        projection_dim=32,
        image_text_hidden_size=32,
    )
    return transformers.BlipForImageTextRetrieval._from_config(config, **options), {**_text(), **_images()}


def _vilt(transformers, **options):
    config = transformers.ViltConfig(**TEXT, image_size=16, patch_size=8, max_image_length=-1)
    return transformers.ViltModel._from_config(config, **options), {**_text(), **_images()}


MODELS = {
    "bert": _bert,
    "roberta": _roberta,
    "clip": _clip,
    "bridgetower": _bridgetower,
    "blip": _blip,
    "vilt": _vilt,
}


@pytest.fixture
def make():
    """(name, **options of the model) -> a small model of transformers in training mode, and its input."""
    transformers = pytest.importorskip("transformers")

    def build(name, **options):
        torch.manual_seed(0)
        model, inputs = MODELS[name](transformers, **options)
        return stir(model).train(), inputs

    return build


def stir(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def tensors(out, prefix=""):
    """Every tensor of an output, by name, except the attention maps."""
    items = out.items() if hasattr(out, "items") else enumerate(out)
    by_name = {}
    for name, value in items:
        if torch.is_tensor(value):
            by_name[f"{prefix}{name}"] = value
        elif name != "attentions" and isinstance(value, (tuple, list, dict)):
            by_name |= tensors(value, f"{prefix}{name}.")
    return by_name


def compute(model, inputs, **options):
    """Every tensor of the output, and the gradient of every parameter under a sum over all of them."""
    model.zero_grad()
    # ViLT draws the patches that it keeps.
    torch.manual_seed(1)
    out = tensors(model(**inputs, **options))
    sum(tensor.double().square().mean() for tensor in out.values() if tensor.requires_grad).backward()
    values = {name: tensor.detach() for name, tensor in out.items()}
    return values | {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}


def assert_agree(actual, expected, relative=2e-5):
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        if truth is None:
            assert actual[name] is None, name
            continue
        error = float((actual[name].double() - truth.double()).abs().max())
        # A bias of the keys shifts all scores of a query alike: its gradient is rounding alone.
        floor = 0.1 if name.endswith(("key.bias", "k_proj.bias")) else 1e-2
        assert error <= relative * max(float(truth.abs().max()), floor), (name, error)


@pytest.fixture(name="compute")
def _compute():
    return compute


@pytest.fixture(name="assert_agree")
def _assert_agree():
    return assert_agree


@pytest.fixture
def kernels(monkeypatch):
    """The path of the kernels on any machine: every op believes in one, and computes by its definition."""
    cpu_kernels.install()
    monkeypatch.setattr("sclkern.ops.dispatch._problems", lambda devices, dtypes: ())


class CrossAttention(nn.Module):
    """The attention of ``BertCrossLayer`` before its output layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        cross = encoder_hidden_states is not None
        context, mask = (encoder_hidden_states, encoder_attention_mask) if cross else (hidden_states, attention_mask)
        query, key, value = (
            layer(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, hidden_states), (self.key, context), (self.value, context))
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        maps = self.dropout((scores if mask is None else scores + mask).softmax(-1))
        maps = maps if head_mask is None else maps * head_mask
        out = (maps @ value).transpose(1, 2).flatten(-2)
        return (out, maps) if output_attentions else (out,)


class Output(nn.Module):
    def __init__(self, inner, width):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(inner, width), nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Intermediate(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(width, inner), nn.functional.gelu

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.self, self.output = CrossAttention(width, heads), Output(width, width)

    def forward(self, hidden, mask=None, context=None, context_mask=None, output_attentions=False):
        out = self.self(hidden, mask, None, context, context_mask, None, output_attentions)
        return (self.output(out[0], hidden), *out[1:])


class BertCrossLayer(nn.Module):
    """The fusion layer of METER and SCL: self-attention, cross-attention, feed-forward, each followed by its norm."""

    def __init__(self, width=64, heads=2, inner=96):
        super().__init__()
        self.attention, self.crossattention = BertAttention(width, heads), BertAttention(width, heads)
        self.intermediate, self.output = Intermediate(width, inner), Output(inner, width)

    def forward(
        self, hidden_states, encoder_hidden_states, attention_mask, encoder_attention_mask, output_attentions=False
    ):
        own = self.attention(hidden_states, attention_mask, output_attentions=output_attentions)
        cross = self.crossattention(
            own[0], attention_mask, encoder_hidden_states, encoder_attention_mask, output_attentions
        )
        return (self.output(self.intermediate(cross[0]), cross[0]), *own[1:], *cross[1:])


@pytest.fixture
def cross_layer():
    """``BertCrossLayer`` without dropout, and its input: text and image, each with padding as -10000."""
    torch.manual_seed(0)
    layer = stir(BertCrossLayer())
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., 3:] = -10000.0
    inputs = {
        "hidden_states": torch.randn(2, 5, 64),
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "attention_mask": mask,
        "encoder_attention_mask": torch.zeros(2, 1, 1, 7),
    }
    return layer, inputs
