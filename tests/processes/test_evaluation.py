"""Evaluation over ranks gives what one process gives, to the last digit."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from ranks import be_rank, run_ranks

from sclkern import SCLModel
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.undecodable import UndecodableImages
from sclkern.distributed import gather_objects, gather_parts
from sclkern.errors import UserError
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
    config = configuration(folder, evaluation__batch_size=4, **changes)
    data = open_data(config, CPU, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = SCLModel(config.model, config.objectives).eval()
    training = UndecodableImages(data.train_source.num_images, shared=world > 1)
    evaluation = RunEvaluation(config, data, Passes(model, config, CPU), training, StopSignals())
    scores: list[torch.Tensor] = []
    original = retrieval.recalls
    retrieval.recalls = lambda values, relevant: scores.append(values) or original(values, relevant)
    try:
        return {
            "losses": evaluation.held_out_losses(),
            "retrieval": evaluation.retrieval(),
            "scores": scores,
            "undecodable": set(evaluation.undecodable["held-out"].state_dict()["names"]),
            "dealt": len(data.val_loader.batches_of_epoch()),
        }
    finally:
        retrieval.recalls = original


def merged(rank):
    """The names that every rank holds after each of two merges, what it logged, and the error of a third."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage().split(": ")[1])
    logging.getLogger("sclkern.data").addHandler(handler)
    counts = UndecodableImages(400, shared=True)
    counts.add({f"of {rank}": "bad", "of all": "bad"} if rank else {})
    counts.merge()
    names = [counts.state_dict()["names"]]
    counts.add({"of all": "again", "late": "bad"} if rank == 0 else {})
    counts.merge()
    names.append(counts.state_dict()["names"])
    counts.add({"one": "bad"} if rank == 1 else {})
    try:
        counts.merge()
    except UserError as error:
        return names, sorted(logged), str(error)


def parts_of(rank):
    return {number: torch.full((number, 2), float(number)) for number in {0: [5, 1], 1: [], 2: [2, 9]}[rank]}


def work(rank, world, folder):
    results = {"merged": merged(rank), "parts": gather_parts(parts_of(rank)), "objects": gather_objects({"rank": rank})}
    for negatives in ("in_batch", "dataset"):
        options = {"objectives__itm_negatives": negatives}
        results[negatives] = evaluated(folder, rank, world, **options)
    if rank == 0:
        results["alone"] = evaluated(folder, 0, 1)["retrieval"]
    # The last one leaves the group when nobody needs it any more.
    torch.distributed.barrier()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 images, of which one in the middle cannot be decoded: three batches of eight, and retrieval in batches of 4."""
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
    assert alone["retrieval"].images == 28 and alone["retrieval"].captions == 27 and len(alone["scores"]) == 4
    assert alone["undecodable"] == {"t.arrow row 13 (13)"}
    for results in (rank[negatives] for rank in ranks):
        assert results["losses"] == alone["losses"]
        assert results["retrieval"] == alone["retrieval"]
        assert all(torch.equal(a, b) for a, b in zip(results["scores"], alone["scores"], strict=True))
        assert results["undecodable"] == alone["undecodable"]
    assert [rank[negatives]["dealt"] for rank in ranks] == [1, 1, 1] and alone["dealt"] == 3


def test_one_rank_may_evaluate_alone(ranks):
    assert ranks[0]["alone"] == ranks[1]["in_batch"]["retrieval"]


def test_undecodable_images_are_counted_over_ranks(ranks):
    first, second = ["of 1", "of all", "of 2"], ["of 1", "of all", "of 2", "late"]
    for names, logged, error in (rank["merged"] for rank in ranks):
        assert names == [first, second]
        assert logged == sorted(f"{name} (bad)" for name in [*second, "one"])
        assert error.startswith(
            "5 of 400 images cannot be decoded, expected 1 % at most, or one; the first is of 1 (bad)"
        )


def test_parts_of_any_size_come_in_the_order_of_their_numbers(ranks):
    expected = torch.tensor([1.0] + 2 * [2.0] + 5 * [5.0] + 9 * [9.0])[:, None].expand(-1, 2)
    assert all(torch.equal(rank["parts"], expected) for rank in ranks)
    assert all(rank["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}] for rank in ranks)


if __name__ == "__main__":
    be_rank(work)
