"""``dropout_ids``: a row, or a sequence, keeps its dropout mask in any batch, at any place, on every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from op_testing import BACKENDS, DEVICE, KERNELS_RUN, run_in_interpreter
from sclkern import ops, reference
from sclkern.ops.dispatch import interpreted
from sclkern.random import STREAM_ATTENTION, STREAM_FEATURES, philox

# "auto" on a CPU takes forms of its own.
PATHS = [*BACKENDS, "auto"] if not KERNELS_RUN else BACKENDS
OPS = ["attention", "packed_attention", "cross_attention", "dropout_add_layer_norm"]
on_every_path = [(op, path) for op in OPS for path in PATHS]
# Where a sequence has several tokens, their number.
QUERIES, KEYS, SEED = 5, 9, 2**40 + 3
IDS = [7, 2**33, 0, 2**58 + 1]
every_op = pytest.mark.parametrize("op", OPS)


def arguments(op: str, count: int = 4) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors whose first dimension is that of the ids, and the other arguments."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    if op == "dropout_add_layer_norm":
        parameters = {name: normal(24) for name in ("weight", "bias", "x_bias")}
        return {"x": normal(count, 24), "residual": normal(count, 24)}, parameters
    if op == "cross_attention":
        weights = {"in_weight": normal(192, 64) / 8, "in_bias": normal(192)}
        weights |= {"out_weight": normal(64, 64) / 8, "out_bias": normal(64)}
        return {"x": normal(count, QUERIES, 64), "context": normal(count, KEYS, 64)}, weights | {"num_heads": 2}
    return {"query": normal(count, QUERIES, 2, 32)} | {n: normal(count, KEYS, 2, 32) for n in ("key", "value")}, {}


def call(op: str, sequences: dict[str, Tensor], others: dict[str, object], ids: Tensor | None, **options) -> Tensor:
    options = {"dropout_p": 0.4, "seed": SEED, "dropout_ids": ids} | options
    if op != "packed_attention":
        return getattr(ops, op)(**sequences, **others, **options)
    count = len(sequences["query"])
    ends = [torch.arange(count + 1, dtype=torch.int32, device=DEVICE) * length for length in (QUERIES, KEYS)]
    packed = [sequences[name].flatten(0, 1) for name in ("query", "key", "value")]
    return ops.packed_attention(*packed, *ends, QUERIES, KEYS, **options).unflatten(0, (count, QUERIES))


def both_passes(op: str, sequences: dict[str, Tensor], others: dict[str, object], ids: Tensor | None, **options):
    """The result and the gradients of the tensors of a sequence, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in sequences.items()}
    out = call(op, leaves, others, ids, **options)
    weight = torch.linspace(-1, 1, out[0].numel(), device=DEVICE).reshape(out[0].shape).expand(out.shape)
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, leaves.values(), weight), strict=True))


