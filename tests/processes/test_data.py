"""Bad data over ranks: what one rank finds all count, and they stop together with the same message."""

from __future__ import annotations

import pytest
import torch
from ranks import be_rank, run_ranks

from sclkern.data.sources.arrow import write_pairs
from sclkern.errors import UserError
from sclkern.training.config import load_config
from sclkern.training.data import open_data
from sclkern.training.logs import SilentLog
from sclkern.training.pretraining import Pretraining
from sclkern.training.world import Place, World
from tiny_run import NO_LAYERS, overrides, rows

WORLD, PAIRS, STEPS = 2, 300, 5
BAD = (7, 70, 190)


def run_of(folder, rank, world, *, table="t", **changes):
    """A run whose epoch has five steps of 60 pairs."""
    tables = {"data__train_tables": f"[{table}]", "data__val_tables": "[v]", "data__val_split": "train"}
    batch = {"run__batch_size": 60 // world, "run__max_steps": 9, "run__log_every": 100}
    # Rank 0 alone writes; here each has a folder, because every rank makes several runs.
    output = folder / f"{world} {table} {sorted(changes)}"
    config = load_config(None, overrides(output, data__root=folder, **NO_LAYERS, **tables, **batch, **changes))
    return Pretraining(config, world=World(Place(rank, world, rank)))


def train(run):
    """Steps until the end of an epoch, the names that were counted, and the error."""
    batches, error = run.batches(), None
    try:
        for _ in range(STEPS):
            run.train_step(batches, SilentLog())
    except UserError as raised:
        error = str(raised)
    batches.close()
    return run.state.step, run.state.undecodable.state_dict()["names"], error


def vanished(run, rank):
    """Files that only the second machine has lost."""
    read = run.data.train_source.image_bytes

    def image_bytes(number):
        if rank == 1 and number % 3 == 0:
            raise FileNotFoundError("No such file")
        return read(number)

    run.data.train_source.image_bytes = image_bytes
    return run


def other_data(folder, rank):
    config = load_config(
        None,
        overrides(folder, data__root=folder, data__train_tables=f"[{'tv'[rank]}]", data__val_tables="[v]",
                  data__val_split="train"),
    )  # fmt: skip
    with pytest.raises(UserError) as raised:
        open_data(config, torch.device("cpu"), rank=rank, world_size=WORLD)
    return str(raised.value)


def work(rank, world, folder):
    return {
        "counted": train(run_of(folder, rank, world)),
        "dataset": train(run_of(folder, rank, world, objectives__itm_negatives="dataset")),
        "vanished": train(vanished(run_of(folder, rank, world, table="whole"), rank)),
        "other": other_data(folder, rank),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    content = rows(PAIRS)
    write_pairs(folder / "whole.arrow", content)
    for row in BAD:
        content[row]["image"] = b""
    write_pairs(folder / "t.arrow", content)
    write_pairs(folder / "v.arrow", rows(70))
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(__file__, WORLD, folder)


def test_every_rank_counts_what_all_have_found(ranks):
    names = {f"t.arrow row {row} ({row})" for row in BAD}
    for case in ("counted", "dataset"):
        step, counted, error = ranks[0][case]
        assert step == STEPS and set(counted) == names and error is None
        assert ranks[1][case] == ranks[0][case]


def test_files_that_one_machine_has_lost_stop_all_in_the_same_step(ranks):
    step, counted, error = ranks[0]["vanished"]
    assert step == 1 and len(counted) > 3 and ranks[1]["vanished"] == ranks[0]["vanished"]
    assert "of 300 images cannot be decoded, expected 1 % at most" in error and "(No such file)" in error


def test_a_machine_with_other_data_is_refused_on_all(ranks):
    assert ranks[0]["other"] == ranks[1]["other"]
    assert ranks[0]["other"].startswith("data: rank 1 has another training data and tokenizer than rank 0")


if __name__ == "__main__":
    be_rank(work)
