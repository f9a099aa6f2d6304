"""Signals and deaths at every moment of a run: what was trained is on disk, and the run goes on as if nothing was."""

import json
import os
import signal
import time
from itertools import count
from pathlib import Path

import pytest

from same_state import assert_states_equal
from sclkern.cli import main
from sclkern.errors import Interrupted, UserError, WorkerError
from sclkern.evaluation import retrieval
from sclkern.training import loop, results, saving
from sclkern.training import pretraining as module
from sclkern.training.checkpoint import load_checkpoint, save_checkpoint
from sclkern.training.config import load_config
from sclkern.training.deadline import Deadline
from sclkern.training.pretraining import Pretraining
from tiny_run import NO_LAYERS, overrides, small_data

pytestmark = pytest.mark.usefixtures("one_thread")
VALIDATING = {**NO_LAYERS, "run__max_steps": 4, "run__val_every": 2, "run__save_every": 0}


def latest(directory):
    return load_checkpoint(directory / "checkpoints" / "latest.pt")


def rows(directory, kind):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def signals_within(monkeypatch, owner, name, *numbers, where=lambda: True):
    """Send these signals to this process the first time that ``owner.name`` is called while ``where()``."""
    original, left = getattr(owner, name), list(numbers)

    def call(*arguments, **options):
        while left and where():
            signal.raise_signal(left.pop(0))
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def pretraining(pretraining, small):
    return lambda name="run", **changes: pretraining(name, **{**NO_LAYERS, **small, **changes})


