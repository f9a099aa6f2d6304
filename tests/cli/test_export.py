"""``sclkern export``: the model of a run, or of one of its checkpoints, in both formats."""

import pytest
import torch

from same_state import assert_states_equal
from sclkern import SCLModel
from sclkern.cli import main
from sclkern.training.checkpoint import load_checkpoint
from sclkern.training.config import load_config
from sclkern.training.pretraining import Pretraining
from tiny_run import NO_LAYERS, overrides, small_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = overrides(folder / "run", **{**NO_LAYERS, "run__max_steps": 2, "run__save_every": 1, "run__stop_at": 2},
                        **small_data(folder), evaluation__rerank=0)  # fmt: skip
    Pretraining(load_config(None, options)).run()
    return folder / "run"


def test_the_newest_checkpoint_of_a_run(run, tmp_path, capsys):
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: step 2 of {run / 'checkpoints' / 'latest.pt'}\n"
    model = SCLModel.from_pretrained(tmp_path / "out")
    assert_states_equal(model.state_dict(), load_checkpoint(run / "checkpoints" / "latest.pt")["model"])
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_one_checkpoint_under_the_published_names(run, tmp_path):
    source = run / "checkpoints" / "step-00000001.pt"
    assert main(["export", str(source), "--output", str(tmp_path), "--format", "published"]) == 0
    state = load_checkpoint(source)
    model = SCLModel.from_reference(tmp_path / "model.ckpt", strict=False)
    assert torch.equal(model.text.word.weight, state["model"]["text.word.weight"])


def test_what_is_no_checkpoint(run, tmp_path, capsys):
    for source, problem in ((tmp_path, "no such checkpoint"), (run / "config.yaml", "not a whole checkpoint")):
        assert main(["export", str(source), "--output", str(tmp_path / "out")]) == 2
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
