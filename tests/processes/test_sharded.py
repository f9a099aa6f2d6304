"""Checkpoints of FSDP; ``python test_sharded.py RANK WORLD DIRECTORY`` is the program of each rank."""

from __future__ import annotations

import errno
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from ranks import be_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sclkern.data.undecodable import UndecodableImages
from sclkern.errors import UserError
from sclkern.training import saving, sharded
from sclkern.training.checkpoint import DamagedError, load_checkpoint
from sclkern.training.directory import check_shared
from sclkern.training.saving import CheckpointWriter
from sclkern.training.sharded import load_sharded
from sclkern.training.state import TrainingState
from sclkern.training.world import Place, World

WORLD = 2


def build(world=1):
    """A model whose rows no number of ranks divides, one of its parameters without dimensions, and a step behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    model.register_parameter("temperature", nn.Parameter(torch.tensor(0.5)))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model, mesh=mesh, ignored_params={model.temperature})
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "base_lr": 0.1, "lr": 0.1}], fused=True)
    return TrainingState(model, optimizer, UndecodableImages(10))


def take_step(state):
    state.optimizer.zero_grad()
    (state.model(torch.ones(2, 3)).square().sum() * state.model.temperature).backward()
    state.optimizer.step()
    state.step += 1


def content(state):
    return {"config": {"run": {}}, "global_batch": 8, **state.state_dict()}


def whole(value):
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return [whole(entry) for entry in value] if isinstance(value, list) else value


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(rank, world, directory):
    group, folder = dist.new_group(backend="gloo"), directory / "checkpoints"
    state = build(world)
    take_step(state)
    expected = {1: whole(content(state))}
    # The disk writes when the weights have changed.
    original, begun = saving.save_sharded, []

    def slow(*arguments):
        while state.step < 2:
            pass
        begun.append(True)
        original(*arguments)

    saving.save_sharded = slow
    writer = CheckpointWriter(folder, keep=2, group=group)
    writer.save("latest", content(state), lambda: None)
    take_step(state)
    writer.wait()
    assert begun
    expected[2] = whole(content(state))
    for step in (2, 3):
        while state.step < step:
            take_step(state)
            expected[step] = whole(content(state))
        writer.save("latest", content(state), lambda: None)
    state.validated = 3  # its plain values alone change
    inode = (folder / "step-00000003" / "__0_0.distcp").stat().st_ino if rank == 0 and not writer.wait() else 0
    writer.save("latest", content(state), lambda: None)
    writer.save("best", content(state), lambda: None)
    writer.wait()
    if rank == 0:
        assert inode == (folder / "step-00000003" / "__0_0.distcp").stat().st_ino
        assert sorted(path.name for path in folder.iterdir()) == ["best-00000003", "step-00000002", "step-00000003"]
        saved = load_sharded(folder / "step-00000003")
        assert saved.pop("format") == 1 and saved["validated"] == 3
        assert same(saved, {**expected[3], "validated": 3})
        torch.save(expected, directory / "expected.pt")
    # A full disk on one rank is told to all of them, and nothing is left of the write.
    take_step(state)
    if rank == 1:
        sharded.dcp.FileSystemWriter.write_data = full
    writer.save("latest", content(state), lambda: None)
    try:
        writer.wait()
    except UserError as error:
        assert "cannot be written by rank" in str(error) and "No space left on device" in str(error), error
    else:
        raise AssertionError("not told")
    # Folders of one name that are not the same one.
    both, own = World(Place(rank, world, rank)), directory / f"machine {rank}"
    check_shared(directory, both)
    own.mkdir()
    try:
        check_shared(own, both)
    except UserError as error:
        assert "rank 1 on " in str(error) and "does not see what rank 0 on " in str(error), error
        assert not list(own.iterdir())
    else:
        raise AssertionError("not refused")
    # What was written by many, or by one, goes on in parts.
    for path in (folder / "step-00000002", directory / "one.pt"):
        other = build(world)
        if not path.is_dir():
            other.load_state_dict(load_checkpoint(path))
        else:
            other.load_state_dict(load_sharded(path, in_parts=True), path)
            assert isinstance(other.model[0].weight, DTensor)
            assert same(whole(content(other)), expected[2])
        take_step(other)
        assert same(whole(content(other)), expected[3]) or not path.is_dir()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    one = build()
    take_step(one)
    writer = CheckpointWriter(directory, keep=1)
    writer.save("latest", content(one), lambda: None)
    writer.wait()
    (directory / "latest.pt").rename(directory / "one.pt")
    run_ranks(__file__, WORLD, directory)
    return directory


def test_one_process_goes_on_from_it(written):
    state = build()
    state.load_state_dict(load_sharded(written / "checkpoints" / "step-00000002"))
    expected = torch.load(written / "expected.pt")
    assert state.saved_step == 2 and same(content(state), expected[2])
    take_step(state)
    # The vector instructions of some CPUs round otherwise at the end of a part than within a whole.
    torch.testing.assert_close(content(state)["model"], dict(expected[3]["model"]), rtol=1e-5, atol=1e-6)


def test_parts_of_another_shape_are_refused(written):
    folder, state = written / "checkpoints" / "step-00000002", build()
    state.load_state_dict(load_sharded(folder, in_parts=True), folder)
    assert same(content(state), torch.load(written / "expected.pt")[2])
    state.model[1] = nn.Linear(5, 6)
    with pytest.raises(
        UserError, match=r"not of this model \(UserError: .*step-00000002: cannot be read \(ValueError: "
    ):
        state.load_state_dict(load_sharded(folder, in_parts=True), folder)


def test_whatever_changed_is_found(written, tmp_path):
    folder = written / "checkpoints" / "best-00000003"
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        middle = before.index(b"config") if path.name == "state.pt" else len(before) // 2
        for damaged in (before[:middle], before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(DamagedError):
                load_sharded(folder)
            path.write_bytes(before)
    load_sharded(folder)


def test_reading_executes_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(pickle.UnpicklingError, match="mkdir is nothing of a checkpoint"):
        sharded._Reader(tmp_path).read_metadata()
    assert not (tmp_path / "made").exists()


if __name__ == "__main__":
    be_rank(main)
