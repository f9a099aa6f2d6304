"""``nn.MultiheadAttention`` against torch's with the same weights."""

import copy

import pytest
import torch

from op_testing import DEVICE, needs_kernels
from sclkern import nn
from sclkern.ops.dispatch import interpreted

FORMS = {
    "self": (7, None, False),
    "cross, few keys": (9, 3, False),
    "cross, few queries": (2, 40, False),
    "cross": (20, 24, False),
    "separate": (5, 6, True),
}
LAYOUTS = ["batch first", "sequence first", "unbatched"]


def pair(heads=2, width=64, **options):
    backend = options.pop("backend", "auto")
    theirs = torch.nn.MultiheadAttention(width, heads, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return nn.MultiheadAttention(width, heads, **options, backend=backend), theirs


def tensors(form, layout="batch first", masked=True, width=64, kdim=None, vdim=None, batch=2):
    queries, keys, separate = FORMS[form]

    def make(length, channels):
        x = torch.randn(batch, length, channels, dtype=torch.float64)
        x = {"batch first": x, "sequence first": x.transpose(0, 1), "unbatched": x[0]}[layout]
        return x.clone().requires_grad_()

    query = make(queries, width)
    key = query if keys is None else make(keys, kdim or width)
    value = make(keys, vdim or width) if separate else key
    mask = None
    if masked:
        mask = torch.arange(keys or queries) >= torch.tensor([[2], [keys or queries]])[:batch]
        mask = mask[0] if layout == "unbatched" else mask
    return query, key, value, mask


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_computes_what_torch_does(form, layout, backend, dtype, assert_same):
    ours, theirs = pair(batch_first=layout == "batch first", backend=backend)
    assert_same(ours, theirs, *tensors(form, layout, masked=layout != "unbatched"), dtype=dtype, need_weights=False)


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"kdim": 40, "vdim": 24}, {"kdim": 40, "vdim": 24, "bias": False}],
    ids=["no bias", "other widths", "both"],
)
def test_projections_of_every_kind(options, backend, dtype, assert_same):
    ours, theirs = pair(**options, batch_first=True, backend=backend)
    widths = {name: options[name] for name in ("kdim", "vdim") if name in options}
    assert_same(ours, theirs, *tensors("separate", **widths), dtype=dtype, need_weights=False)


def test_heads_without_a_kernel_are_eager(assert_same):
    ours, theirs = pair(heads=4, batch_first=True)
    query = tensors("self")[0]
    assert_same(ours, theirs, query, query, query, dtype=torch.float64, need_weights=False)
    assert ours.explain(query, query, query, need_weights=False).startswith("eager: head dim 16 has no kernel")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "call", "reason"),
    [
        ({}, {}, "need_weights requests attention maps"),
        ({}, {"average_attn_weights": False}, "need_weights requests attention maps"),
        (
            {},
            {"need_weights": False, "attn_mask": torch.ones(7, 7).triu(1).bool()},
            "attn_mask is given",
        ),
        (
            {},
            {"need_weights": False, "is_causal": True, "attn_mask": torch.ones(7, 7).triu(1).bool()},
            "attn_mask is given",
        ),
        ({}, {"need_weights": False, "key_padding_mask": torch.randn(2, 7).double()}, "key_padding_mask is floating"),
        ({"add_bias_kv": True}, {"need_weights": False}, "add_bias_kv"),
        ({"add_zero_attn": True}, {"need_weights": False}, "add_zero_attn"),
    ],
)
def test_what_the_op_cannot_do_is_left_to_torch(options, call, reason, training, assert_same):
    ours, theirs = (module.double().train(training) for module in pair(**options, batch_first=True))
    query = tensors("self", masked=False)[0]
    assert_same(ours, theirs, query, query, query, dtype=torch.float64, **call)
    with torch.no_grad():
        for a, b in zip(ours(query, query, query, **call), theirs(query, query, query, **call), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert ours.explain(query, query, query, **call).startswith(f"torch: {reason}")


def test_a_causal_hint_without_a_mask_gets_torchs_own_error():
    ours, _ = pair(batch_first=True)
    query = tensors("self")[0].float()
    explained = ours.explain(query, query, query, need_weights=False, is_causal=True)
    assert explained == "torch: is_causal requests a causal mask"
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(query, query, query, need_weights=False, is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_to_torch():
    ours, _ = pair(batch_first=True)
    ours.double().eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(5, 64)], dtype=torch.float64)
    assert ours.explain(nested, nested, nested, need_weights=False) == "torch: nested tensors"
    with torch.no_grad():
        out = ours(nested, nested, nested, need_weights=False)[0]
        alone = ours(nested[0], nested[0], nested[0], need_weights=False)[0]
    torch.testing.assert_close(out[0], alone)


