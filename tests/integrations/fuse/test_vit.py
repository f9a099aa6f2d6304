"""timm's ViT, DeiT, EVA: attention and MLP, fused, compute what they did; what is not known is left."""

import copy
import pickle
import unittest.mock

import pytest
import torch
from torch import nn

import sclkern
from sclkern import ops
from sclkern.integrations.fuse.modules import Fused
from swapped_models.checks import agree, compute, kernels, outputs

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")
beit_models = pytest.importorskip("timm.models.beit")
pytestmark = pytest.mark.skipif(not hasattr(layers, "Attention"), reason="an older timm, whose ViT has the class")
WIDTH, ROWS = 32, 3


def stirred(module):
    """In float64 and evaluation, with weights that no initialisation makes simple."""
    torch.manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def attention(**options):
    return stirred(layers.Attention(WIDTH, num_heads=2, qkv_bias=True, **options))


def vit(**options):
    size = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 3}
    return stirred(timm.create_model("vit_tiny_patch16_224", pretrained=False, **{**size, **options}))


def tokens(length=6):
    return {"x": torch.randn(ROWS, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


IMAGES = {"x": torch.randn(ROWS, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
ROPE = {"rope": torch.randn(5, 2 * WIDTH // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))}
NORMED = {"norm_layer": layers.LayerNorm}


def eva(name="EvaAttention", **options):
    from timm.models import eva as models

    cls = getattr(models, name, None) or getattr(layers, name)
    return stirred(cls(WIDTH, num_heads=2, **{**NORMED, **options}))


def beit(**options):
    module = beit_models.Attention(WIDTH, num_heads=2, **{"window_size": (5, 1), **options})
    return stirred(module)


def shared(rows=1, heads=2, length=6):
    generator = torch.Generator().manual_seed(4)
    return {"shared_rel_pos_bias": torch.randn(rows, heads, length, length, dtype=torch.float64, generator=generator)}


ATTENTIONS = {
    "plain": (attention, {}),
    "norms": (lambda: attention(qk_norm=True, scale_norm=True, **NORMED), {}),
    "RMSNorm": (lambda: attention(qk_norm=True, norm_layer=nn.RMSNorm), {}),
    "gate": (lambda: attention(gated=True), {}),
    "own projection": (lambda: attention(attn_head_dim=8), {}),
    "EVA": (lambda: eva(), {}),
    "EVA, rotated": (lambda: eva(qk_norm=True), ROPE),
    "EVA, rotated by halves": (lambda: eva(rotate_half=True), ROPE),
    "EVA, separate biases": (lambda: eva(qkv_bias_separate=True), ROPE),
    "EVA, separate projections": (lambda: eva(qkv_fused=False), ROPE),
    "rotated": (lambda: eva("AttentionRope", qk_norm=True), ROPE),
    "BEiT": (lambda: beit(qkv_bias=True), {}),
    "BEiT, separate biases": (lambda: beit(qkv_bias=True, qkv_bias_separate=True), {}),
    "BEiT, with a shared bias": (lambda: beit(qkv_bias=True), shared()),
    "BEiT, with a bias for each row": (lambda: beit(), shared(ROWS, 1)),
    "BEiT, with a bias of three dimensions": (
        lambda: beit(),
        {"shared_rel_pos_bias": shared()["shared_rel_pos_bias"][0]},
    ),
    "BEiT, with a shared bias alone": (lambda: beit(window_size=None, qkv_bias=True), shared()),
    "BEiT, without a bias": (lambda: beit(window_size=None), {}),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("fused_attn", [True, False])
def test_attention_is_the_same(name, fused_attn):
    make, more = ATTENTIONS[name]
    module, inputs = make(), tokens() | more
    module.fused_attn = fused_attn
    expected = compute(module, inputs)
    fused = copy.deepcopy(module)
    report = sclkern.fuse(fused, only="attention")
    assert [entry.by for entry in report.active] == ["ops.attention"]
    with unittest.mock.patch.object(ops, "attention", wraps=ops.attention) as op:
        agree(compute(fused, inputs), expected, 1e-9)
    assert op.called
    agree(compute(copy.deepcopy(fused), inputs), expected, 1e-9)
    report.revert()
    agree(compute(fused, inputs), expected, 0.0)


@pytest.mark.parametrize("fused_attn", [True, False])
def test_dropout_of_attention_and_of_its_output_stay(fused_attn):
    module = attention(attn_drop=1.0).train()
    module.fused_attn = fused_attn
    expected = outputs(module, tokens())
    sclkern.fuse(module, only="attention")
    agree(outputs(module, tokens()), expected, 1e-12)
    module.attn_drop.p, module.proj_drop.p = 0.0, 1.0
    assert not outputs(module, tokens())[""].any()
    module.proj_drop.p, module.attn_drop.p = 0.0, 0.5
    with unittest.mock.patch.object(ops, "attention", wraps=ops.attention) as op:
        outputs(module, tokens())
        assert op.call_args.kwargs["dropout_p"] == 0.5
        outputs(module.eval(), tokens())
        assert op.call_args.kwargs["dropout_p"] == 0.0


@pytest.mark.parametrize("change", ["mask", "causal", "scale", "dropout"])
def test_other_calls_are_computed_by_the_original(change):
    module = attention()
    fused = copy.deepcopy(module)
    sclkern.fuse(fused, only="attention")
    inputs = tokens()
    for one in (module, fused):
        if change == "mask":
            inputs["attn_mask"] = torch.zeros(6, 6, dtype=torch.float64)
        elif change == "causal":
            inputs["is_causal"] = True
        elif change == "scale":
            one.fused_attn, one.scale = False, 2.0
        else:
            one.attn_drop = nn.Identity()
            one.fused_attn = False
    with unittest.mock.patch.object(ops, "attention", wraps=ops.attention) as op:
        agree(compute(fused, inputs), compute(module, inputs), 0.0)
    assert not op.called


class ScaledNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(layers.Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, attn_mask) + 1


def replaced():
    module = attention()
    module.forward = lambda x: x
    return module


def own_method():
    module = beit()
    module._get_rel_pos_bias = lambda: torch.zeros(1, 2, 6, 6)
    return module


class Windowed(nn.Module):
    """Swin's way: each window of a picture is a row."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale, self.relative_position_bias_table = 2, 0.25, nn.Parameter(torch.zeros(9, 2))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        return self.proj(self.qkv(x)[..., :WIDTH] + self.relative_position_bias_table.sum())


class Gated(beit_models.Attention):
    """The text of BEiT's forward is inherited, and there is more in the module."""

    def __init__(self):
        super().__init__(WIDTH, num_heads=2, window_size=(5, 1))
        self.strength = nn.Parameter(torch.ones(2))

    def _get_rel_pos_bias(self):
        return self.strength[:, None, None] * super()._get_rel_pos_bias()


LEFT = {
    "another norm": (lambda: attention(qk_norm=True, norm_layer=ScaledNorm), "its q_norm is ScaledNorm, which is not"),
    "a subclass": (lambda: Shifted(WIDTH, num_heads=2), "the text of its forward is not one that was examined"),
    "an instance": (replaced, "its forward was replaced on this instance"),
    "grouped keys": (
        lambda: layers.AttentionRope(WIDTH, num_heads=4, qkv_fused=False, num_kv_heads=2), "several queries share a key"
    ),
    "a bias in another forward": (Windowed, "its relative position bias changes its scores, in a forward whose text"),
    "a bias with more in it": (Gated, "it also has the parameter strength"),
    "BEiT, an own method": (own_method, "its code reads _get_rel_pos_bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_attention_that_is_left(name):
    make, reason = LEFT[name]
    report = sclkern.fuse(make(), only="attention", strict=False)
    assert not report.replaced
    assert len(report.left) == 1 and report.left[0].why.startswith(reason)


@pytest.mark.parametrize("kind", ["own", "shared", "both"])
def test_the_gradient_of_a_bias(kind):
    module = beit(window_size=None if kind == "shared" else (5, 1), qkv_bias=True)
    fused = copy.deepcopy(module)
    sclkern.fuse(fused, only="attention")
    more = {} if kind == "own" else shared()
    found = []
    for one in (module, fused):
        leaves = [value.clone().requires_grad_() for value in (tokens() | more).values()]
        out = one(*leaves)
        table = [] if kind == "shared" else [one.relative_position_bias_table]
        found.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *table])])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("change", ["window", "hook", "another method", "no table", "half"])
def test_bias_that_is_changed_later(change):
    module = beit(qkv_bias=True)
    fused = copy.deepcopy(module)
    sclkern.fuse(fused, only="attention")
    inputs, seen = tokens(), []
    for one in (module, fused):
        if change == "window":
            torch.manual_seed(1)
            if not hasattr(one, "set_window_size"):
                pytest.skip("an older timm")
            one.set_window_size((4, 2))
            inputs = tokens(9)
        elif change == "hook":
            one.proj.register_forward_hook(lambda module, args, out: seen.append(out))
        elif change == "another method":
            one._get_rel_pos_bias = lambda own=one: 2 * type(own)._get_rel_pos_bias(own)
        elif change == "no table":
            one.relative_position_bias_table = None
        else:
            one.bfloat16()
            inputs = {"x": inputs["x"].bfloat16()}
    with unittest.mock.patch.object(ops, "attention", wraps=ops.attention) as op:
        agree(compute(fused, inputs), compute(module, inputs), 2e-2 if change == "half" else 1e-9)
    assert op.called == (change != "another method") and len(seen) == 2 * (change == "hook")


@pytest.mark.parametrize("bias", [torch.randn(1, 2, 1, 6).double(), torch.ones(6, 6).bool()], ids=["a row", "bool"])
def test_bias_of_another_kind_is_added_by_the_original(bias):
    module = beit(window_size=None)
    fused = copy.deepcopy(module)
    sclkern.fuse(fused, only="attention")
    inputs = tokens() | {"shared_rel_pos_bias": bias}
    with unittest.mock.patch.object(ops, "attention", wraps=ops.attention) as op:
        agree(compute(fused, inputs), compute(module, inputs), 0.0)
    assert not op.called


def test_bias_of_another_length_raises_as_before():
    module = beit()
    sclkern.fuse(module, only="attention")
    with pytest.raises(RuntimeError, match="size"):
        module(**tokens(7))


def test_bias_under_autocast_and_compiled():
    module = beit(qkv_bias=True).float()
    fused, x = copy.deepcopy(module), tokens()["x"].float()
    sclkern.fuse(fused, only="attention")
    torch.testing.assert_close(torch.compile(fused, backend="eager", fullgraph=True)(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), module(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}], ids=str)
def test_beit_is_the_same(options):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = stirred(beit_models.Beit(**sizes, qkv_bias=True, init_values=0.1, drop_path_rate=0.5, **options))
    fused = copy.deepcopy(model)
    report = sclkern.fuse(fused)
    assert "ops.attention" in {entry.by for entry in report.active}
    with kernels(), unittest.mock.patch.object(ops, "attention", wraps=ops.attention) as op:
        agree(compute(fused, IMAGES), compute(model, IMAGES), 1e-6)
        assert op.call_count == 2 and all(call.kwargs["bias"].shape == (1, 2, 5, 5) for call in op.call_args_list)
        model.set_grad_checkpointing(True)
        fused.set_grad_checkpointing(True)
        agree(compute(fused.train(), IMAGES), compute(model.train(), IMAGES), 1e-6)
        agree(compute(pickle.loads(pickle.dumps(fused)), IMAGES), compute(model, IMAGES), 1e-6)
    report.revert()
    agree(compute(fused, IMAGES), compute(model, IMAGES), 0.0)


class Old(nn.Module):
    """The MLP of DeiT, MAE and DINO: one dropout, applied twice."""

    def __init__(self, act=None, inner=64):
        super().__init__()
        self.fc1, self.act = nn.Linear(WIDTH, 64), act or nn.GELU()
        self.fc2, self.drop = nn.Linear(inner, WIDTH), nn.Dropout(0.0)

    def forward(self, x):
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class Once(Old):
    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


def mlp(**options):
    return layers.Mlp(WIDTH, 64, **options)


@pytest.mark.parametrize("make", [mlp, lambda: mlp(**NORMED), Old], ids=["timm", "with a norm", "old"])
def test_mlp_is_the_same(make):
    module = stirred(make())
    fused = copy.deepcopy(module)
    report = sclkern.fuse(fused, only="linear_gelu", strict=False)
    assert [entry.by for entry in report.replaced] == ["ops.bias_gelu (none)"]
    with kernels(), unittest.mock.patch.object(ops, "bias_gelu", wraps=ops.bias_gelu) as op:
        agree(compute(fused, tokens()), compute(module, tokens()), 1e-9)
        assert op.called
        for one in (module, fused):
            one.train()
            for child in one.modules():
                if isinstance(child, nn.Dropout):
                    child.p = 0.4
        # The dropout is the module's own, so that it draws the same numbers.
        agree(compute(fused, tokens()), compute(module, tokens()), 1e-9)
    report.revert()
    agree(compute(fused, tokens()), compute(module, tokens()), 0.0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Once, "its forward computes something else in training"),
        (lambda: Old(nn.SiLU()), "SiLU is no GELU"),
        (lambda: layers.GluMlp(WIDTH, 64, act_layer=nn.GELU), "its fc2 does not read what its fc1 writes"),
        (lambda: mlp(norm_layer=ScaledNorm), "its norm is ScaledNorm, which is not known"),
        (lambda: mlp(bias=False), "its fc1 has no bias"),
        (lambda: mlp(use_conv=True), "its fc1 is Conv2d, not torch's Linear"),
    ],
    ids=["one dropout less", "no GELU", "a gate", "another norm", "no bias", "a convolution"],
)
def test_mlp_that_is_left(make, reason):
    report = sclkern.fuse(make(), only="linear_gelu", strict=False)
    assert not report.replaced
    assert len(report.left) == 1 and report.left[0].why.startswith(reason)


@pytest.mark.parametrize("more", [{}, {"init_values": 0.1}, {"drop_path_rate": 0.5}, {"qk_norm": True}], ids=str)
def test_model_is_the_same(more):
    model = vit(**more)
    fused = copy.deepcopy(model)
    report = sclkern.fuse(fused)
    # The gradients of a norm are float32 there.
    with kernels():
        agree(compute(fused, IMAGES), compute(model, IMAGES), 1e-6)
        # Stochastic depth is the model's own, and draws the same numbers.
        for one in (model, fused):
            one.train()
        agree(compute(fused, IMAGES), compute(model, IMAGES), 1e-6)
    report.revert()
    agree(compute(fused, IMAGES), compute(model, IMAGES), 0.0)
    assert not any(isinstance(module, Fused) for module in fused.modules())


def test_fused_twice_and_copied():
    model = vit()
    expected = outputs(model, IMAGES)
    first = sclkern.fuse(model, only="attention")
    second = sclkern.fuse(model, strict=False)
    assert {entry.module for entry in first.replaced} == {"Attention"}
    assert {entry.module for entry in second.replaced} == {"Block", "Mlp"}
    with kernels():
        agree(outputs(copy.deepcopy(model), IMAGES), expected, 1e-9)
    second.revert()
    first.revert()
    agree(outputs(model, IMAGES), expected, 0.0)