@pytest.fixture
def arguments(arguments, small):
    return lambda name="run", **changes: arguments(name, **{**NO_LAYERS, **small, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small):
    """Folder of a run that validates at steps 2 and 4."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert Pretraining(load_config(None, overrides(directory, **VALIDATING, **small))).run()
    return directory


def assert_goes_on_like(uninterrupted, directory):
    a, b = latest(uninterrupted), latest(directory)
    assert (a["step"], a["best"], a["validated"]) == (b["step"], b["best"], b["validated"])
    assert_states_equal(a["model"], b["model"])
    losses = [[(row["step"], row["total"]) for row in rows(run, "val")] for run in (uninterrupted, directory)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("moment", ["losses", "retrieval", "re-ranking"])
def test_a_signal_during_validation(pretraining, monkeypatch, capfd, tmp_path, uninterrupted, moment, count):
    run = pretraining(**VALIDATING)
    owner, name = {
        "losses": (run.passes, "forward"),
        "retrieval": (retrieval, "encode_texts"),
        "re-ranking": (retrieval, "score_pairs"),
    }[moment]
    with monkeypatch.context() as patch:
        signals_within(patch, owner, name, *[signal.SIGTERM] * count, where=lambda: not run.model.training)
        assert not run.run()
    assert latest(tmp_path / "run")["step"] == 2
    # The first signal waits for the validation, the second does not.
    assert len(rows(tmp_path / "run", "val")) == 2 - count
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("SIGTERM: ")]
    assert (
        told
        == [
            "SIGTERM: step 2 is saved; the run stops after its validation; a second signal stops without waiting",
            "SIGTERM: stops without waiting",
        ][:count]
    )
    assert pretraining(**VALIDATING, resume=True).run()
    assert_goes_on_like(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_in_a_step_that_a_validation_follows(pretraining, monkeypatch, tmp_path, uninterrupted, step):
    run = pretraining(**VALIDATING)
    with monkeypatch.context() as patch:
        signals_within(patch, run.optimizer, "step", signal.SIGINT, where=lambda: run.state.step == step - 1)
        assert not run.run()
    assert latest(tmp_path / "run")["step"] == step and len(rows(tmp_path / "run", "val")) == (step - 1) // 2
    assert pretraining(**VALIDATING, resume=True).run()
    assert_goes_on_like(uninterrupted, tmp_path / "run")


def test_a_signal_while_a_checkpoint_is_written(pretraining, monkeypatch, capfd, tmp_path, uninterrupted):
    run = pretraining(**VALIDATING)
    with monkeypatch.context() as patch:
        signals_within(patch, saving, "save_checkpoint", signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
        assert not run.run()
    assert latest(tmp_path / "run")["step"] == 2
    assert "SIGTERM: " in capfd.readouterr().err
    assert pretraining(**VALIDATING, resume=True).run()
    assert_goes_on_like(uninterrupted, tmp_path / "run")


def test_a_second_signal_leaves_a_step_out_between_its_micro_batches(pretraining, monkeypatch, tmp_path):
    options = {"run__accumulation": 2, "run__max_steps": 3, "run__save_every": 0}
    assert pretraining("whole", **options).run()
    run = pretraining(**options)
    with monkeypatch.context() as patch:
        signals_within(
            patch, run.passes, "forward_backward", signal.SIGTERM, signal.SIGTERM, where=lambda: run.state.step == 1
        )
        assert not run.run()
    assert latest(tmp_path / "run")["step"] == 1
    assert pretraining(**options, resume=True).run()
    assert_states_equal(latest(tmp_path / "whole")["model"], latest(tmp_path / "run")["model"])


def test_a_second_signal_does_not_wait_for_data(pretraining, monkeypatch, tmp_path):
    run = pretraining()
    batches = run.batches()

    def hangs():
        yield next(batches)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the wait went on")

    monkeypatch.setattr(run, "batches", hangs)
    assert not run.run()
    assert latest(tmp_path / "run")["step"] == 1


def test_a_signal_before_the_first_step_leaves_nothing(arguments, monkeypatch, capfd, tmp_path):
    with monkeypatch.context() as patch:
        signals_within(patch, module, "open_data", signal.SIGTERM)
        assert main(["pretrain", *arguments()]) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.split("\n")[-3:] == [
        "SIGTERM: stops now",
        "sclkern pretrain: interrupted by SIGTERM",
        "",
    ]
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"] == []
    # Two while the first batch is awaited: there is no step to save.
    with monkeypatch.context() as patch:
        signals_within(patch, Pretraining, "train_step", signal.SIGINT, signal.SIGINT)
        assert main(["pretrain", *arguments()]) == 128 + signal.SIGINT
    assert main(["pretrain", *arguments(run__max_steps=1)]) == 0


@pytest.mark.parametrize("moment", ["export", "report"])
def test_a_signal_after_the_last_step(arguments, monkeypatch, capfd, caplog, tmp_path, moment):
    args = arguments(run__max_steps=1, evaluation__attention_images=0)
    with monkeypatch.context() as patch:
        if moment == "export":
            signals_within(patch, loop.SCLModel, "save_pretrained", signal.SIGTERM)
        else:
            signals_within(patch, results, "write_report", signal.SIGTERM)
        assert main(["pretrain", *args]) == 0
    assert "SIGTERM: " in capfd.readouterr().err and "stopped before the report; write it with --resume" in caplog.text
    directory = tmp_path / "run"
    assert (directory / "model" / "tokenizer.json").exists() and not (directory / "report.md").exists()
    assert main(["pretrain", *args, "--resume"]) == 0
    assert (directory / "report.md").exists()


def test_after_an_error_the_steps_are_saved(pretraining, monkeypatch, tmp_path):
    run = pretraining(run__save_every=0)
    original = run.passes.forward_backward

    def fails(batch, seed, **options):
        if run.state.step == 3:
            raise ZeroDivisionError
        return original(batch, seed, **options)

    monkeypatch.setattr(run.passes, "forward_backward", fails)
    with pytest.raises(ZeroDivisionError):
        run.run()
    assert latest(tmp_path / "run")["step"] == 3


def test_weights_that_are_updated_by_half_are_not_saved(pretraining, monkeypatch, tmp_path):
    run = pretraining(run__save_every=2)
    original = run.optimizer.step

    def fails():
        if run.state.step == 3:
            run.model.temperature.data += 1
            raise MemoryError
        return original()

    monkeypatch.setattr(run.optimizer, "step", fails)
    with pytest.raises(MemoryError):
        run.run()
    assert latest(tmp_path / "run")["step"] == 2


def test_a_process_that_the_same_signal_ended_does_not_fail_the_run(pretraining, monkeypatch, caplog, tmp_path):
    died = "ptxas died\nof a signal"

    def fails(batch, seed, **options):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError(died)

    assert not pretraining(run__stop_at=1).run()
    run = pretraining(resume=True)
    monkeypatch.setattr(run.passes, "forward_backward", fails)
    # torchrun sends the signal when another process has died, which is what the run then ends with.
    died, of_compiler = "Connection closed by peer", died
    with pytest.raises(RuntimeError, match=died):
        run.run()
    died, run.stop.count = of_compiler, 0
    assert not run.run()
    assert "after the signal: RuntimeError: ptxas died" in caplog.text and "stopped at step 1, saved" in caplog.text


def test_a_validation_that_fails_is_repeated(pretraining, monkeypatch, tmp_path, uninterrupted):
    run = pretraining(**VALIDATING)

    def fails(path, state):
        if path.name == "best.pt":
            raise UserError("disk full")
        save_checkpoint(path, state)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk full"):
        patch.setattr(saving, "save_checkpoint", fails)
        run.run()
    assert latest(tmp_path / "run")["validated"] == -1
    assert pretraining(**VALIDATING, resume=True).run()
    assert_goes_on_like(uninterrupted, tmp_path / "run")


def test_an_interrupted_start_is_a_keyboard_interrupt(pretraining, monkeypatch):
    run = pretraining()
    signals_within(monkeypatch, loop, "RunLog", signal.SIGINT)
    with pytest.raises(Interrupted) as raised:
        run.run()
    assert isinstance(raised.value, KeyboardInterrupt) and raised.value.number is signal.SIGINT


def wait_for_rows(process, directory, count):
    metrics = directory / "metrics.jsonl"
    # Before them stands one that says what the run runs on.
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > count):
        time.sleep(0.02)


def test_the_group_is_signalled_and_a_worker_killed(arguments, command, pretraining, tmp_path):
    """What a scheduler, a terminal and the out-of-memory killer do, to one run with workers."""
    # Long enough to be signalled twice; its first steps are compared.
    options = {"run__max_steps": 2000, "run__save_every": 0, "data__num_workers": 2}
    directory = tmp_path / "run"
    process = command(arguments(**options), start_new_session=True)
    wait_for_rows(process, directory, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in error, error
    step = latest(directory)["step"]
    assert 3 <= step < 2000
    lines = error.splitlines()
    told = f"SIGTERM: step {step} is taken and saved, then the run stops; a second signal leaves it out"
    assert [line for line in lines if line.startswith("SIGTERM: ")] == [told]
    assert lines[-1] == f"stopped at step {step}, saved; go on with --resume"

    process = command([*arguments(**options), "--resume"])
    wait_for_rows(process, directory, step + 3)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 3 and "Traceback" not in error, error
    step = latest(directory)["step"]
    assert error.splitlines()[-1] == (
        f"sclkern pretrain: error: a data worker (process {workers[-1]}) was killed by SIGKILL, as the kernel does "
        f"when memory runs out; the checkpoint of step {step} is kept; go on with --resume, with fewer "
        "data.num_workers or more memory"
    )
    options |= {"run__stop_at": step + 2, "data__num_workers": 0}
    pretraining(**options, resume=True).run()
    pretraining("whole", **options).run()
    assert_states_equal(latest(tmp_path / "whole")["model"], latest(directory)["model"])


def test_a_worker_that_dies_in_validation(pretraining, monkeypatch, tmp_path):
    run = pretraining(run__max_steps=2, run__val_every=1, data__num_workers=1)

    def dies(*_):
        raise WorkerError("a data worker died")

    monkeypatch.setattr(run.evaluation, "held_out_losses", dies)
    with pytest.raises(WorkerError, match=r"a data worker died; the checkpoint of step 1 is kept; go on with --resume"):
        run.run()
    assert latest(tmp_path / "run")["step"] == 1


def test_the_run_is_saved_before_its_time_is_over(pretraining, tmp_path, caplog):
    options = {"run__max_steps": 20, "run__save_every": 0}
    run = pretraining(**options, run__stop_before="2999-12-31 08:00")
    clock = count(0, 10)
    run.deadline = Deadline(65.0, lambda: next(clock))  # a step takes 10 s
    assert not run.run()
    # At 50 s the sixth begins; a seventh would end at 70 s.
    assert latest(tmp_path / "run")["step"] == 6
    assert "run.stop_before: step 6 is the last that fits" in caplog.text
    assert "stopped at step 6, saved; go on with --resume" in caplog.text
    assert pretraining(**options, run__stop_at=8, resume=True).state.step == 6


def test_data_that_vanish_stop_nothing_that_runs(pretraining, tmp_path):
    data = small_data(tmp_path)
    run = pretraining(**data, run__stop_at=3)
    original = run.optimizer.step

    def step():
        original()
        (tmp_path / "t.arrow").unlink(missing_ok=True)

    run.optimizer.step = step
    assert not run.run()
    assert latest(tmp_path / "run")["step"] == 3
    with pytest.raises(UserError, match=r"no data of a known format, expected .*\*\.arrow"):
        pretraining(**data, resume=True)
    small_data(tmp_path)
    assert pretraining(**data, resume=True).run()
