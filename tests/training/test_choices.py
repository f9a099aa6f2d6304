"""What a run chooses by name among libraries: trained and resumed with stand-ins, reported, refused where it cannot."""

from __future__ import annotations

import json

import pytest
import torch

import stand_ins
from same_state import assert_states_equal
from sclkern.errors import UserError
from sclkern.libraries import apex, flash
from sclkern.models import attention
from sclkern.training.checkpoint import load_checkpoint
from sclkern.training.config import OptimizerConfig
from sclkern.training.optim import build_optimizer, parameter_groups, steps_taken
from tiny_run import NO_LAYERS, small_data

pytestmark = pytest.mark.usefixtures("one_thread")
CHOICES = {
    "flash": {"run__backend": "flash", "run__precision": "bfloat16"},
    "layer_norm": {"run__layer_norm": "apex"},
    "optimizer": {"optimizer__name": "apex", "optimizer__max_grad_norm": 1.0},
}
NOT_OURS = {**{name: CHOICES[name] for name in ("layer_norm", "optimizer")}, "torch": {"run__layer_norm": "torch"}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def pretraining(pretraining, small):
    """A run of three steps with one layer of fusion, on a few images."""
    options = {**NO_LAYERS, **small, "run__max_steps": 3, "evaluation__rerank": 0}
    return lambda name="run", **changes: pretraining(name, **{**options, **changes})


@pytest.fixture
def installed(monkeypatch):
    stand_ins.install(monkeypatch)


def latest(directory):
    return load_checkpoint(directory / "checkpoints" / "latest.pt")


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CHOICES)
def test_a_stopped_run_goes_on_to_the_same_weights(installed, pretraining, tmp_path, name):
    assert pretraining("whole", **CHOICES[name]).run()
    assert not pretraining("halves", **CHOICES[name], run__stop_at=2).run()
    assert pretraining("halves", **CHOICES[name], resume=True).run()
    whole, halves = latest(tmp_path / "whole"), latest(tmp_path / "halves")
    assert_states_equal(whole["model"], halves["model"])
    assert whole["optimizer"]["param_groups"] == halves["optimizer"]["param_groups"]
    for index, moments in whole["optimizer"]["state"].items():
        assert_states_equal(moments, halves["optimizer"]["state"][index])
    assert [row["step"] for row in rows(tmp_path / "halves") if row["kind"] == "train"] == [1, 2, 3]
    assert [row["step"] for row in rows(tmp_path / "halves") if row["kind"] == "run"] == [0, 2]
    assert bool(stand_ins.calls) == (name == "flash")


@pytest.mark.parametrize("name", NOT_OURS)
def test_a_run_by_others_is_ours(installed, pretraining, tmp_path, name):
    clipped = {"optimizer__max_grad_norm": 1.0}
    pretraining("ours", **clipped).run()
    pretraining("theirs", **{**NOT_OURS[name], **clipped}).run()
    ours, theirs = (latest(tmp_path / which)["model"] for which in ("ours", "theirs"))
    for key, weight in ours.items():
        torch.testing.assert_close(theirs[key], weight, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_the_log_and_the_metrics_say_what_was_chosen(installed, pretraining, tmp_path, capsys):
    pretraining(**CHOICES["flash"], run__layer_norm="apex", optimizer__name="apex").run()
    expected = {"backend": "flash (flash-attn 2.8.3.post2)", "layer_norm": "apex", "optimizer": "apex"}
    assert rows(tmp_path / "run")[0] == {"kind": "run", "step": 0, **expected}
    line = "backend flash (flash-attn 2.8.3.post2), layer norm apex, optimizer apex"
    assert line in "".join(capsys.readouterr())


def test_steps_run_on_flash_attn_and_retrieval_in_float32_beside_it(installed, monkeypatch, pretraining, caplog):
    monkeypatch.setattr(flash, "DTYPES", {torch.bfloat16})
    monkeypatch.setattr(attention, "_reported", set())
    assert pretraining(**CHOICES["flash"], model__dropout=0.1, evaluation__rerank=2).run()
    assert {call[1] for call in stand_ins.calls} == {0.0, 0.1}
    assert "torch.float32 tensors takes the backend auto" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            CHOICES["flash"],
            r"run\.backend: got 'flash', but flash-attn is not installed: .*; tensors on cpu, .*; or set it",
        ),
        (
            CHOICES["layer_norm"],
            r"run\.layer_norm: got 'apex', but apex is not installed: build NVIDIA's apex .*; tensors",
        ),
        (CHOICES["optimizer"], r"optimizer\.name: got 'apex', but apex is not installed: .*; or set it to adamw"),
    ],
)
def test_without_the_library_nothing_is_begun(monkeypatch, pretraining, tmp_path, changes, message):
    stand_ins.look_again(monkeypatch)
    with pytest.raises(UserError, match=message) as error:
        pretraining(**changes)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_cpu_is_refused(installed, monkeypatch, pretraining):
    for library in (apex, flash):
        monkeypatch.setattr(library, "DEVICE_TYPES", {"cuda"})
    for changes in CHOICES.values():
        with pytest.raises(UserError, match=r"tensors on cpu, (apex|flash-attn) needs a CUDA GPU; or set it to"):
            pretraining(**changes)


def test_flash_attn_needs_half_precision(installed, pretraining):
    expected = r"got 'flash' with run\.precision=float32, but .*; set run\.precision=bfloat16, or run\.backend=auto"
    with pytest.raises(UserError, match=expected):
        pretraining(run__backend="flash")


@pytest.mark.parametrize(("before", "after"), [("adamw", "apex"), ("apex", "adamw")])
def test_no_optimizer_goes_on_with_the_state_of_another(installed, pretraining, before, after):
    pretraining(optimizer__name=before, run__stop_at=1).run()
    with pytest.raises(UserError, match=f"optimizer.name was '{before}' and is now '{after}'; resume with the same"):
        pretraining(optimizer__name=after, resume=True)


# -- the optimizer by itself -------------------------------------------------------------------------------------------


def test_apexs_update_is_that_of_torch(installed, make_model, make_batch):
    """Over the published groups, with decay."""
    models, batch = [make_model(seed=1) for _ in range(2)], make_batch()
    optimizers = []
    for model, name in zip(models, ("adamw", "apex"), strict=True):
        optimizer = build_optimizer(model, OptimizerConfig(1e-3, weight_decay=0.1, name=name))
        for _ in range(3):
            optimizer.zero_grad()
            model(batch, seed=0).total.backward()
            optimizer.step()
        optimizers.append(optimizer)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert [steps_taken(optimizer) for optimizer in optimizers] == [3, 3]
    names = [[(group["name"], group["base_lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    assert (
        names[0] == names[1] == [(g["name"], g["base_lr"]) for g in parameter_groups(models[0], OptimizerConfig(1e-3))]
    )


def test_no_step_is_taken_yet(installed, make_model):
    for name in ("adamw", "apex"):
        assert steps_taken(build_optimizer(make_model(), OptimizerConfig(name=name))) == 0
