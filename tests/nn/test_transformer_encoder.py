"""``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` against torch's with the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from op_testing import DEVICE, needs_kernels
from sclkern import nn, ops
from sclkern.ops.dispatch import interpreted

LAYERS = {
    "post-norm, gelu": {"activation": "gelu", "batch_first": True},
    "post-norm, relu, sequence first": {"activation": "relu"},
    "pre-norm, gelu": {"activation": F.gelu, "norm_first": True, "batch_first": True},
    "pre-norm, tanh gelu": {"activation": torch.nn.GELU("tanh"), "norm_first": True, "batch_first": True},
    "no bias": {"activation": "gelu", "bias": False, "batch_first": True},
    "another activation": {"activation": F.silu, "batch_first": True, "layer_norm_eps": 1e-3},
}


def pair(options, *, dropout=0.0, backend="auto", width=64):
    theirs = torch.nn.TransformerEncoderLayer(width, 2, 96, dropout, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return nn.TransformerEncoderLayer(width, 2, 96, dropout, **options, backend=backend), theirs


def source(options, batch=2, length=6):
    x = torch.randn(batch, length, 64, dtype=torch.float64)
    mask = torch.arange(length) >= torch.tensor([[length], [length - 2]])[:batch]
    return (x if options.get("batch_first") else x.transpose(0, 1)).clone().requires_grad_(), mask


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_computes_what_torch_does(name, training, backend, dtype, assert_same):
    ours, theirs = (layer.train(training) for layer in pair(LAYERS[name], backend=backend))
    src, mask = source(LAYERS[name])
    assert_same(ours, theirs, src, None, mask, dtype=dtype)


def test_eval_equals_torchs_inference_kernel():
    # Torch's kernel takes a tanh GELU for the exact one.
    for options in (options for name, options in LAYERS.items() if "tanh" not in name):
        ours, theirs = (layer.double().eval() for layer in pair(options, dropout=0.3))
        ours.load_state_dict(theirs.state_dict())
        src, mask = source(options)
        with torch.no_grad():
            # In torch's kernel padded rows hold what they like.
            out, expected = ours(src, None, mask), theirs(src, None, mask)
        valid = ~mask if options.get("batch_first") else ~mask.T
        torch.testing.assert_close(out[valid], expected[valid])


def test_unbatched(assert_same):
    ours, theirs = pair({"batch_first": True})
    assert_same(ours, theirs, source({"batch_first": True})[0].detach()[0].requires_grad_(), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        {"src_mask": torch.ones(6, 6).triu(1).bool()},
        {"src_mask": torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64), "is_causal": True},
        {"src_key_padding_mask": torch.randn(2, 6, dtype=torch.float64)},
    ],
    ids=["mask", "causal", "floating padding"],
)
@pytest.mark.parametrize("name", ["post-norm, gelu", "pre-norm, gelu"])
def test_masks_of_other_kinds_are_left_to_torch(name, call, training, assert_same):
    ours, theirs = (layer.double().train(training) for layer in pair(LAYERS[name]))
    src, _ = source(LAYERS[name])
    assert_same(ours, theirs, src, dtype=torch.float64, **call)
    expected = theirs(src, **call)
    with torch.no_grad():
        # Not torch's inference kernel, to which a floating padding mask is a bool one.
        torch.testing.assert_close(ours(src, **call), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_to_torch():
    ours, theirs = (layer.double().eval() for layer in pair(LAYERS["post-norm, gelu"]))
    ours.load_state_dict(theirs.state_dict())
    nested = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(5, 64)], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(nested).to_padded_tensor(0.0), theirs(nested).to_padded_tensor(0.0))


def test_weights_of_the_same_seed():
    made = []
    for kind in (torch.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer):
        torch.manual_seed(7)
        made.append((kind(64, 2, 96).state_dict(), torch.rand(1)))
    assert list(made[0][0]) == list(made[1][0]) and made[0][1] == made[1][1]
    assert all(torch.equal(a, b) for a, b in zip(made[0][0].values(), made[1][0].values(), strict=True))


def test_takes_the_fused_ops(monkeypatch):
    calls = []
    for name in ("attention", "dropout_add_layer_norm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name, **o: calls.append(name) or op(*a, **o))
    for training in (True, False):
        layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True).train(training)
        with torch.no_grad():
            layer(torch.randn(2, 3, 64), src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert calls == ["attention", "dropout_add_layer_norm", "dropout_add_layer_norm"] * 2


@needs_kernels
def test_takes_the_kernels(monkeypatch):
    calls, op = [], ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda *a, **o: calls.append(1) or op(*a, **o))
    layer = nn.TransformerEncoderLayer(64, 2, 96, activation="gelu", backend="triton").to(DEVICE)
    layer(torch.randn(3, 2, 64, device=DEVICE)).sum().backward()
    assert calls and all(p.grad.isfinite().all() for p in layer.parameters())


def test_dropout_is_of_the_layer():
    # Everything dropped: of a post-norm layer the two norms are left.
    layer = nn.TransformerEncoderLayer(64, 2, 96, dropout=1.0, batch_first=True)
    src = source({"batch_first": True})[0].detach().float()
    torch.testing.assert_close(layer(src), layer.norm2(layer.norm1(src)))
    layer.eval()
    assert not torch.allclose(layer(src), layer.norm2(layer.norm1(src)))
    # The one between the two linear layers alone.
    layer.train()
    layer.self_attn.dropout = layer.dropout1.p = layer.dropout2.p = 0.0
    norm1 = layer.norm1(src + layer.self_attn(src, src, src, need_weights=False)[0])
    torch.testing.assert_close(layer(src), layer.norm2(norm1 + layer.linear2.bias))


def test_replaced_and_hooked_modules_are_called():
    src = source({"batch_first": True})[0].detach().float()
    for name in ("linear1", "norm1", "norm2", "dropout1", "dropout2"):
        layer = nn.TransformerEncoderLayer(64, 2, 96, activation="gelu", batch_first=True, dropout=0.0)
        seen = []
        getattr(layer, name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        layer(src)
        assert seen, name
    layer = nn.TransformerEncoderLayer(64, 2, 96, activation="gelu", batch_first=True, dropout=0.0)
    expected = layer(src)
    layer.linear1 = torch.nn.Sequential(layer.linear1)
    torch.testing.assert_close(layer(src), expected)


def test_autocast_with_float32_parameters(run_module):
    ours, theirs = pair(LAYERS["post-norm, gelu"])
    ours.load_state_dict(theirs.state_dict())
    theirs.float()
    src, mask = source({"batch_first": True})
    src = src.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, truth = (run_module(layer, src, None, mask) for layer in (ours, theirs))
    for name, expected in truth.items():
        error = (found[name].float() - expected.float()).abs().max()
        assert error <= 0.05 * expected.abs().max().clamp_min(1.0), (name, error)


@needs_kernels
def test_autocast_with_float32_parameters_on_the_kernels(run_module):
    ours, theirs = pair(LAYERS["post-norm, gelu"], backend="triton")
    ours.to(DEVICE).load_state_dict(theirs.state_dict())
    src, mask = source({"batch_first": True})
    truth = run_module(theirs, src, None, mask)
    with torch.autocast(DEVICE, torch.float16):
        found = run_module(ours, src.detach().to(DEVICE, torch.float32).requires_grad_(), None, mask.to(DEVICE))
    for name, expected in truth.items():
        assert found[name].dtype == torch.float32
        error = (found[name].cpu() - expected).abs().max()
        assert error <= 0.01 * expected.abs().max().clamp_min(1.0), (name, error)


@pytest.mark.skipif(interpreted(), reason="the eager path")
def test_compiles_whole(run_module):
    ours = pair(LAYERS["post-norm, gelu"])[0].double()
    src, mask = source({"batch_first": True})
    plain = run_module(ours, src, None, mask)
    ours.compile(fullgraph=True, backend="aot_eager")
    for name, tensor in run_module(ours, src, None, mask).items():
        torch.testing.assert_close(tensor, plain[name], msg=name)


def test_backend_of_the_whole_layer():
    layer = nn.TransformerEncoderLayer(64, 2, 96, backend="eager")
    assert layer.self_attn.backend == "eager"
    layer.backend = "auto"
    copied = copy.deepcopy(layer)
    layer.backend = "eager"
    assert (layer.self_attn.backend, copied.backend, copied.self_attn.backend) == ("eager", "auto", "auto")
    assert "backend='eager'" in repr(layer)
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto"):
        nn.TransformerEncoderLayer(64, 2, backend="cuda")


def test_bad_input_is_named():
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True)
    with pytest.raises(ValueError, match=r"query: got shape \(2, 3, 32\)"):
        nn.TransformerEncoderLayer(64, 2, norm_first=False)(torch.zeros(2, 3, 32))
    with pytest.raises(TypeError, match=r"key_padding_mask: got torch\.int64"):
        layer(torch.zeros(2, 3, 64), src_key_padding_mask=torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("norm", [False, True])
def test_encoder_keeps_its_padding_mask(norm, assert_same, monkeypatch):
    ours, theirs = pair(LAYERS["post-norm, gelu"])
    norms = [torch.nn.LayerNorm(64, dtype=torch.float64) if norm else None for _ in range(2)]
    ours = nn.TransformerEncoder(ours, 2, norms[0])
    theirs = torch.nn.TransformerEncoder(theirs, 2, norms[1], enable_nested_tensor=False)
    src, mask = source({"batch_first": True})
    calls, op = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **o: calls.append(1) or op(*a, **o))
    assert_same(ours, theirs, src, None, mask, dtype=torch.float64)
    assert len(calls) == 2
    causal = torch.ones(6, 6).triu(1).bool()
    for call in ({"mask": causal}, {"src_key_padding_mask": torch.randn(2, 6, dtype=torch.float64)}, {}):
        assert_same(ours, theirs, src, dtype=torch.float64, **call)
    assert len(calls) == 4


def test_torchs_encoder_of_fused_layers(assert_same):
    layers = pair(LAYERS["post-norm, gelu"])
    ours, theirs = (torch.nn.TransformerEncoder(layer, 2) for layer in layers)
    src, mask = source({"batch_first": True})
    assert_same(ours, theirs, src, None, mask, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(src, None, mask), theirs.eval()(src, None, mask))