def at(results: dict[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    return {name: tensor[places] for name, tensor in results.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in theirs:
        # A product of another number of rows may sum in another order; a wrong mask differs by whole values.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=name)


def ids_of(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize(("op", "backend"), on_every_path)
def test_the_indices_are_the_default(op, backend):
    tensors, others = arguments(op)
    indices = torch.arange(4, device=DEVICE)
    ours, theirs = (both_passes(op, tensors, others, ids, backend=backend) for ids in (indices, None))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("op", "backend"), on_every_path)
def test_order_and_company_do_not_change_a_mask(op, backend):
    tensors, others = arguments(op)
    ids = ids_of(*IDS)
    whole = both_passes(op, tensors, others, ids, backend=backend)
    for places in ([2, 0, 3, 1], [0, 1], [2, 3], [3]):
        places = torch.tensor(places, device=DEVICE)
        part = both_passes(op, at(tensors, places), others, ids[places], backend=backend)
        assert_equal(part, at(whole, places))


@every_op
def test_every_path_drops_the_same(op):
    tensors, others = arguments(op)
    ids = ids_of(*IDS)
    paths = [both_passes(op, tensors, others, ids, backend=backend) for backend in PATHS]
    if op == "cross_attention":
        paths += [both_passes(op, tensors, others, ids, absorb=form) for form in ("never", "keys", "queries")]
    for results in paths:
        assert_equal(results, paths[0])
    assert not torch.allclose(paths[0]["out"], call(op, tensors, others, ids_of(8, *IDS[1:])), atol=1e-3)


@pytest.mark.parametrize("backend", PATHS)
def test_packed_and_padded_attention_have_equal_masks(backend):
    """Sequences of different lengths; an identity as the value shows the probabilities that are left."""
    ids, lengths, keys = ids_of(*IDS[:3]), [5, 0, 3], [9, 4, 7]
    torch.manual_seed(1)
    query, key = (torch.randn(3, length, 2, 32, device=DEVICE) for length in (5, 9))
    value = torch.eye(9, 32, device=DEVICE).view(1, 9, 1, 32).expand(3, -1, 2, -1)
    valid = [torch.arange(n, device=DEVICE) < ids_of(*of)[:, None] for n, of in ((5, lengths), (9, keys))]
    options = {"dropout_p": 0.4, "seed": SEED, "dropout_ids": ids, "backend": backend}
    padded = ops.attention(query, key, value, key_padding_mask=valid[1], **options)
    ends = [torch.tensor([0, *of], device=DEVICE).cumsum(0).int() for of in (lengths, keys)]
    packed = ops.packed_attention(query[valid[0]], key[valid[1]], value[valid[1]], *ends, 5, 9, **options)
    torch.testing.assert_close(packed, padded[valid[0]])
    assert torch.equal(packed == 0, padded[valid[0]] == 0)
    keep = reference.attention_dropout_mask(ids, 2, 5, 9, dropout_p=0.4, seed=SEED, device=DEVICE)
    kept = (padded[..., :9] != 0).transpose(1, 2)
    inside = (valid[0][:, :, None] & valid[1][:, None, :])[:, None]
    assert torch.equal(kept & inside, keep & inside)


@pytest.mark.parametrize("backend", PATHS)
def test_rows_of_several_dimensions_have_ids_of_several(backend):
    tensors, others = arguments("dropout_add_layer_norm", 6)
    ids = ids_of(5, 2**35, 1, 2**63 - 1, -4, 0)
    flat = both_passes("dropout_add_layer_norm", tensors, others, ids, backend=backend)
    folded = {name: tensor.view(2, 3, 24) for name, tensor in tensors.items()}
    for given_ids in (ids.view(2, 3), ids.view(2, 3).T.contiguous().T):
        found = call("dropout_add_layer_norm", folded, others, given_ids, backend=backend)
        assert_equal({"out": found.flatten(0, 1)}, {"out": flat["out"]})


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**62 - 1), min_size=2, max_size=4, unique=True), st.integers(-(2**63), 2**63 - 1))
def test_ids_have_masks_of_their_own(ids, seed):
    """Words, because short masks may be equal by chance; all counters of a launch differ."""
    rows = torch.tensor(ids)
    features = philox(seed, rows << 32, STREAM_FEATURES, last=rows >> 32)
    heads = (rows[:, None] * 2 + torch.arange(2)).flatten()
    attention = philox(seed, heads << 32, STREAM_ATTENTION, last=heads >> 32)
    for words, count in ((features, len(ids)), (attention, 2 * len(ids))):
        assert len(set(zip(*(word.tolist() for word in words), strict=True))) == count


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@every_op
def test_without_a_seed_one_is_drawn(op):
    tensors, others = arguments(op)
    ids = ids_of(1, 1, 2, 3)
    tensors = {name: torch.cat([t[:1], t[:1], t[2:]]) for name, t in tensors.items()}
    torch.manual_seed(5)
    first = call(op, tensors, others, ids, seed=None)
    second = call(op, tensors, others, ids, seed=None)
    torch.manual_seed(5)
    assert torch.equal(call(op, tensors, others, ids, seed=None), first) and not torch.equal(first, second)
    # Equal sequences of one id.
    torch.testing.assert_close(first[0], first[1])


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@every_op
def test_without_dropout_ids_change_nothing(op):
    tensors, others = arguments(op)
    state = torch.get_rng_state()
    out = call(op, tensors, others, ids_of(*IDS), dropout_p=0.0, seed=None)
    assert torch.equal(out, call(op, tensors, others, None, dropout_p=0.0, seed=None))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@every_op
def test_second_derivatives(op):
    tensors, others = arguments(op, 2)
    kept = [name for name in tensors if name not in ("value", "residual")]
    double = {name: tensor.double() for name, tensor in tensors.items()}
    others = {name: value.double() if isinstance(value, Tensor) else value for name, value in others.items()}
    leaves = [double[name].requires_grad_() for name in kept]

    def function(*values):
        return call(op, double | dict(zip(kept, values, strict=True)), others, ids_of(4, 2**40), backend="eager")

    torch.autograd.gradcheck(function, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@pytest.mark.parametrize(
    ("op", "mapped"),
    # On a CPU packed attention reads lengths, which vmap does not let it.
    [(op, mapped) for op in OPS for mapped in (False, True) if not (mapped and op == "packed_attention")],
)
def test_is_compiled_and_vmapped(op, mapped):
    tensors, others = arguments(op)
    ids = ids_of(*IDS)

    def function(values, ids):
        return call(op, values, others, ids)

    expected = function(tensors, ids)
    if not mapped:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tensors, ids), expected, rtol=1e-4, atol=2e-5)
        return
    pairs = {name: tensor.unflatten(0, (2, 2)) for name, tensor in tensors.items()}
    found = torch.vmap(function)(pairs, ids.view(2, 2))
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
@every_op
def test_ids_on_another_device_are_refused(op):
    tensors, others = arguments(op)
    with pytest.raises(ValueError, match="dropout_ids: got device meta, expected that of"):
        call(op, tensors, others, torch.empty(4, dtype=torch.int64, device="meta"))


def test_in_the_interpreter():
    run_in_interpreter(__file__)
