"""Two processes: sentence-transformers' ranking losses beside ours, gathered across devices, under DDP.

``python test_sentence_transformers.py RANK WORLD FOLDER`` is the program of each rank.
"""

import pytest
import torch
from ranks import be_rank, run_ranks
from torch import nn

WORLD, ROWS, WIDTH = 2, 5, 8
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES = {
    "one direction": {"gather_across_devices": True},
    "within a process": {},
    "both": {"gather_across_devices": True, "directions": (ALL[0], ALL[2]), "partition_mode": "per_direction"},
    "all": {"gather_across_devices": True, "directions": ALL},
    "no queries": {"gather_across_devices": True, "directions": (ALL[0], ALL[3])},
    "penalties": {"gather_across_devices": True, "hardness_mode": "hard_negatives", "hardness_strength": 3.0},
}
NAMES = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def __getitem__(self, _):
        return self.linear

    def forward(self, features):
        return {"sentence_embedding": self.linear(features["rows"])}


class Model(nn.parallel.DistributedDataParallel):
    """DDP around the encoder, with what the cached loss reads of a SentenceTransformer."""

    def __getitem__(self, index):
        return self.module[index]


def trained(module, name, rank, options):
    generator = torch.Generator().manual_seed(rank)
    inputs = [{"rows": torch.randn(ROWS, WIDTH, generator=generator).double()} for _ in range(4)]
    if name.startswith("Cached"):
        options = {**options, "mini_batch_size": 2}
    # Each column takes DDP's forward, so that its buckets are not in the order of the backward.
    model = Model(Encoder().double())
    value = getattr(module, name)(model, scale=7.0, **options)(inputs, torch.empty(0))
    value.backward()
    return value.item(), [parameter.grad for parameter in model.parameters()]


def work(rank, world, folder):
    from sentence_transformers.sentence_transformer import losses

    from sclkern.integrations import sentence_transformers

    return {
        (name, case): [trained(module, name, rank, options) for module in (sentence_transformers, losses)]
        for name in NAMES
        for case, options in CASES.items()
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(__file__, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(name, case, results):
    for of_rank in results:
        ours, theirs = of_rank[name, case]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_values_are_those_of_the_rows_of_a_rank(results):
    values = [of_rank[NAMES[0], "all"][0][0] for of_rank in results]
    assert values[0] != values[1]


if __name__ == "__main__":
    be_rank(work)
