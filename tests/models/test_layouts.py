"""Packed and padded tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sclkern.models.attention import Attention, attend
from sclkern.models.layouts import Packed, Padded, Rows, merge_groups, repack, unpack_groups

LENGTHS = (3, 1, 4, 2)


def cu_seqlens(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.fixture
def grouped():
    """(tokens, layout): two sequences of 3, one of 5."""
    return torch.randn(11, 8), Packed(cu_seqlens([3, 3, 5]), 5, ((2, 3), (1, 5)))


@pytest.fixture
def ragged():
    """(padded tokens, packed tokens, layout): lengths that the host does not know, and room for two more tokens."""
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    padded = torch.randn(4, 4, 8)
    index = (~mask.flatten()).to(torch.uint8).argsort(stable=True)[: sum(LENGTHS) + 2]
    return padded, padded.flatten(0, 1)[index], Packed(cu_seqlens(LENGTHS), 4, mask=mask, padded_index=index)


def test_groups_of_equal_length_are_batches_without_padding(grouped):
    x, layout = grouped
    batches = unpack_groups(x, layout, layout)
    assert [tuple(batch.shape) for batch, _ in batches] == [(2, 3, 8), (1, 5, 8)]
    assert all(mask is None for _, mask in batches)
    assert torch.equal(repack([batch for batch, _ in batches], layout), x)


def test_ragged_sequences_are_padded_in_the_groups_of_the_other_side(ragged):
    padded, x, layout = ragged
    other = Packed(cu_seqlens([7] * 4), 7, ((1, 7), (3, 7)))
    batches = unpack_groups(x, layout, other)
    assert [len(batch) for batch, _ in batches] == [1, 3]
    assert torch.equal(torch.cat([mask for _, mask in batches]), layout.mask)
    assert torch.equal(torch.cat([batch for batch, _ in batches])[layout.mask], padded[layout.mask])
    assert torch.equal(repack([batch for batch, _ in batches], layout), x)


def test_unknown_lengths_need_the_padded_batch():
    layout = Packed(cu_seqlens(LENGTHS), 4)
    with pytest.raises(ValueError, match="layout: has no groups, expected mask and padded_index"):
        unpack_groups(torch.randn(10, 8), layout, layout)


def test_neighbouring_groups_are_merged_where_neither_side_changes_its_length(ragged):
    images = Packed(cu_seqlens([3] * 10), 3, ((2, 3), (2, 3), (2, 5), (4, 3)))
    texts = ragged[-1]
    for sides in ((images, texts), (texts, images), (images, images)):
        for side in merge_groups(*sides):
            assert side.groups == (((4, 3), (2, 5), (4, 3)) if side.cu_seqlens is images.cu_seqlens else ())
    rows = Packed(images.cu_seqlens, 3, ((2, 1), (2, 1), (2, 1), (4, 0)))
    first, second = merge_groups(images, rows)
    assert (first.groups, second.groups) == (((4, 3), (2, 5), (4, 3)), ((4, 1), (2, 1), (4, 0)))
    first, second = merge_groups(rows, rows)
    assert first.groups == second.groups == ((6, 1), (4, 0))
    assert merge_groups(texts, texts) == (texts, texts)


def test_rows_are_taken_from_padded_and_from_packed_tokens():
    x = torch.randn(2, 5, 8)
    padded = Rows(torch.tensor([[0, 3], [1, 1]]), Padded())
    packed = Rows(torch.tensor([0, 3, 6, 6]), Packed(cu_seqlens([2, 2]), 2, ((2, 2),)))
    assert torch.equal(padded.take(x).flatten(0, 1), packed.take(x.flatten(0, 1)))
    assert torch.equal(padded.take(x)[0], x[0, [0, 3]])


@pytest.mark.parametrize("num_frames", [1, 2])
def test_packed_attention_is_that_of_each_sequence(num_frames):
    module = Attention(128).double()
    x = [torch.randn(n, 4, 128, dtype=torch.float64) for n in (2, 1)]
    packed = torch.cat([batch.flatten(0, 1) for batch in x])
    layout = Packed(cu_seqlens([4] * 3), 4, ((2, 4), (1, 4)), num_frames)
    expected = torch.cat([module(batch, Padded(num_frames=num_frames)).flatten(0, 1) for batch in x])
    torch.testing.assert_close(module(packed, layout), expected)


def test_one_padded_and_one_packed_side_are_refused():
    query, key = torch.randn(1, 3, 1, 64), torch.randn(3, 1, 64)
    with pytest.raises(TypeError, match="key_layout: got Packed for a query_layout Padded, expected both"):
        attend(query, key, key, Padded(), Packed(cu_seqlens([3]), 3), dropout_p=0.0, backend="auto")


def test_probabilities_of_packed_tokens_are_refused(grouped):
    _, layout = grouped
    with pytest.raises(ValueError, match=r"probabilities: .*expected padded tokens"):
        Attention(64)(torch.randn(11, 64), layout, probabilities=[])
