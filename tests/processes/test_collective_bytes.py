"""What contrasts exchange between processes, counted below torch.distributed, is what `sclkern plan` says."""

from benchmarks.collectives import CASES, expected, measure


def test_the_bytes_of_every_gather_are_those_of_the_formula():
    for rank, found in enumerate(measure(4)):
        for case in CASES:
            assert found[case] == expected(case, 4), (rank, case)
            assert sum(found[case].values()) >= 6
