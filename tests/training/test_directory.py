"""A folder that holds anything of a run is never started over in silence, and a run goes on only as it was."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from same_state import assert_states_equal
from sclkern.data import demo_root, open_pairs
from sclkern.data.digest import digest
from sclkern.data.sources.arrow import write_pairs
from sclkern.errors import UserError
from sclkern.training.checkpoint import load_checkpoint, save_checkpoint
from sclkern.training.config import load_config
from sclkern.training.directory import lock_directory
from sclkern.training.pretraining import Pretraining
from tiny_run import NO_LAYERS, overrides, rows, small_data

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**NO_LAYERS, "run__max_steps": 4, "evaluation__rerank": 0}


def checkpoint(directory, name="latest"):
    return directory / "checkpoints" / f"{name}.pt"


def metrics(directory, name="metrics.jsonl"):
    """Rows of steps and validations."""
    rows = map(json.loads, (directory / name).read_text().splitlines())
    return [row for row in rows if row["kind"] != "run"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def pretraining(pretraining, small):
    return lambda name="run", **changes: pretraining(name, **{**small, **changes})


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, small):
    directory = tmp_path_factory.mktemp("stopped") / "run"
    options = overrides(directory, **TINY, **small, run__val_every=2, run__stop_at=3)
    Pretraining(load_config(None, options)).run()
    return directory


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """Folder of a run that stopped at step 3, its best checkpoint of step 2."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def test_a_run_without_its_latest_checkpoint_goes_on_from_the_best(pretraining, stopped, tmp_path, caplog):
    options = {**TINY, "run__val_every": 2}
    for name in ("latest", "step-00000002"):
        checkpoint(stopped, name).unlink()
    with pytest.raises(UserError, match=r"already holds a run; .* \(there are checkpoints/best\.pt, metrics\.jsonl\)"):
        pretraining(**options)
    assert pretraining(**options, resume=True).run()
    assert "no latest.pt; goes on from best.pt, of step 2" in caplog.text
    assert pretraining("whole", **options).run()
    assert_states_equal(
        load_checkpoint(checkpoint(stopped))["model"], load_checkpoint(checkpoint(tmp_path / "whole"))["model"]
    )
    steps = [(row["kind"], row["step"]) for row in metrics(stopped)]
    assert steps == [("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4)]


@pytest.mark.parametrize("damaged", [True, False])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(pretraining, stopped, tmp_path, caplog, damaged):
    options = {**TINY, "run__val_every": 2}
    content = checkpoint(stopped).read_bytes()
    checkpoint(stopped).unlink()
    if damaged:
        checkpoint(stopped).write_bytes(content[: len(content) // 2])
    run = pretraining(**options, resume=True)
    assert run.state.step == 2
    why = "latest.pt is damaged" if damaged else "no latest.pt"
    assert f"{why}; goes on from step-00000002.pt, of step 2" in caplog.text
    assert run.run()
    left = ["best.pt", "latest.pt", "step-00000002.pt"] + ["latest.pt.damaged"] * damaged
    assert sorted(file.name for file in (stopped / "checkpoints").iterdir()) == sorted(left)
    assert pretraining("whole", **options).run()
    assert_states_equal(
        load_checkpoint(checkpoint(stopped))["model"], load_checkpoint(checkpoint(tmp_path / "whole"))["model"]
    )


def test_a_run_of_damaged_checkpoints_only_is_refused(pretraining, stopped):
    for file in (stopped / "checkpoints").iterdir():
        flip(file)
    with pytest.raises(UserError, match=r"latest\.pt: not a whole checkpoint"):
        pretraining(**TINY, run__val_every=2, resume=True)


def test_rows_without_a_checkpoint_are_kept(pretraining, stopped, caplog):
    for name in ("latest", "step-00000002", "best"):
        checkpoint(stopped, name).unlink()
    before = metrics(stopped)
    with pytest.raises(UserError, match=r"already holds a run; add --resume .* \(there are metrics\.jsonl\)"):
        pretraining(**TINY)
    pretraining(**TINY, resume=True, run__stop_at=1).run()
    assert "no checkpoint to go on from, starts at step 0; the rows there are now metrics.1.jsonl" in caplog.text
    assert metrics(stopped, "metrics.1.jsonl") == before and len(metrics(stopped)) == 1


@pytest.mark.parametrize("name", ["model/model.safetensors", "report.md", "checkpoints/latest.old.pt"])
def test_an_exported_model_and_a_report_are_not_replaced(pretraining, tmp_path, name):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("of a run")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"of a run, but neither latest\.pt nor best\.pt to go on from; "):
            pretraining(**TINY, resume=resume)


def test_a_start_that_failed_is_no_run(pretraining, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("# mine\nrun:\n  max_steps: 4\n")
    with pytest.raises(UserError, match="no such folder"):
        pretraining(**TINY, data__root=tmp_path / "nowhere")
    (tmp_path / "run" / "metrics.jsonl").write_text("")  # killed before the first step
    pretraining(**TINY, run__stop_at=1).run()
    # A file of the user's is not lost either.
    assert (tmp_path / "run" / "config.1.yaml").read_text().startswith("# mine")
    assert "the file there is now config.1.yaml" in caplog.text


@pytest.mark.parametrize("name", ["model", "checkpoints", "metrics.jsonl"])
def test_a_name_that_is_taken_by_something_else_is_refused_before_any_work(pretraining, tmp_path, name):
    path = tmp_path / "run" / name
    if "." in name:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir()
        path.touch()
    kinds = "a folder, expected a file" if "." in name else "a file, expected a folder"
    with pytest.raises(UserError, match=rf"run/{name}: got {kinds}, which the run writes; rename it, or give another"):
        pretraining(**TINY)
    assert {file.name for file in path.parent.iterdir()} == {name, ".lock"}


def test_two_processes_do_not_write_one_folder(pretraining, tmp_path):
    (tmp_path / "run").mkdir()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    holder += "; input()"
    command = [sys.executable, "-c", holder, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another process writes this run; wait until it has ended"):
            pretraining(**TINY)
        process.communicate("\n")
    pretraining(**TINY)


def test_the_step_that_another_process_saves_last_is_not_lost(pretraining, stopped, monkeypatch):
    """The other process lets go of the folder just before this one could lock it."""
    later = checkpoint(stopped).read_bytes()
    shutil.copy(checkpoint(stopped, "best"), checkpoint(stopped))

    def lock(directory):
        checkpoint(stopped).write_bytes(later)
        return lock_directory(directory)

    monkeypatch.setattr("sclkern.training.loop.lock_directory", lock)
    assert pretraining(**TINY, run__val_every=2, resume=True).state.step == 3


def test_a_run_that_has_reached_its_stop_says_so(pretraining, stopped, caplog):
    for stop_at in (3, 2):
        assert not pretraining(**TINY, run__val_every=2, run__stop_at=stop_at, resume=True).run()
        assert f"nothing to do: step 3 is saved, and run.stop_at is {stop_at}; raise it" in caplog.text
    assert pretraining(**TINY, run__val_every=2, run__stop_at="null", resume=True).run()


def test_rows_of_another_form_are_left_out(pretraining, stopped):
    before = metrics(stopped)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": "3"}\n{"kind": [], "step": 3}\n{"kind": "val", "step": null}\n[]\n')
    pretraining(**TINY, run__val_every=2, resume=True).run()
    assert metrics(stopped)[: len(before)] == before


def test_files_of_the_user_are_not_taken_for_left_overs(pretraining, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".notes.tmp", ".config.yaml.123.tmp", ".config.yaml.123-host-0a1b.tmp"):
        (tmp_path / "run" / name).write_text("")
    pretraining(**TINY)
    assert [file.name for file in (tmp_path / "run").glob(".*.tmp")] == [".notes.tmp"]


def table(tmp_path, pairs, name="t"):
    write_pairs(tmp_path / f"{name}.arrow", pairs)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pairs: [*pairs, pairs[0]], r"the training data were 40 pairs of 40 images and are now 41 pairs of 41"),
        (lambda pairs: [*pairs[:7], {**pairs[7], "caption": ["x"]}, *pairs[8:]], r"training data have other captions"),
        (lambda pairs: pairs[::-1], r"the training data have other captions than at the start, or in another order"),
        (lambda pairs: [{**pairs[0], "caption": ["a", "b"]}, *pairs[1:]], r"are now 41 pairs of 40 images"),
    ],
    ids=["more", "a caption", "order", "captions of an image"],
)  # fmt: skip
def test_other_data_are_refused(pretraining, tmp_path, change, problem):
    options = {**TINY, "data__root": tmp_path, "data__train_tables": "[t]", "data__val_tables": "[v]"}
    options |= {"data__val_split": "train"}
    table(tmp_path, rows())
    table(tmp_path, rows(8), "v")
    pretraining(**options, run__stop_at=1).run()
    before = checkpoint(tmp_path / "run").read_bytes()
    table(tmp_path, change(rows()))
    with pytest.raises(
        UserError, match=rf"latest\.pt: .*{problem}.*; resume over the data of the run, or start"
    ) as raised:
        pretraining(**options, resume=True)
    assert "\n" not in str(raised.value) and checkpoint(tmp_path / "run").read_bytes() == before
    # Pictures that were repaired, and rows of another split, change no pair.
    table(tmp_path, [{**rows(1)[0], "split": "val"}, *({**row, "image": rows()[0]["image"]} for row in rows())])
    pretraining(**options, resume=True, run__stop_at=2).run()
    table(tmp_path, rows(9), "v")
    with pytest.raises(UserError, match=r"the held-out data were 8 pairs of 8 images and are now 9 pairs of 9 images"):
        pretraining(**options, resume=True)


def test_another_tokenizer_is_refused(pretraining, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (demo_root() / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    options = {**TINY, "data__tokenizer": folder}
    pretraining(**options, run__stop_at=1).run()
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:100]  # the same words and ids, put together otherwise
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"latest\.pt: the tokenizer gives other ids than at the start"):
        pretraining(**options, resume=True)


def test_a_reader_may_count_and_name_with_numpy(pretraining, tmp_path, monkeypatch):
    class Numpy:
        """A source whose attributes and names are numpy's scalars."""

        def __init__(self, source):
            self.source = source
            self.num_pairs, self.num_images = np.int64(source.num_pairs), np.int64(source.num_images)
            self.digest = np.str_(source.digest)

        def __getattr__(self, name):
            return getattr(self.source, name)

        def image_name(self, image):
            return np.str_(self.source.image_name(image))

    def opened(*arguments, **options):
        return Numpy(open_pairs(*arguments, **options))

    monkeypatch.setattr("sclkern.training.sources.open_pairs", opened)
    pairs = rows(8)
    table(tmp_path, [{**pairs[0], "image": b""}, *pairs[1:]], "n")
    options = {**TINY, "data__root": tmp_path, "data__train_tables": "[n]", "data__val_tables": "[n]"}
    options |= {"data__val_split": "train"}
    pretraining(**options, run__stop_at=1).run()
    assert len(load_checkpoint(checkpoint(tmp_path / "run"))["bad_pictures"]["names"]) == 1
    assert pretraining(**options, resume=True).run()


def test_a_checkpoint_of_before_still_goes_on(pretraining, stopped):
    state = load_checkpoint(checkpoint(stopped))
    for later in ("data", "validated", "format"):
        del state[later]
    save_checkpoint(checkpoint(stopped), state)
    assert pretraining(**TINY, run__val_every=2, resume=True).run()


def test_the_digest_is_that_of_pairs_and_captions(tmp_path):
    class Wrapped:
        """Another format of the same pairs, whose groups have other ids."""

        def __init__(self, source):
            self.pair_image, self.pair_group = source.pair_image, 7 - source.pair_group
            self.caption = source.caption

    pairs = [{**row, "caption": ["a cat", f"number {i}"]} for i, row in enumerate(rows(5))]
    table(tmp_path, pairs)
    source = open_pairs(tmp_path, ["t"], "train")
    assert digest(source) == digest(Wrapped(source)) == source.digest and len(source.digest) == 32


def damage(change):
    def apply(path):
        state = load_checkpoint(path)
        change(state)
        del state["format"]
        save_checkpoint(path, state)

    return apply


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (damage(lambda s: s["model"]["itm_head.weight"].fill_(torch.nan)), r"is damaged: itm_head\.weight or its mom"),
        (damage(lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(torch.inf)), r"is damaged: .* or its moments"),
        (damage(lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3))), r"is damaged: .* another shape"),
        (damage(lambda s: s["model"].popitem()), r"is damaged, or not of this model \(RuntimeError: .*Missing key"),
        (damage(lambda s: s["optimizer"]["param_groups"].pop()), r"is damaged, or not of this model \(ValueError"),
        (damage(lambda s: s.update(step="three")), r"is damaged, or not of this model \(ValueError"),
        (damage(lambda s: s.update(step=-2)), r"is damaged: it is of step -2 .* its optimiser has taken 3 steps"),
        (damage(lambda s: s.update(best=torch.nan)), r"is damaged: it is of step 3 with a best score of nan"),
        (damage(lambda s: s["optimizer"]["state"].clear()), r"is damaged: it is of step 3 .* has taken 0 steps"),
        (damage(lambda s: s.pop("optimizer")), r"lacks optimizer"),
        (damage(lambda s: s.update(config=["run"])), r"its configuration cannot be read"),
        (damage(lambda s: s["config"]["run"].update(later=1)), r"its configuration cannot be read .*key 'run\.later'"),
    ],
)  # fmt: skip
def test_a_checkpoint_damaged_inside_is_refused(pretraining, stopped, change, problem):
    change(checkpoint(stopped))
    remedy = "; remove it to go on from step-00000002.pt with --resume, or start in another folder"
    with pytest.raises(UserError, match=rf"latest\.pt: {problem}.*{remedy}$") as raised:
        pretraining(**TINY, run__val_every=2, resume=True)
    assert "\n" not in str(raised.value)


