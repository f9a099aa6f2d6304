"""A run that is stopped, killed or refused goes on to the same weights, bit for bit."""

import json
import random
import resource
import signal
import time

import pytest
import torch

from sclkern.errors import UserError
from sclkern.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def final_state(directory):
    return load_checkpoint(directory / "checkpoints" / "latest.pt")


def assert_same_weights(first, second):
    assert first["step"] == second["step"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for index, state in first["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][index][key]), (index, key)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stopping_half_way_changes_nothing(pretraining, tmp_path, accumulation):
    pretraining("whole", run__accumulation=accumulation).run()
    assert not pretraining("halves", run__accumulation=accumulation, run__stop_at=3).run()
    assert pretraining("halves", run__accumulation=accumulation, resume=True).run()
    assert_same_weights(final_state(tmp_path / "whole"), final_state(tmp_path / "halves"))
    rows = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_resuming_in_the_next_epoch_changes_nothing(pretraining, tmp_path):
    # The test split makes about 12 batches of 16: the run crosses from the first epoch to the second.
    data = {"data__train_split": "test", "run__batch_size": 16, "run__max_steps": 16, "model__text_layers": 0}
    data |= {"model__vision_layers": 0, "model__fusion_layers": 1, "evaluation__rerank": 0}
    pretraining("whole", **data).run()
    pretraining("halves", **data, run__stop_at=13).run()
    pretraining("halves", **data, resume=True).run()
    assert_same_weights(final_state(tmp_path / "whole"), final_state(tmp_path / "halves"))


def test_workers_and_validation_change_nothing(pretraining, tmp_path):
    pretraining("plain", run__max_steps=4).run()
    pretraining("other", run__max_steps=4, data__num_workers=1, run__val_every=2, run__log_every=3).run()
    assert_same_weights(final_state(tmp_path / "plain"), final_state(tmp_path / "other"))


def test_rows_of_steps_that_run_again_are_replaced(pretraining, tmp_path):
    pretraining(run__stop_at=2).run()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "train", "step": 3, "total": 1.0}\n{"kind": "tra')
    pretraining(resume=True).run()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert rows[2]["total"] != 1.0


def test_killed_at_any_moment(arguments, command, pretraining, tmp_path):
    assert pretraining("whole", run__max_steps=10).run()
    chance = random.Random(0)
    latest = tmp_path / "killed" / "checkpoints" / "latest.pt"
    kills = 0
    for _ in range(40):
        process = command([*arguments("killed", run__max_steps=10), "--resume"])
        before = latest.stat().st_mtime_ns if latest.exists() else -1
        # Most of a short run is start-up. Wait until this process has saved, so that the test ends however slow the
        # machine is, then for a part of a few steps.
        while process.poll() is None and (latest.stat().st_mtime_ns if latest.exists() else -1) <= before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        assert process.wait() == -signal.SIGKILL
        kills += 1
    assert process.returncode == 0, process.stderr.read()
    assert kills >= 2, "the run ended before it could be killed twice: make it longer"
    assert_same_weights(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert not list((tmp_path / "killed").rglob(".*.tmp"))


def test_a_full_disk_keeps_the_last_checkpoint(arguments, command, pretraining, tmp_path):
    pretraining(run__stop_at=2).run()
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    before = latest.read_bytes()

    def refuse_large_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = command([*arguments(), "--resume"], preexec_fn=refuse_large_files)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    last = error.strip().splitlines()[-1]
    assert last.startswith("sclkern pretrain: error: ") and "latest.pt: cannot be written (File too large)" in last
    assert "Traceback" not in error
    assert latest.read_bytes() == before
    assert sorted(p.name for p in latest.parent.iterdir()) == ["latest.pt"]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(pretraining, tmp_path):
    run = pretraining()
    original = run.passes.forward_backward

    def poisoned(batch, seed, **options):
        if run.state.step == 3:
            run.model.itm_head.weight.data[0, 0] = torch.nan
        return original(batch, seed, **options)

    run.passes.forward_backward = poisoned
    with pytest.raises(UserError, match=r"step 4: total is not finite; the checkpoint of step 2 is kept; lower optim"):
        run.run()
    saved = final_state(tmp_path / "run")
    assert saved["step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_a_started_run_is_not_overwritten(pretraining):
    pretraining(run__max_steps=2).run()
    with pytest.raises(UserError, match=r"already holds a run; add --resume to go on with it"):
        pretraining(run__max_steps=2)


def test_another_configuration_is_refused(pretraining):
    pretraining(run__stop_at=2).run()
    with pytest.raises(UserError, match=r"latest\.pt: optimizer\.weight_decay was 0\.01 and is now 0\.1; resume"):
        pretraining(resume=True, optimizer__weight_decay=0.1)


def test_the_remedy_for_a_run_that_diverged_works(pretraining, tmp_path):
    with pytest.raises(UserError, match=r"is not finite; the checkpoint of step \d+ is kept; lower optimizer"):
        pretraining(run__max_steps=40, optimizer__learning_rate=1e18, run__save_every=1).run()
    run = pretraining(resume=True, run__max_steps=40, optimizer__learning_rate=1e-4, run__stop_at=39)
    assert {group["base_lr"] for group in run.optimizer.param_groups} == {1e-4, 5e-4}


def test_a_checkpoint_cut_short_is_refused(pretraining, tmp_path):
    pretraining(run__stop_at=1).run()
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    content = latest.read_bytes()
    for size in (0, 100, len(content) // 2, int(0.999 * len(content))):
        latest.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"latest\.pt: not a whole checkpoint"):
            pretraining(resume=True)


def test_a_resumed_run_does_not_need_the_weights_it_started_from(pretraining, tmp_path):
    start = pretraining("start")
    start.model.save_pretrained(tmp_path / "weights")
    options = {"weights__pretrained": tmp_path / "weights", "run__max_steps": 2}
    pretraining(run__stop_at=1, **options).run()
    (tmp_path / "weights" / "model.safetensors").unlink()
    assert pretraining(resume=True, **options).run()