@needs_kernels
def test_explains_the_kernel():
    module = nn.MultiheadAttention(64, 2, batch_first=True).to(DEVICE)
    query, key, _, mask = (t.to(DEVICE) for t in tensors("cross"))
    query, key = query.float(), key.float()
    assert module.explain(query, query, query, need_weights=False).startswith("triton: ")
    assert module.explain(query, key, key, mask, need_weights=False).startswith("triton: ")
    assert "requested by backend" in nn.MultiheadAttention(64, 2, batch_first=True, backend="eager").to(DEVICE).explain(
        query, key, key, need_weights=False
    )


def test_explains_absorbed_projections():
    module = nn.MultiheadAttention(64, 2, batch_first=True, dtype=torch.float64)
    query, key, value, _ = tensors("cross, few queries")
    assert module.explain(query, key, value, need_weights=False).endswith(
        "absorbed into the 2 queries: 0.15 of the plain multiply-adds"
    )


@pytest.mark.parametrize("form", ["self", "cross", "separate"])
def test_a_query_without_a_valid_key_gets_the_bias(form, backend, dtype, run_module):
    ours = pair(batch_first=True, backend=backend)[0].to(DEVICE, dtype)
    query, key, value, mask = tensors(form)
    made = {id(t): t.detach().to(DEVICE, dtype).requires_grad_() for t in (query, key, value)}
    mask = mask.to(DEVICE)
    mask[0] = True
    found = run_module(ours, *(made[id(t)] for t in (query, key, value)), mask, need_weights=False)
    assert all(tensor.isfinite().all() for tensor in found.values())
    torch.testing.assert_close(found["out"][0], ours.out_proj.bias.detach().expand_as(found["out"][0]))
    assert not found["input 0"][0].any()


