"""Attention by flash-attn: what ops and network compute with a stand-in of its functions, and what is refused."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import stand_ins
from sclkern import ObjectiveConfig, ops
from sclkern.libraries import flash
from sclkern.models import attention as model_attention
from sclkern.step import StepConfig
from step_testing import assert_same, masks_of, run

DOUBLE = torch.float64
ENDS_Q, ENDS_K = [0, 3, 3, 8], [0, 2, 6, 6]


@pytest.fixture
def installed(monkeypatch):
    stand_ins.install(monkeypatch)


def heads(*shape, dtype=DOUBLE):
    # As the network makes them: views of one product.
    return [t.unflatten(-1, (2, 8)).requires_grad_() for t in torch.randn(*shape, 48, dtype=dtype).chunk(3, -1)]


def gradients(function, *tensors):
    torch.manual_seed(3)
    out = function(*tensors)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(4))
    return out, *torch.autograd.grad((out * weight).sum(), tensors)


def assert_equal(ours, theirs):
    for name, a, b in zip(("out", "query", "key", "value"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_padded(installed, masked, scale):
    query, _, _ = heads(3, 5)
    _, key, value = heads(3, 4)
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4]) if masked else None
    if masked:
        key.data[0, 1] = torch.nan
    options = {"key_padding_mask": mask, "softmax_scale": scale}
    ours = gradients(lambda *t: ops.attention(*t, **options, backend="flash"), query, key, value)
    assert_equal(ours, gradients(lambda *t: ops.attention(*t, **options, backend="eager"), query, key, value))
    assert [call[0] for call in stand_ins.calls] == ["flash_attn_varlen_func" if masked else "flash_attn_func"]


@pytest.mark.parametrize("tail", [0, 3])
def test_packed(installed, tail):
    """Sequences without queries, without keys, and tokens behind the last end, of which the library writes nothing."""
    query, _, _ = heads(8 + tail)
    _, key, value = heads(6 + tail)
    lengths = torch.tensor(ENDS_Q, dtype=torch.int32), torch.tensor(ENDS_K, dtype=torch.int32), 5, 4
    ours = gradients(lambda *t: ops.packed_attention(*t, *lengths, backend="flash"), query, key, value)
    assert_equal(ours, gradients(lambda *t: ops.packed_attention(*t, *lengths, backend="eager"), query, key, value))
    assert len(stand_ins.calls) == 1


@pytest.mark.parametrize(("frames", "calls"), [(1, 1), (3, 2), (6, 1)])
def test_frames(installed, frames, calls):
    query, key, value = heads(2, 6)
    ours = gradients(lambda *t: ops.frame_attention(*t, frames, backend="flash"), query, key, value)
    assert_equal(ours, gradients(lambda *t: ops.frame_attention(*t, frames, backend="eager"), query, key, value))
    assert [call[0] for call in stand_ins.calls] == ["flash_attn_func"] * calls


def test_dropout_is_drawn_by_the_library_from_torchs_generator(installed):
    query, key, value = heads(2, 40)
    value = torch.ones_like(value)

    def attend(seed):
        torch.manual_seed(seed)
        return ops.attention(query, key, value, dropout_p=0.25, backend="flash")

    assert torch.equal(attend(0), attend(0)) and not torch.equal(attend(0), attend(1))
    assert attend(0).mean().item() == pytest.approx(1, abs=0.05)
    assert {call[1] for call in stand_ins.calls} == {0.25}


def test_the_backward_is_deterministic_where_torch_is_told_to_be(installed):
    query, key, value = heads(2, 4)
    mask = torch.tensor([[True] * 4, [True, False, True, True]])
    ops.attention(query, key, value, backend="flash")
    torch.use_deterministic_algorithms(True)
    try:
        ops.attention(query, key, value, backend="flash")
        ops.attention(query, key, value, key_padding_mask=mask, backend="flash")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call[2] for call in stand_ins.calls] == [False, True, True]


def test_explain_says_so(installed):
    query, key, value = heads(2, 4)
    choice = ops.explain("attention", query, key, value, backend="flash")
    assert (choice.path, choice.backend) == ("flash", "flash") and choice.reasons == ("flash-attn 2.8.3.post2",)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_an_empty_call_is_the_definitions(installed, batch, queries, keys):
    query, _, _ = heads(batch, queries)
    _, key, value = heads(batch, keys)
    choice = ops.explain("attention", query, key, value, backend="flash")
    assert choice.path == "eager" and choice.reasons == ("no queries or no keys",)
    out = ops.attention(query, key, value, backend="flash")
    assert out.shape == query.shape and not out.any() and stand_ins.calls == []
    lengths = (torch.zeros(batch + 1, dtype=torch.int32) for _ in range(2))
    packed = (t.flatten(0, 1) for t in (query, key, value))
    out = ops.packed_attention(*packed, *lengths, queries, keys, backend="flash")
    assert not out.any() and (batch == 0 or 0 in (queries, keys)) and stand_ins.calls == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 1.0}, "dropout_p 1.0, flash-attn expects it below 1"),
        (
            {"dropout_p": 0.1, "seed": 3},
            "seed or dropout_ids, whose dropout mask flash-attn cannot draw: leave them out",
        ),
        ({"dropout_p": 0.1, "dropout_ids": torch.arange(2)}, "cannot draw: leave them out"),
        ({"return_lse": True}, "return_lse, which flash-attn has for tests only: leave it out"),
        ({"softmax_scale": -1.0}, "softmax_scale -1.0, flash-attn expects it above 0"),
    ],
)
def test_what_it_does_not_have_is_refused(installed, options, reason):
    with pytest.raises(ValueError, match=r"backend='flash': cannot run: ") as error:
        ops.attention(*heads(2, 4), **options, backend="flash")
    assert str(error.value).endswith(reason) and stand_ins.calls == []


def test_a_head_of_more_than_256_channels_is_refused(installed):
    query, key, value = torch.randn(3, 1, 2, 1, 264).unbind(0)
    with pytest.raises(ValueError, match="head dim 264, flash-attn computes at most 256"):
        ops.attention(query, key, value, backend="flash")


def test_other_ops_do_not_know_it(installed):
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="backend: got 'flash', expected one of auto, triton, eager"):
        ops.bias_gelu(x, x[0], backend="flash")


def test_devices_and_dtypes_are_refused(installed, monkeypatch):
    monkeypatch.setattr(flash, "DTYPES", {torch.float16})
    with pytest.raises(
        ValueError, match=r"float32 tensors, flash-attn computes float16 and bfloat16: cast them, or use"
    ):
        ops.attention(*heads(2, 4, dtype=torch.float32), backend="flash")
    monkeypatch.setattr(flash, "DEVICE_TYPES", {"cuda"})
    with pytest.raises(ValueError, match=r"tensors on cpu, flash-attn needs a CUDA GPU"):
        ops.attention(*heads(2, 4, dtype=torch.float16), backend="flash")


def test_old_gpus_are_refused(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    assert flash.problems(torch.device("cuda")) == ("T4 is older than Ampere, which flash-attn needs",)


def old(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """As of version 2.0."""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "flash-attn is not installed: install flash-attn 2.8 or later (the extra flash)"),
        ({}, "flash-attn is installed, but flash_attn.flash_attn_func does not load (AttributeError: "),
        ({"flash_attn_func": old}, "flash-attn is too old, its flash_attn_func has no argument deterministic: install"),
    ],
)
def test_a_library_that_is_missing_or_old_is_refused(monkeypatch, make_model, module, message):
    stand_ins.look_again(monkeypatch)
    theirs = None if module is None else ModuleType("flash_attn")
    if theirs is not None:
        theirs.__dict__.update(module)
    monkeypatch.setitem(sys.modules, "flash_attn", theirs)
    with pytest.raises(ValueError) as error:
        make_model().set_backend("flash")
    assert str(error.value).startswith(f"backend: got 'flash', but {message}")


def plain(q, k, v, dropout_p=0.0, softmax_scale=None, deterministic=False):
    """A function that torch.compile can look into; the library has custom ops."""
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, dropout_p=dropout_p, scale=softmax_scale).transpose(1, 2)


def first_sequence(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    deterministic=False,
):  # fmt: skip
    return torch.cat([plain(q[None, :4], k[None, :4], v[None, :4], softmax_scale=softmax_scale)[0], q[4:]])


def test_compiled_code_looks_for_it_too(installed, monkeypatch):
    module = sys.modules["flash_attn"]
    monkeypatch.setattr(module, "flash_attn_func", plain)
    monkeypatch.setattr(module, "flash_attn_varlen_func", first_sequence)
    query, key, value = heads(1, 4)
    lengths = *(torch.tensor([0, 4], dtype=torch.int32) for _ in range(2)), 4, 4

    def attend(query, key, value):
        packed = (t.flatten(0, 1) for t in (query, key, value))
        return ops.attention(query, key, value, backend="flash"), ops.packed_attention(
            *packed, *lengths, backend="flash"
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(query, key, value)
    expected = ops.attention(query, key, value, backend="eager")
    torch.testing.assert_close(compiled[0], expected)
    torch.testing.assert_close(compiled[1][None], expected)


# -- the network -------------------------------------------------------------------------------------------------------


def test_autocast_reaches_it(installed, monkeypatch, make_model, make_batch):
    monkeypatch.setattr(flash, "DTYPES", {torch.bfloat16})
    model, batch = make_model(dtype=torch.float32).set_backend("flash"), make_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch, seed=0).total.backward()
    assert stand_ins.calls


def test_other_dtypes_take_the_ops_own_and_are_reported_once(installed, monkeypatch, make_model, make_batch, caplog):
    monkeypatch.setattr(flash, "DTYPES", {torch.bfloat16})
    monkeypatch.setattr(model_attention, "_reported", set())
    model, batch = make_model().set_backend("flash"), make_batch()
    model.step = StepConfig(absorb="never")
    losses = [model(batch, seed=0).total for _ in range(2)]
    assert stand_ins.calls == [] and torch.equal(losses[0], model.set_backend("auto")(batch, seed=0).total)
    expected = "attention of torch.float64 tensors takes the backend auto: flash-attn computes float16 and bfloat16"
    assert [record.getMessage() for record in caplog.records] == [expected]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frames", [None, 3])
def test_the_step_equals_that_of_other_backends(installed, make_model, make_batch, frames, packed):
    model, batch = make_model(ObjectiveConfig(), max_frames=frames or 0), make_batch(frames=frames)
    model.step = StepConfig(pack=packed)
    masks = masks_of(model, batch, 5)
    expected = run(model.set_backend("sdpa" if not packed else "eager"), batch, masks)
    assert_same(run(model.set_backend("flash"), batch, masks), expected)
    assert stand_ins.calls and {call[1] for call in stand_ins.calls} == {0.0}


@pytest.mark.parametrize("rows", [0, 4])
def test_room_that_no_token_fills_leaks_nothing(installed, make_model, make_batch, rows):
    """Captions of 5 tokens in room for 9; and a batch without rows."""
    batch = make_batch(4, lengths=[5, 5, 5, 5], width=9, false_image=True)
    batch = {name: value[:rows] for name, value in batch.items()}
    model = make_model(ObjectiveConfig("glscl", itm_negatives="dataset")).set_backend("flash")
    losses = model(batch, seed=0)
    losses.total.backward()
    torch.testing.assert_close(losses.total, model.set_backend("eager")(batch, seed=0).total)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert bool(stand_ins.calls) == (rows > 0)


def test_recomputed_blocks_draw_the_same_dropout(installed, make_model, make_batch):
    batch = make_batch()
    results = []
    for checkpointed in (False, True):
        model = make_model(dropout=0.3).train().set_backend("flash")
        model.step = StepConfig(checkpoint_blocks=checkpointed)
        masks = masks_of(model, batch, 5)
        torch.manual_seed(7)
        results.append(run(model, batch, masks))
    assert_same(*results)
    assert 0.3 in {call[1] for call in stand_ins.calls}


def test_recorded_probabilities_take_the_eager_path(installed, make_model, make_batch):
    model, batch = make_model().set_backend("flash"), make_batch()
    ids, mask = batch["text_ids"], batch["text_mask"]
    features = model.encode_text(ids, mask), model.encode_image(batch["image"])
    stand_ins.calls.clear()
    model.run_fusion(features[0], mask, features[1], return_attention=True)
    assert stand_ins.calls == []


def test_a_network_on_a_cpu_is_refused(installed, monkeypatch, make_model, make_batch):
    monkeypatch.setattr(flash, "DEVICE_TYPES", {"cuda"})
    with pytest.raises(ValueError, match="backend='flash': cannot run: tensors on cpu, flash-attn needs a CUDA GPU"):
        make_model().set_backend("flash")(make_batch(), seed=0)
