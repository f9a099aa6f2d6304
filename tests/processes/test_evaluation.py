"""Evaluation over ranks gives what one process gives, to the last digit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import be_rank, run_ranks

from sclkern import SCLModel
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.undecodable import UndecodableImages
from sclkern.distributed import gather_parts, merge
from sclkern.evaluation import retrieval
from sclkern.training.config import load_config
from sclkern.training.data import open_data
from sclkern.training.evaluation import RunEvaluation
from sclkern.training.passes import Passes
from sclkern.training.signals import StopSignals
from tiny_run import overrides, rows

WORLD = 3
CPU = torch.device("cpu")


def configuration(folder, **changes):
    tables = {"data__train_tables": "[t]", "data__val_tables": "[t]", "data__val_split": "train", "data__root": folder}
    return load_config(None, overrides(folder / "run", **tables, **changes))


def evaluated(folder, rank, world, **changes) -> dict[str, Any]:
    """Held-out losses, recalls, every score that they come from, and what could not be decoded."""
    evaluation = run_evaluation(folder, rank, world, **changes)
    scores: list[torch.Tensor] = []
    originals = retrieval.similarities, retrieval.score_pairs

    def recorded(function):
        return lambda *arguments: scores.append(function(*arguments)) or scores[-1]

    retrieval.similarities, retrieval.score_pairs = map(recorded, originals)
    try:
        return {
            "losses": evaluation.held_out_losses(),
            "retrieval": evaluation.retrieval(),
            "scores": scores,
            "undecodable": set(evaluation.undecodable["held-out"].state_dict()["names"]),
            "dealt": len(evaluation.data.val_loader.batches_of_epoch()),
        }
    finally:
        retrieval.similarities, retrieval.score_pairs = originals


def run_evaluation(folder, rank, world, **changes) -> RunEvaluation:
    config = configuration(folder, evaluation__batch_size=4, **changes)
    data = open_data(config, CPU, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = SCLModel(config.model, config.objectives).eval()
    training = UndecodableImages(data.train_source.num_images)
    return RunEvaluation(config, data, Passes(model, config, CPU), training, StopSignals())


def parts_of(rank):
    return {number: torch.full((number, 2), float(number)) for number in {0: [5, 1], 1: [], 2: [2, 9]}[rank]}


def work(rank, world, folder):
    results = {"parts": gather_parts(parts_of(rank)), "merged": merge({rank: "own", "shared": rank})}
    for negatives in ("in_batch", "dataset"):
        options = {"objectives__itm_negatives": negatives}
        results[negatives] = evaluated(folder, rank, world, **options)
    if rank == 0:
        results["alone"] = run_evaluation(folder, 0, 1).retrieval()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 images, of which one cannot be decoded: three batches of eight, and retrieval in batches of four."""
    folder = tmp_path_factory.mktemp("ranks")
    content = rows(29)
    content[13]["image"] = b""
    for row, other in ((3, 4), (20, 21)):
        content[row]["caption"] = content[other]["caption"]
    write_pairs(folder / "t.arrow", content)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(__file__, WORLD, folder)


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("negatives", ["in_batch", "dataset"])
def test_losses_and_recalls_are_those_of_one_process(ranks, folder, negatives):
    alone = evaluated(folder, 0, 1, objectives__itm_negatives=negatives)
    assert alone["retrieval"].images == 28 and alone["retrieval"].captions == 26 and len(alone["scores"]) == 2
    assert alone["undecodable"] == {"t.arrow row 13 (13)"}
    for results in (rank[negatives] for rank in ranks):
        assert results["losses"] == alone["losses"]
        assert results["retrieval"] == alone["retrieval"]
        assert all(torch.equal(a, b) for a, b in zip(results["scores"], alone["scores"], strict=True))
        assert results["undecodable"] == alone["undecodable"]
    assert [rank[negatives]["dealt"] for rank in ranks] == [1, 1, 1] and alone["dealt"] == 3


def test_one_rank_may_evaluate_alone(ranks):
    assert ranks[0]["alone"] == ranks[1]["in_batch"]["retrieval"]


def test_parts_of_any_size_come_in_the_order_of_their_numbers(ranks):
    expected = torch.tensor([1.0] + 2 * [2.0] + 5 * [5.0] + 9 * [9.0])[:, None].expand(-1, 2)
    assert all(torch.equal(rank["parts"], expected) for rank in ranks)
    assert all(rank["merged"] == {0: "own", 1: "own", 2: "own", "shared": 2} for rank in ranks)


if __name__ == "__main__":
    be_rank(work)
