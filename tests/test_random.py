from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sclkern.random import below, mix_seed, philox, random_words, smallest, uniform

# counter, key, output: kat_vectors of the Random123 distribution, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
INT64 = st.integers(-(2**63), 2**63 - 1)


def philox_of_integers(counter, key, rounds=10):
    """Salmon et al., SC 2011, section 3.3, word for word."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def words_of_integers(seed, counter, stream, rounds=10, last=0):
    low_high = counter % 2**32, counter % 2**64 >> 32
    return philox_of_integers((*low_high, stream, last % 2**32), (seed % 2**32, seed % 2**64 >> 32), rounds)


def words(seed, counter, stream=0, **options):
    return tuple(word.item() for word in philox(seed, torch.tensor(counter), stream, **options))


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_integer_philox_reproduces_the_published_vectors(counter, key, expected):
    assert philox_of_integers(counter, key) == expected


def test_philox_reproduces_the_published_vector_of_zeros():
    assert words(0, 0) == KNOWN[0][2]


@given(seed=INT64, counter=INT64, stream=st.integers(0, 2**32 - 1), rounds=st.sampled_from([7, 10]))
def test_philox_equals_integer_arithmetic(seed, counter, stream, rounds):
    assert words(seed, counter, stream, rounds=rounds) == words_of_integers(seed, counter, stream, rounds)


@given(seed=INT64, counter=INT64, last=INT64)
def test_the_last_word_of_the_counter(seed, counter, last):
    expected = words_of_integers(seed, counter, 3, last=last)
    assert words(seed, counter, 3, last=torch.tensor(last)) == expected
    of_rows = philox(seed, torch.full((1, 2), counter), 3, last=torch.tensor([[last]]))
    assert torch.stack(of_rows, -1).tolist() == [[list(expected)] * 2]


TRITON_PROGRAM = """
import json, sys, torch, triton, triton.language as tl

@triton.jit
def draw(out_ptr, seed, low, high, stream, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    zero = column * 0
    w0, w1, w2, w3 = tl.philox(seed, low + column, high + zero, stream + zero, zero)
    tl.store(out_ptr + column, w0)
    tl.store(out_ptr + BLOCK + column, w1)
    tl.store(out_ptr + 2 * BLOCK + column, w2)
    tl.store(out_ptr + 3 * BLOCK + column, w3)

results = []
for seed, low, high, stream in json.loads(sys.argv[1]):
    out = torch.empty(4, 8, dtype=torch.int32)
    draw[(1,)](out, seed, low, high, stream, BLOCK=8)
    results.append([[word % 2**32 for word in row] for row in out.tolist()])
print(json.dumps(results))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_philox_draws_the_numbers_of_triton(tmp_path):
    # A file, because triton reads a kernel's source; a process, because the interpreter is chosen at import.
    program = tmp_path / "draw.py"
    program.write_text(TRITON_PROGRAM)
    cases = [(0, 0, 0, 0), (1234567890123, 5, 3, 2), (2**62 + 17, 100, 7, 4)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(program), json.dumps(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for (seed, low, high, stream), drawn in zip(cases, json.loads(run.stdout), strict=True):
        counter = (high << 32) | (low + torch.arange(8))
        assert torch.stack(philox(seed, counter, stream)).tolist() == drawn, (seed, low, high, stream)


@given(seed=INT64)
def test_an_integer_and_a_tensor_seed_draw_the_same(seed):
    assert words(seed, 12345, 3) == words(torch.tensor(seed), 12345, 3)


@given(seed=st.integers(-(2**130), 2**130))
def test_a_seed_of_any_size_counts_modulo_2_to_the_64(seed):
    assert words(seed, 7) == words_of_integers(seed % 2**64, 7, 0)


@given(
    rows=st.integers(1, 6), columns=st.integers(1, 6), more=st.tuples(st.integers(0, 5), st.integers(0, 5)), seed=INT64
)
def test_a_place_keeps_its_numbers_when_the_grid_grows(rows, columns, more, seed):
    small = random_words((rows, columns), seed=seed, stream=1, device="cpu")
    large = random_words((rows + more[0], columns + more[1]), seed=seed, stream=1, device="cpu")
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a, b[:rows, :columns]), (a, b)


def test_streams_and_seeds_share_no_numbers():
    grids = [
        random_words((8, 64), seed=seed, stream=stream, device="cpu")[0]
        for seed in (0, 1, 2**40)
        for stream in range(3)
    ]
    values = torch.cat([grid.flatten() for grid in grids])
    # 4608 words of 2**32 have 0.0025 collisions on average.
    assert values.unique().numel() == values.numel()


def test_uniform_covers_the_half_open_unit_interval():
    drawn = uniform(torch.tensor([0, 2**31, 2**32 - 1]))
    assert drawn.dtype == torch.float32
    assert drawn.tolist() == [0.0, 0.5, 1 - 2.0**-24]


@given(bound=st.integers(1, 2**20))
def test_below_reaches_zero_and_the_last_number_but_not_the_bound(bound):
    assert below(torch.tensor([0, 2**32 - 1]), bound).tolist() == [0, bound - 1]


def test_below_is_uniform():
    drawn = below(random_words((1, 7000), seed=5, stream=0, device="cpu")[0], 7)
    counts = drawn.flatten().bincount(minlength=7).double()
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi_square < 22.5, f"{chi_square} of 6 degrees of freedom is rarer than 1 in 1000: {counts.tolist()}"


@given(
    keys=st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4),
    bits=st.integers(0, 2**24 - 1),
    count=st.integers(0, 8),
)
def test_smallest_marks_the_eligible_keys_that_sort_first(keys, bits, count):
    eligible = torch.tensor([[bool(bits >> (6 * i + j) & 1) for j in range(6)] for i in range(len(keys))])
    marked = smallest(torch.tensor(keys), eligible, count)
    for row, allowed, mark in zip(keys, eligible.tolist(), marked.tolist(), strict=True):
        order = sorted((key, place) for place, key in enumerate(row) if allowed[place])
        assert {place for place, chosen in enumerate(mark) if chosen} == {place for _, place in order[:count]}


def test_smallest_takes_a_count_for_each_row():
    keys = torch.tensor([[3, 1, 2], [3, 1, 2]])
    marked = smallest(keys, torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1], [2]]))
    assert marked.tolist() == [[False, True, False], [False, True, True]]


def test_mixed_seeds_differ_for_any_change_of_their_parts_or_order():
    parts = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    seeds = {mix_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1) != mix_seed(1, 0)
