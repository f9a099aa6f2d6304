"""Checkpoints are copied before training goes on, written by a thread, and the last of them are kept."""

import errno
import json
import os
import threading

import pytest
import torch

from same_state import assert_states_equal
from sclkern import io
from sclkern.errors import UserError
from sclkern.training import saving
from sclkern.training.checkpoint import DamagedError, checkpoints_of, content_digest, load_checkpoint, save_checkpoint
from sclkern.training.saving import CheckpointWriter, HostCopy
from tiny_run import NO_LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {"config": {}, "best": 0.0, "optimizer": {}, "bad_pictures": {}}


def state(step, value=0.0):
    return {**KEYS, "step": step, "model": {"w": torch.full((4, 3), value)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def step_of(path):
    return load_checkpoint(path)["step"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def disk(monkeypatch):
    """A disk that writes nothing before ``disk.set()``."""
    may_write = threading.Event()

    def slow(path, content):
        assert may_write.wait(60)
        save_checkpoint(path, content)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    yield may_write
    may_write.set()


def saved_one_after_another(writer, *steps):
    for step in steps:
        writer.save("latest", state(step, step), lambda: None)
    writer.wait()


def test_what_changes_while_a_slow_disk_writes_is_not_in_the_file(folder, disk):
    writer, weights = CheckpointWriter(folder, keep=1), torch.ones(5)
    shared = {"w": weights, "tied": weights, "empty": torch.ones(0), "moments": [(torch.tensor(2.0), 3)]}
    whole = threading.Event()
    writer.save("latest", {**KEYS, "step": 1, "model": shared}, whole.set)
    weights.fill_(7)
    shared["moments"][0][0].fill_(7)
    assert not whole.is_set() and not folder.exists()
    disk.set()
    writer.wait()
    model = load_checkpoint(folder / "latest.pt")["model"]
    assert whole.is_set() and model["w"].tolist() == [1.0] * 5 and model["moments"] == [(torch.tensor(2.0), 3)]
    assert model["w"].data_ptr() == model["tied"].data_ptr()


def test_a_save_waits_for_the_write_before(folder, disk):
    writer = CheckpointWriter(folder, keep=2)
    writer.save("latest", state(1, 1.0), lambda: None)
    second = threading.Thread(target=writer.save, args=("latest", state(2, 2.0), lambda: None))
    second.start()
    second.join(0.05)
    assert second.is_alive()  # its copy would overwrite that of the first
    disk.set()
    second.join()
    writer.wait()
    assert load_checkpoint(folder / "step-00000001.pt")["model"]["w"].eq(1).all()
    assert load_checkpoint(folder / "latest.pt")["model"]["w"].eq(2).all()
    assert writer.stall_seconds > 0 and writer.write_seconds > 0


def test_a_copy_takes_the_memory_of_the_one_before():
    copy = HostCopy()
    places = [copy.take({"a": torch.ones(3), "b": [torch.ones(2)]})["a"].data_ptr() for _ in range(2)]
    assert places[0] == places[1]
    other = copy.take({"a": torch.ones(4), "b": (torch.ones(2, dtype=torch.int64),)})
    assert other["a"].shape == (4,) and other["b"][0].dtype == torch.int64


@pytest.mark.parametrize("links", [True, False])
def test_the_last_are_kept(folder, monkeypatch, links):
    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    saved_one_after_another(CheckpointWriter(folder, keep=3), 5, 10, 10, 15, 20)
    assert names(folder) == ["latest.pt", "step-00000010.pt", "step-00000015.pt"]
    assert [step_of(folder / name) for name in names(folder)] == [20, 10, 15]
    # A resumed run knows the step of what it goes on from; fewer may be kept than before.
    saved_one_after_another(CheckpointWriter(folder, keep=2, latest_step=20), 25)
    assert names(folder) == ["latest.pt", "step-00000020.pt"]
    saved_one_after_another(CheckpointWriter(folder, keep=1, latest_step=25), 30)
    assert names(folder) == ["latest.pt"]


def test_what_the_user_keeps_beside_them_stays(folder):
    own = ["best-model", "best-of-1.pt", "step-1.old", "steps"]
    for name in own:
        (folder / name).mkdir(parents=True)
    (folder / "best-00000001").mkdir()  # of a run that was begun with FSDP
    writer = CheckpointWriter(folder, keep=1)
    writer.save("best", state(2), lambda: None)
    saved_one_after_another(writer, 2, 3)
    assert names(folder) == sorted([*own, "best.pt", "latest.pt"])


def test_the_newest_is_that_of_the_most_steps(folder):
    for name in ("step-9.pt", "step-00000010.pt", "best-2", "best-10", "best-of-3"):
        (folder / name).mkdir(parents=True)
    assert [path.name for path in checkpoints_of(folder)] == ["step-00000010.pt", "step-9.pt", "best-10", "best-2"]


def test_the_best_is_beside_them(folder):
    writer = CheckpointWriter(folder, keep=2)
    saved_one_after_another(writer, 1)
    writer.save("best", state(1), lambda: None)
    saved_one_after_another(writer, 2, 3)
    assert names(folder) == ["best.pt", "latest.pt", "step-00000002.pt"] and step_of(folder / "best.pt") == 1


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_keeps_what_is_there(folder, monkeypatch, where):
    writer = CheckpointWriter(folder, keep=2)
    saved_one_after_another(writer, 1, 2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(*((torch, "save") if where == "write" else (io.os, "fsync")), full)
        writer.save("latest", state(3), lambda: pytest.fail("not whole"))
        writer._thread.join()
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); .* free space"):
            writer.check()
        writer.check()  # raised once
    assert writer.failed == "latest"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    saved_one_after_another(writer, 3)
    assert [step_of(folder / name) for name in names(folder)] == [3, 2]


def test_any_other_error_of_the_thread_is_raised_too(folder, monkeypatch):
    writer = CheckpointWriter(folder, keep=2)
    monkeypatch.setattr(saving, "save_checkpoint", lambda *_: 1 / 0)
    writer.save("best", state(1), lambda: None)
    with pytest.raises(ZeroDivisionError):
        writer.save("latest", state(1), lambda: None)
    assert writer.failed == "best"


def test_a_value_that_changed_is_found_by_the_digest(tmp_path):
    save_checkpoint(tmp_path / "a.pt", state(1))
    content = torch.load(tmp_path / "a.pt")
    assert content["digest"] == content_digest(content)
    content["model"]["w"][2, 1] = 1e-30
    torch.save(content, tmp_path / "a.pt")  # with right checksums of the archive
    with pytest.raises(DamagedError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "a.pt")


def test_the_digest_is_that_of_everything():
    base = {"a": torch.ones(2), "b": {"c": [1, 2.5, None, "x", (True,)]}}
    others = [
        {"a": torch.ones(2, dtype=torch.int32)}, {"a": torch.ones(2, 1)}, {"a": torch.zeros(2)}, {"d": 1},
        {"b": {"c": [1, 2.5, None, "x", (False,)]}}, {"b": {"c": [1, 2.5, None, "x", True]}},
        {"a": torch.ones(2, dtype=torch.bfloat16)}, {"a": torch.tensor(1.0)},
    ]  # fmt: skip
    digests = [content_digest({**base, **change}) for change in ({}, *others)]
    assert len(set(digests)) == len(digests)
    assert content_digest({**base, "format": 1, "digest": "x"}) == digests[0]


def test_a_file_without_a_digest_is_compared_with_its_checksums(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({**state(1, 3.0), "format": 1}, path)
    assert_states_equal(load_checkpoint(path)["model"], state(1, 3.0)["model"])
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 3.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"not a whole checkpoint \(BadZipFile\)"):
        load_checkpoint(path)


def test_training_goes_on_while_a_slow_disk_writes(pretraining, monkeypatch, tmp_path):
    """The file of step 2 holds the weights of step 2 although it is written after step 4."""
    release = threading.Event()

    def slow(path, content):
        assert release.wait(60)
        save_checkpoint(path, content)

    run = pretraining(**NO_LAYERS, run__save_every=2, run__max_steps=4)
    original = run.optimizer.step

    def step():
        original()
        if run.state.step == 3:  # the fourth is taken
            assert run.state.saved_step == -1 and run.keeper._kept() == "no step was saved"
            release.set()

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", slow)
        patch.setattr(run.optimizer, "step", step)
        assert run.run() and run.state.saved_step == 4
    pretraining("half", **NO_LAYERS, run__max_steps=4, run__stop_at=2).run()
    early, half = (
        load_checkpoint(tmp_path / path) for path in ("run/checkpoints/step-00000002.pt", "half/checkpoints/latest.pt")
    )
    assert early["step"] == 2
    assert_states_equal(early["model"], half["model"])
    for index, moments in half["optimizer"]["state"].items():
        assert_states_equal(moments, early["optimizer"]["state"][index])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stalls = {row["step"]: row.get("save_stall_seconds") for row in rows if row["kind"] == "train"}
    assert stalls[1] is stalls[2] is stalls[4] is None and stalls[3] > 0


def test_a_write_that_failed_ends_the_run_at_the_next_step(pretraining, monkeypatch, tmp_path):
    run = pretraining(**NO_LAYERS, run__save_every=2, run__max_steps=6)
    in_step = threading.Event()

    def full(path, content):
        if content["step"] == 4:
            in_step.wait()
            raise UserError("disk full")
        save_checkpoint(path, content)

    monkeypatch.setattr(saving, "save_checkpoint", full)
    original = run.optimizer.step

    def step():
        original()
        if run.state.step == 4:
            in_step.set()
            run.keeper.writer._thread.join()

    monkeypatch.setattr(run.optimizer, "step", step)
    with pytest.raises(UserError, match="disk full"):
        run.run()
    # There was room again: nothing is lost.
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"] == 5
    assert pretraining(**NO_LAYERS, run__save_every=2, run__max_steps=6, resume=True).state.step == 5
