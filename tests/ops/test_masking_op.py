"""The masking ops: every backend draws the numbers of ``sclkern.reference.masking``, tested in test_masking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from op_testing import BACKENDS, DEVICE, KERNELS_RUN, needs_kernels, run_in_interpreter
from sclkern import ops, random, reference

SIZES = [1, 2, 17, 64, 65, 324, 577]
RATIOS = [0.0, 1 - 0.8, 0.999]
KINDS = [("mlm", False), ("mlm", True), ("completion", False), ("completion", True)]
TEXT = {"mask_id": 119, "vocab_size": 120}
RAGGED = [0, 2, 3, 20]


def captions(lengths=RAGGED, width=20):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 119, (len(lengths), width), generator=generator).to(DEVICE)
    return ids, torch.tensor(lengths, dtype=torch.int64, device=DEVICE)


def assert_text_is_that_of_the_reference(ids, lengths, **options):
    ours = ops.mask_text(ids, lengths, **(TEXT | options), backend="triton")
    # On the CPU, so that a GPU is held to the CPU's masks.
    options["seed"] = options["seed"].cpu() if torch.is_tensor(options["seed"]) else options["seed"]
    truth = reference.mask_text(ids.cpu(), lengths.cpu(), **(TEXT | options))
    assert ours.ids.dtype == torch.int64 and ours.selected.dtype == torch.bool
    assert torch.equal(ours.ids.cpu(), truth.ids), options
    assert torch.equal(ours.selected.cpu(), truth.selected), options


@needs_kernels
@pytest.mark.parametrize("patches", SIZES)
def test_kernels_select_what_the_reference_selects(patches):
    for seed, ratio in enumerate(RATIOS):
        for ours, truth in (
            (ops.select_patches, reference.select_patches),
            (ops.select_tokens, reference.select_tokens),
        ):
            chosen = ours(patches, ratio, 2, seed=seed - 2, device=DEVICE, backend="triton")
            expected = truth(patches, ratio, 2, seed=seed - 2)
            assert chosen.dtype == expected.dtype and torch.equal(chosen.cpu(), expected), (seed, ratio)


@needs_kernels
@pytest.mark.parametrize(("kind", "published"), KINDS)
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_kernel_masks_the_tokens_that_the_reference_masks(kind, published, ratio):
    ids, lengths = captions()
    for seed in (3, torch.tensor([2**62 + 5], device=DEVICE)):
        assert_text_is_that_of_the_reference(ids, lengths, kind=kind, published=published, ratio=ratio, seed=seed)


@needs_kernels
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    more=st.integers(0, 30),
    ratio=st.sampled_from([0.1, 0.15, 0.3, 0.5, 0.7, 0.9]),
    seed=st.integers(-(2**63), 2**64 - 1),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=8, deadline=None)
def test_kernel_masks_any_caption_as_the_reference(lengths, more, ratio, seed, kind):
    ids, lengths = captions(lengths, max(lengths) + more)
    assert_text_is_that_of_the_reference(ids, lengths, kind=kind[0], published=kind[1], ratio=ratio, seed=seed)


@needs_kernels
@pytest.mark.parametrize("ratio", [0.15, 1 - 0.9])
def test_counts_are_those_of_python_floats(ratio):
    words = [1, 5, 10, 20, 30]
    ids, lengths = captions([n + 2 for n in words], 33)
    count = {
        kind: ops.mask_text(ids, lengths, kind=kind, ratio=ratio, **TEXT, seed=0, backend="triton").selected.sum(1)
        for kind in ("mlm", "completion")
    }
    assert count["mlm"].tolist() == [max(1, int(ratio * n + 0.5)) for n in words]
    assert count["completion"].tolist() == [int(n * ratio) + 1 for n in words]


if KERNELS_RUN:
    import triton
    import triton.language as tl

    from sclkern.kernels.masking import smallest

    @triton.jit
    def smallest_kernel(words_ptr, eligible_ptr, out_ptr, count, BLOCK: tl.constexpr):  # noqa: N803
        column = tl.arange(0, BLOCK)
        chosen = smallest(tl.load(words_ptr + column), tl.load(eligible_ptr + column) != 0, count)
        tl.store(out_ptr + column, chosen)


@needs_kernels
@pytest.mark.parametrize("values", [[0], [5], [0, 2**32 - 1], [2**31 - 1, 2**31, 7], [1, 2, 3, 4, 5, 6, 7, 8]], ids=str)
def test_ties_are_settled_by_position(values):
    generator = torch.Generator().manual_seed(1)
    words = torch.tensor(values)[torch.randint(len(values), (32,), generator=generator)]
    eligible = torch.rand(32, generator=generator) < 0.7
    for count in (0, 1, 5, 20, 40):
        out = torch.zeros(32, dtype=torch.bool, device=DEVICE)
        smallest_kernel[(1,)](words.to(DEVICE), eligible.to(DEVICE), out, count, BLOCK=32)
        assert torch.equal(out.cpu(), random.smallest(words[None], eligible[None], count)[0]), count


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_is_an_integer_or_a_tensor(backend):
    for select in (ops.select_patches, ops.select_tokens):
        options = {"device": DEVICE, "backend": backend}
        first = select(20, 0.5, 2, seed=2**64 - 3, **options)
        assert torch.equal(first, select(20, 0.5, 2, seed=torch.tensor(-3, device=DEVICE), **options))
        assert not torch.equal(first, select(20, 0.5, 2, seed=-4, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_and_captions(backend):
    assert ops.select_patches(9, 0.5, 0, seed=0, device=DEVICE, backend=backend).shape == (0, 4)
    assert ops.select_tokens(9, 0.5, 0, seed=0, device=DEVICE, backend=backend).shape == (0, 9)
    for rows, width in ((0, 5), (2, 0), (2, 1)):
        ids, lengths = captions([0] * rows, width)
        for kind, published in KINDS:
            options = TEXT | {"kind": kind, "ratio": 0.4, "published": published, "seed": 0}
            masked = ops.mask_text(ids, lengths, **options, backend=backend)
            assert torch.equal(masked.ids, ids) and not masked.selected.any()


@needs_kernels
def test_ids_and_lengths_of_any_strides():
    ids, lengths = captions()
    base = torch.full((20, 9), 3, device=DEVICE)
    base[:, 1::2] = ids.T
    for view in (base.T[1::2], ids[:1].expand(4, -1), torch.cat([ids, ids], 1)[:, 20:]):
        spread = lengths.repeat_interleave(2)[::2]
        assert_text_is_that_of_the_reference(view, spread, kind="mlm", ratio=0.4, seed=1)


def test_rows_too_wide_for_the_kernel_take_the_eager_path():
    assert ops.select_patches(4097, 0.001, 1, seed=0, device=DEVICE).shape == (1, 4)
    with pytest.raises(ValueError, match=r"cannot run: rows of 4097 patches, the kernel holds at most 4096"):
        ops.select_tokens(4097, 0.5, 1, seed=0, device=DEVICE, backend="triton")
    ids, lengths = captions([9], 1025)
    with pytest.raises(ValueError, match=r"cannot run: rows of 1025 tokens, the kernel holds at most 1024"):
        ops.mask_text(ids, lengths, kind="mlm", ratio=0.5, **TEXT, seed=0, backend="triton")


def test_registration():
    seed = torch.tensor([3], device=DEVICE)
    torch.library.opcheck(torch.ops.sclkern.select_patches, (seed, 9, 0.5, 2, torch.tensor([4, 1], device=DEVICE)))
    torch.library.opcheck(torch.ops.sclkern.select_tokens, (seed, 9, 0.5, 2, torch.tensor([4, 1], device=DEVICE)))
    for kind, published in KINDS[::3]:
        arguments = (*captions([3, 9], 9), seed, kind == "completion", 0.4, 119, 120, published, None)
        torch.library.opcheck(torch.ops.sclkern.mask_text, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, dynamic):
    ids, lengths = captions([3, 9], 9)
    seed = torch.tensor([3], device=DEVICE)

    def draw(ids, lengths, seed):
        keep = ops.select_patches(16, 0.4, ids.shape[0], seed=seed, device=ids.device, backend=backend)
        replace = ops.select_tokens(16, 0.4, ids.shape[0], seed=seed, device=ids.device, backend=backend)
        text = ops.mask_text(ids, lengths, kind="mlm", ratio=0.4, **TEXT, seed=seed, backend=backend)
        return keep, replace, text.ids, text.selected

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ours, truth in zip(compiled(ids, lengths, seed), draw(ids, lengths, seed), strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
def test_a_captured_graph_is_replayed_with_another_seed():
    seed = torch.tensor([3], device=DEVICE)
    ops.select_patches(324, 0.2, 4, seed=seed, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = ops.select_patches(324, 0.2, 4, seed=seed, device=DEVICE)
    seed.fill_(4)
    graph.replay()
    assert torch.equal(keep.cpu(), reference.select_patches(324, 0.2, 4, seed=4))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_patches": 0}, ValueError, r"num_patches: got 0, expected an int of at least 1"),
        ({"num_patches": 9.0}, TypeError, r"num_patches: got float, expected an int"),
        ({"keep_ratio": 1.5}, ValueError, r"keep_ratio: got 1\.5, expected a finite number from 0 to 1"),
        ({"keep_ratio": float("nan")}, ValueError, r"keep_ratio: got nan"),
        ({"batch": -1}, ValueError, r"batch: got -1, expected an int of at least 0"),
        ({"seed": 0.5}, TypeError, r"seed: got float, expected an int, an int64 tensor"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed: got shape \(2,\), expected one element"),
        ({"seed": torch.zeros(1, dtype=torch.int64), "device": "meta"}, ValueError, r"seed: got device cpu, expected"),
        ({"backend": "cuda"}, ValueError, r"backend: got 'cuda', expected one of auto"),
    ],
)
def test_bad_selection_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        ops.select_patches(**({"num_patches": 9, "keep_ratio": 0.5, "batch": 2, "seed": 0} | changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ids": torch.zeros(2, 5)}, TypeError, r"ids: got torch\.float32, expected torch\.int64"),
        ({"ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"ids: got shape \(5,\), expected \(B, L\)"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, TypeError, r"lengths: got torch\.int32"),
        (
            {"lengths": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"lengths: got shape \(3,\), .* = \(2,\)",
        ),
        ({"lengths": torch.tensor([2, 6])}, ValueError, r"lengths: got 2 to 6, expected 0 to L = 5"),
        ({"lengths": torch.tensor([-1, 5])}, ValueError, r"lengths: got -1 to 5"),
        ({"lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, r"lengths: got device meta"),
        ({"kind": "span"}, ValueError, r"kind: got 'span', expected one of mlm, completion"),
        ({"ratio": "0.5"}, TypeError, r"ratio: got str, expected a number"),
        ({"mask_id": 120}, ValueError, r"mask_id: got 120, expected an int from 0 to 119"),
        ({"vocab_size": 2**31}, ValueError, r"vocab_size: got 2147483648, expected an int from 1 to 2147483647"),
        ({"seed": None}, TypeError, r"seed: got NoneType"),
    ],
)
def test_bad_text_is_named(changed, error, message):
    good = {"ids": torch.zeros(2, 5, dtype=torch.int64), "lengths": torch.tensor([5, 2]), "kind": "mlm", "ratio": 0.5}
    with pytest.raises(error, match=message):
        ops.mask_text(**(good | TEXT | {"seed": 0} | changed))


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def masks_of_rows(row_ids, lengths, backend):
    """Every mask of captions that lie at these rows of a larger batch."""
    ids = torch.arange(20, device=DEVICE).expand(len(lengths), -1) + 3
    lengths = torch.tensor(lengths, device=DEVICE)
    options = {"row_ids": row_ids, "seed": 5, "backend": backend}
    texts = [
        ops.mask_text(ids, lengths, kind=kind, published=published, ratio=0.4, **TEXT, **options)
        for kind, published in KINDS
    ]
    patches = {"device": DEVICE} | options
    return [
        ops.select_patches(30, 0.3, len(lengths), **patches),
        ops.select_tokens(30, 0.3, len(lengths), **patches),
        *(tensor for text in texts for tensor in text),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_keeps_its_masks_in_another_batch(backend):
    whole = masks_of_rows(None, [20, 12, 7, 20, 2], backend)
    part = masks_of_rows(torch.tensor([3, 1], device=DEVICE), [20, 12], backend)
    for ours, theirs in zip(part, whole, strict=True):
        assert torch.equal(ours, theirs[[3, 1]])
    apart = torch.tensor([[3, 8], [1, 8]], device=DEVICE)[:, 0]
    for ours, theirs in zip(masks_of_rows(apart, [20, 12], backend), part, strict=True):
        assert torch.equal(ours, theirs)
    # The largest ids have masks of their own, the same on every backend.
    far = torch.tensor([2**32 - 1, 2**31], device=DEVICE)
    ours, theirs = (masks_of_rows(far, [20, 12], path) for path in (backend, "eager"))
    assert not torch.equal(ours[0], part[0])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_ids_of_rows_are_checked():
    ids = torch.zeros(3, dtype=torch.int64)
    for wrong, kind in ((torch.zeros(3), TypeError), (ids, ValueError), (ids[:2].to("meta"), ValueError)):
        with pytest.raises(kind, match="row_ids: got"):
            ops.select_patches(9, 0.5, 2, seed=0, row_ids=wrong)
        with pytest.raises(kind, match="row_ids: got"):
            ops.mask_text(*(t.cpu() for t in captions()), kind="mlm", ratio=0.1, **TEXT, seed=0, row_ids=wrong)