def test_no_byte_can_change_unnoticed(pretraining, stopped):
    path = checkpoint(stopped)
    content, whole = path.read_bytes(), load_checkpoint(path)
    for position in range(3, len(content), len(content) // 150):
        changed = bytearray(content)
        changed[position] ^= 0x41
        path.write_bytes(changed)
        try:
            state = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        # Padding between the parts holds nothing.
        assert_states_equal(state["model"], whole["model"])
        assert {k: v for k, v in state.items() if k not in ("model", "optimizer")} == {
            k: v for k, v in whole.items() if k not in ("model", "optimizer")
        }


def test_what_is_advised_about_undecodable_images_works(pretraining, tmp_path):
    options = {**TINY, "data__root": tmp_path, "data__train_tables": "[bad]", "data__val_tables": "[good]"}
    options |= {"data__val_split": "train", "run__max_steps": 6, "run__save_every": 0}
    pairs = rows(24)
    broken = [{**row, "image": b"none"} if i % 8 == 0 else row for i, row in enumerate(pairs)]
    table(tmp_path, pairs, "good")
    table(tmp_path, broken, "bad")
    with pytest.raises(
        UserError, match=r"of 24 images cannot be decoded, .*; repair them and --resume, or remove them"
    ):
        pretraining(**options).run()
    with pytest.raises(UserError, match=r"of 24 images cannot be decoded"):
        pretraining(**options, resume=True).run()
    table(tmp_path, pairs, "bad")
    assert pretraining(**options, resume=True).run()


def test_what_is_advised_about_a_loss_that_is_not_finite_works_before_a_step_is_saved(pretraining):
    options = {**TINY, "run__max_steps": 40, "run__save_every": 0}
    with pytest.raises(
        UserError, match=r"is not finite; no step was saved; lower optimizer\.learning_rate .* then --resume"
    ):
        pretraining(**options, optimizer__learning_rate=1e18).run()
    assert pretraining(**options, optimizer__learning_rate=1e-4, resume=True, run__stop_at=1).run() is False
