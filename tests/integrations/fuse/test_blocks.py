"""Pre-norm blocks of transformers and timm: sum and norm are one op, all else is called as the block calls it."""

import copy
import functools
import importlib
import pickle
import unittest.mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sclkern
from sclkern import ops
from sclkern.integrations.fuse import masked_lm
from sclkern.integrations.fuse.blocks import FORMS
from sclkern.integrations.source import known
from swapped_models.checks import agree, compute, kernels, outputs

WIDTH, ROWS = 32, 3
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 48}
# The last two keys of the last row are padding.
MASK = torch.zeros(ROWS, 1, 6, 6, dtype=torch.float64)
MASK[-1, ..., 4:] = torch.finfo(torch.float64).min
MASKED = {"attention_mask": MASK}
HIDDEN = torch.randn(ROWS, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def of_transformers(model, cls, config, inputs=None, **sizes):
    transformers = pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    made = getattr(transformers, config)(**{**SIZES, **sizes})
    made._attn_implementation = "eager"
    return getattr(module, cls)(made), {"hidden_states": HIDDEN, **(inputs or {})}


def of_timm(module, cls, inputs=None, **options):
    pytest.importorskip("timm")
    block = getattr(importlib.import_module(f"timm.models.{module}"), cls)(WIDTH, num_heads=2, **options)
    return block, {"x": HIDDEN, **(inputs or {})}


BLOCKS = {
    "ViT": lambda: of_transformers("vit", "ViTLayer", "ViTConfig"),
    "DeiT": lambda: of_transformers("deit", "DeiTLayer", "DeiTConfig"),
    "BLIP": lambda: of_transformers("blip", "BlipEncoderLayer", "BlipVisionConfig"),
    "CLIP": lambda: of_transformers("clip", "CLIPEncoderLayer", "CLIPTextConfig", MASKED),
    "CLIP, no mask": lambda: of_transformers("clip", "CLIPEncoderLayer", "CLIPVisionConfig", {"attention_mask": None}),
    "SigLIP": lambda: of_transformers("siglip", "SiglipEncoderLayer", "SiglipTextConfig", MASKED),
    "DINOv2": lambda: of_transformers("dinov2", "Dinov2Layer", "Dinov2Config", drop_path_rate=0.5),
    "ViLT": lambda: of_transformers("vilt", "ViltLayer", "ViltConfig"),
    "timm": lambda: of_timm("vision_transformer", "Block"),
    "timm, scaled": lambda: of_timm("vision_transformer", "Block", init_values=0.1, drop_path=0.5),
    "timm's EVA": lambda: of_timm("eva", "EvaBlock", init_values=0.1, drop_path=0.5),
    "timm's BEiT": lambda: of_timm("beit", "Block", init_values=0.1),
}


def stirred(make):
    torch.manual_seed(0)
    block, inputs = make()
    block = block.double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block, inputs


def fused(block):
    copied = copy.deepcopy(block)
    report = sclkern.fuse(copied, only="dropout_add_layer_norm", strict=False)
    return copied, report


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_the_same(name):
    block, inputs = stirred(BLOCKS[name])
    ours, report = fused(block)
    assert [entry.path for entry in report.replaced if entry.by == "ops.dropout_add_layer_norm"] == [""]
    # Without a kernel, the block itself computes, to the bit.
    agree(compute(ours, inputs), compute(block, inputs), 0.0)
    with kernels(), unittest.mock.patch.object(ops, "dropout_add_layer_norm", wraps=ops.dropout_add_layer_norm) as op:
        agree(compute(ours, inputs), compute(block, inputs), 1e-6)
        assert op.call_count == 1 and op.call_args.kwargs["return_sum"]
        agree(compute(pickle.loads(pickle.dumps(copy.deepcopy(ours))), inputs), compute(block, inputs), 1e-6)
        # Dropout and stochastic depth are the block's own, and draw the same numbers.
        agree(compute(ours.train(), inputs), compute(block.train(), inputs), 1e-6)
    report.revert()
    agree(compute(ours.eval(), inputs), compute(block.eval(), inputs), 0.0)
    assert type(ours) is type(block)


def test_arguments_by_position_and_maps():
    block, _ = stirred(BLOCKS["ViLT"])
    ours, _ = fused(block)
    with kernels():
        for arguments in ((HIDDEN, None, True), (HIDDEN,)):
            expected, actual = block(*arguments), ours(*arguments)
            assert len(actual) == len(expected)
            for value, truth in zip(actual, expected, strict=True):
                torch.testing.assert_close(value, truth)
        with pytest.raises(TypeError, match="hidden_states"):
            ours()


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_checkpointed_compiled_and_called_wrongly(name):
    block, inputs = stirred(BLOCKS[name])
    ours, _ = fused(block)
    with kernels():
        compiled = torch.compile(ours, backend="eager")
        agree(outputs(compiled, inputs), outputs(block, inputs), 1e-6)
        for one in (block.train(), ours.train()):
            one.gradient_checkpointing = True
            one._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        with unittest.mock.patch.object(ops, "dropout_add_layer_norm", wraps=ops.dropout_add_layer_norm) as op:
            agree(compute(ours, inputs), compute(block, inputs), 1e-6)
            # Once more in the backward.
            assert op.call_count == 2
        for arguments, options in (((HIDDEN,), {}), ((HIDDEN, MASK), {"hidden_states": HIDDEN}), ((HIDDEN,) * 3, {})):
            for one in (block, ours):
                with pytest.raises(TypeError):
                    one(*arguments, **options)


def test_outputs_of_a_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=16, patch_size=8)
    model = transformers.CLIPVisionModel._from_config(config, attn_implementation="eager").double().eval()
    ours, _ = fused(model)
    inputs = {"pixel_values": torch.randn(ROWS, 3, 16, 16, dtype=torch.float64)}
    options = {"output_hidden_states": True, "output_attentions": True}
    with kernels(), torch.no_grad():
        expected, actual = model(**inputs, **options), ours(**inputs, **options)
    assert len(actual.hidden_states) == 3 and len(actual.attentions) == 2
    for kind in ("hidden_states", "attentions"):
        for value, truth in zip(actual[kind], expected[kind], strict=True):
            torch.testing.assert_close(value, truth)