@pytest.mark.parametrize("form", ["cross", "separate"])
def test_dropout_is_off_in_eval_and_right_on_average_in_training(form, backend, dtype):
    ours, theirs = pair(batch_first=True, dropout=0.4, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    ours.to(DEVICE, dtype).eval(), theirs.eval()
    # The mask of each query is its own: as many equal queries as samples are wanted.
    query, key, value, _ = (t.detach()[:1] for t in tensors(form))
    query = query[:, :1].expand(-1, 512, -1)
    inputs = [t.to(DEVICE, dtype) for t in (query, key, value)]
    if form == "cross":
        value, inputs[2] = key, inputs[1]
    with torch.no_grad():
        expected = theirs(query, key, value, need_weights=False)[0]
        out = ours(*inputs, need_weights=False)[0]
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
        out = ours.train()(*inputs, need_weights=False)[0][0].cpu().double()
    deviation = out.std(0) / 512**0.5
    assert (deviation > 0).all() and ((out.mean(0) - expected[0, 0]).abs() <= 5 * deviation).all()


def test_dropout_repeats_with_torchs_seed(backend, dtype):
    module = nn.MultiheadAttention(64, 2, 0.5, batch_first=True, backend=backend).to(DEVICE, dtype)
    query = tensors("self")[0].detach().to(DEVICE, dtype)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(module(query, query, query, need_weights=False)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("form", ["self", "cross", "separate"])
def test_ids_key_the_dropout(form, backend, dtype):
    module = nn.MultiheadAttention(64, 2, dropout=0.5, batch_first=True, backend=backend, device=DEVICE, dtype=dtype)
    query, context, value = torch.randn(3, 4, 5, 64, device=DEVICE, dtype=dtype)
    key, value = {"self": (query, query), "cross": (context, context), "separate": (context, value)}[form]
    inputs, ids = {"query": query, "key": key, "value": value}, torch.tensor([5, 2**40, 1, 0], device=DEVICE)

    def attend(rows):
        torch.manual_seed(1)
        some = {id(tensor): tensor[rows] for tensor in inputs.values()}
        chosen = {name: some[id(tensor)] for name, tensor in inputs.items()}
        return module(**chosen, need_weights=False, dropout_ids=ids[rows])[0]

    torch.testing.assert_close(attend(slice(2, 4)), attend(slice(0, 4))[2:])
    with pytest.raises(ValueError, match="dropout_ids: torch computes this, because need_weights"):
        module(**inputs, dropout_ids=ids)


@pytest.mark.parametrize("form", ["self", "cross"])
def test_autocast_with_float32_parameters(form, run_module):
    ours, theirs = pair(batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    theirs.float()
    query, key, value, mask = tensors(form)
    made = {id(t): t.detach().float().requires_grad_() for t in (query, key, value)}
    inputs = [made[id(t)] for t in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        found, truth = (run_module(m, *inputs, mask, need_weights=False) for m in (ours, theirs))
    for name, expected in truth.items():
        assert found[name].dtype == expected.dtype
        error = (found[name] - expected).abs().max()
        assert error <= 0.03 * expected.abs().max().clamp_min(1.0), (name, error)


@pytest.mark.skipif(interpreted(), reason="the eager path")
@pytest.mark.parametrize("form", ["self", "cross"])
def test_compiles_whole(form, run_module):
    ours = pair(batch_first=True)[0].double()
    inputs = *tensors(form)[:3], None, False
    plain = run_module(ours, *inputs)
    ours.compile(fullgraph=True, backend="aot_eager")
    for name, tensor in run_module(ours, *inputs).items():
        torch.testing.assert_close(tensor, plain[name], msg=name)


def test_copies_and_names():
    ours, theirs = pair(add_bias_kv=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours = nn.MultiheadAttention(64, 2, 0.1, batch_first=True, backend="eager")
    copied = copy.deepcopy(ours)
    assert (copied.backend, copied.dropout, copied.batch_first) == ("eager", 0.1, True)
    assert copied.in_proj_weight is not ours.in_proj_weight
    assert "embed_dim=64, num_heads=2, dropout=0.1, batch_first=True, backend='eager'" in repr(ours)


@pytest.mark.parametrize(
    ("shapes", "mask", "error", "message"),
    [
        ([(2, 3, 32)] * 3, None, ValueError, r"query: got shape \(2, 3, 32\), expected \(B, Lq, E\).* E = 64"),
        ([(64,)] * 3, None, ValueError, "query: got shape"),
        (
            [(2, 3, 64), (3, 4, 64), (3, 4, 64)],
            None,
            ValueError,
            r"key: got shape \(3, 4, 64\), expected \(2, Lk, 64\)",
        ),
        ([(2, 3, 64), (2, 4, 64), (2, 5, 64)], None, ValueError, r"value: got shape \(2, 5, 64\)"),
        ([(2, 3, 64), (4, 64), (4, 64)], None, ValueError, r"key: got shape \(4, 64\)"),
        (
            [(2, 3, 64)] * 3,
            torch.zeros(3, 2, dtype=torch.bool),
            ValueError,
            r"key_padding_mask: got shape \(3, 2\), expected \(2, 3\)",
        ),
        (
            [(2, 3, 64)] * 3,
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            r"key_padding_mask: got torch\.int64, expected torch\.bool, True = ignore",
        ),
    ],
)
def test_bad_input_is_named(shapes, mask, error, message):
    module = nn.MultiheadAttention(64, 2, batch_first=True)
    inputs = [torch.zeros(shape) for shape in shapes]
    for call in (module, module.explain):
        with pytest.raises(error, match=message):
            call(*inputs, mask, need_weights=False)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto"):
        nn.MultiheadAttention(64, 2, backend="cuda")