def test_autocast():
    block, inputs = stirred(BLOCKS["timm"])
    block, inputs = block.float(), {"x": HIDDEN.float()}
    ours, _ = fused(block)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(block, inputs)
        with kernels():
            actual = outputs(ours, inputs)
    agree(actual, expected, 2e-2)


@pytest.mark.parametrize("change", ["hook", "class", "eps"])
@pytest.mark.parametrize(("name", "norm"), [("timm", "norm2"), ("CLIP", "layer_norm2"), ("SigLIP", "layer_norm2")])
def test_a_norm_that_is_changed_later(change, name, norm):
    block, inputs = stirred(BLOCKS[name])
    ours, _ = fused(block)
    for one in (block, ours):
        if change == "hook":
            getattr(one, norm).register_forward_hook(lambda module, args, out: 2 * out)
        elif change == "class":
            setattr(one, norm, nn.Identity())
        else:
            getattr(one, norm).eps = 0.5
    with kernels():
        agree(outputs(ours, inputs), outputs(block, inputs), 1e-9)


class ScaledNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def another_forward():
    block = of_timm("vision_transformer", "Block")[0]
    block.__class__ = type("Block", (type(block),), {"forward": lambda self, x: x + self.norm1(x)})
    return block


def replaced():
    block = of_timm("vision_transformer", "Block")[0]
    block.forward = lambda x: x
    return block


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_timm("vision_transformer", "Block", norm_layer=ScaledNorm)[0], "its norm2 is ScaledNorm, which is"),
        (lambda: of_timm("vision_transformer", "Block", norm_layer=nn.RMSNorm)[0], None),
        (another_forward, None),
        (replaced, None),
    ],
    ids=["another norm", "RMSNorm", "a subclass", "an instance"],
)
def test_a_block_that_is_left(make, reason):
    report = sclkern.fuse(make(), only="dropout_add_layer_norm", strict=False)
    assert not report.replaced
    assert [left.why.startswith(reason) for left in report.left] == [True] * (reason is not None)


def test_every_form_is_in_the_table():
    others = {"attention", "attention with bias", "packed attention", "packed attention with maps"}
    others |= {*masked_lm.MODELS, *masked_lm.HEADS, masked_lm.BIASED_HEAD}
    assert {entry["form"] for entry in known("forwards").values()} == {*others, *FORMS}
