"""The tasks of `make demo-tasks`: their data say what they claim, and each runs from a checkpoint to its figures."""

import itertools
import sys
import types

import numpy as np
import pytest
from PIL import Image

from examples.demo_tasks import clips, pairs, questions, rollouts
from examples.demo_tasks.figures import Figure
from examples.demo_tasks.page import write
from sclkern import SCLConfig, SCLModel
from sclkern.data.roots import resolve_root
from sclkern.data.source import open_pairs
from sclkern.data.sources.arrow import ArrowPairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.tasks.vqav2 import VqaTable

SHORT = {"run.max_steps": 2, "run.val_every": 2, "run.batch_size": 8, "run.device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of the demo's sizes with random weights."""
    folder = tmp_path_factory.mktemp("model")
    SCLModel(SCLConfig.preset("demo").replace(dropout=0.0)).save_pretrained(folder)
    CaptionTokenizer.from_pretrained("demo").save_pretrained(folder)
    return folder


def captions(source) -> set[str]:
    return {source.caption(pair) for pair in range(source.num_pairs)}


def test_held_out_pairs_are_those_that_training_does_not_read(tmp_path):
    held_out = open_pairs(pairs.write(tmp_path), ["test"], format="arrow")
    read = [ArrowPairs(resolve_root("demo"), ["pairs"], split) for split in ("train", "val")]
    assert held_out.num_images == 119
    # The split goes by the first caption; one picture's second is that of another.
    first = {held_out.caption(int(pair)) for pair in np.unique(held_out.pair_image, return_index=True)[1]}
    assert len(first) > 80
    assert not first & set.union(*map(captions, read))


def test_clips_move_and_have_captions_of_their_own():
    source = open_pairs(clips.DATA, ["test"], format="arrow")
    assert (source.num_images, source.num_pairs, len(captions(source))) == (177, 353, 353)
    for clip in range(source.num_images):
        frames = np.stack([np.asarray(frame, np.int16) for frame in source.frames(clip, range)])
        assert frames.shape == (8, 64, 64, 3)
        assert (frames.max(0) - frames.min(0)).max() > 64


def balls(frame: np.ndarray) -> set[str]:
    """Colours of the balls of a frame, by the middle of each cell to the left and right of the agent.

    MiniGrid brightens what the agent sees by three tenths of white.
    """
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "purple": (112, 39, 195),
               "yellow": (255, 255, 0), "grey": (100, 100, 100)}  # fmt: skip
    assert set(colours) == set(rollouts.COLOURS)
    seen, half = set(), rollouts.CELL // 2
    for row, column in itertools.product(range(rollouts.VIEW), (0, rollouts.VIEW - 1)):
        cell = frame[row * rollouts.CELL :, column * rollouts.CELL :][: rollouts.CELL, : rollouts.CELL]
        corner, middle = cell[1, 1].astype(int), cell[half, half].astype(int)
        for name, unlit in colours.items():
            colour = 0.7 * np.array(unlit) + 0.3 * 255
            # A wall is grey up to its corners.
            if np.abs(middle - colour).max() < 5 and np.abs(corner - colour).max() > 5:
                seen.add(name)
    return seen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("colours", [("red", "blue"), ("yellow", "purple"), ("green", "red")])
def test_no_frame_shows_both_balls_and_four_frames_show_them_in_their_order(colours, seed):
    seen = [balls(frame) for frame in rollouts.walk(colours, seed)]
    assert all(len(one) <= 1 for one in seen)
    middles = [seen[int((number + 0.5) * len(seen) / rollouts.FRAMES)] for number in range(rollouts.FRAMES)]
    in_order = [next(iter(one)) for one in middles if one]
    assert [name for name, _ in itertools.groupby(in_order)] == list(colours)


def test_walks_are_written_with_every_caption_equally_often(tmp_path):
    source = open_pairs(rollouts.write(tmp_path, {"test": 72}), ["test"], format="arrow")
    counts = np.bincount(source.pair_group)
    assert counts[counts > 0].tolist() == [2] * 36


@pytest.fixture
def easy_vqa(monkeypatch, tmp_path):
    """A package of 72 and 8 pictures in place of the installed one."""
    names = ("circle", "triangle", "rectangle")

    def made(split, count):
        folder = tmp_path / split
        folder.mkdir()
        for number in range(count):
            Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
        answers = {"what shape is it?": names, "what colour is it?": ["red"], "is it blue?": ["no"]}
        asked = [(text, of[number % len(of)], number) for number in range(count) for text, of in answers.items()]
        return lambda: tuple(map(list, zip(*asked, strict=True))), lambda: {
            number: str(folder / f"{number}.png") for number in range(count)
        }

    package = types.ModuleType("easy_vqa")
    package.get_train_questions, package.get_train_image_paths = made("train", 72)
    package.get_test_questions, package.get_test_image_paths = made("test", 8)
    monkeypatch.setitem(sys.modules, "easy_vqa", package)


def test_questions_are_written_as_vqav2_with_a_part_held_out(easy_vqa, tmp_path):
    folder = questions.write(tmp_path / "vqa")
    train, val, test = (VqaTable(folder, [f"vqav2_{split}"]) for split in ("train", "val", "test"))
    assert (train.num_images, val.num_images, test.num_images) == (63, 9, 8)
    assert set(train.answers) == {"circle", "triangle", "rectangle", "red", "no"}
    assert train.answered and val.answered and not test.answered
    ids = [table.question_ids() for table in (train, val, test)]
    assert sorted(itertools.chain(*ids)) == list(range(240))


def test_the_question_alone_is_answered_by_its_commonest_answer(easy_vqa):
    # The colour and "no" are always right, and one shape of the eight pictures' three.
    assert questions.question_only("test") in {(16 + right) / 24 for right in (2, 3)}


def test_the_package_itself_gives_the_documented_baseline():
    assert questions.question_only("val") == pytest.approx(0.664, abs=5e-4)
    assert questions.question_only("test") == pytest.approx(0.671, abs=5e-4)


def test_training_pictures_have_captions_of_colour_and_shape(easy_vqa, tmp_path):
    train, val = (open_pairs(questions.write_captions(tmp_path), [split], format="arrow") for split in ("train", "val"))
    assert captions(train) == captions(val) == {"red circle", "red triangle", "red rectangle"}
    assert (train.num_images, val.num_images) == (63, 9)


def test_questions_run_to_an_accuracy(easy_vqa, model, monkeypatch, tmp_path):
    for keys in ("CONTRAST_KEYS", "KEYS"):
        monkeypatch.setattr(questions, keys, {**getattr(questions, keys), **SHORT})
    (figure,) = questions.run(model, tmp_path / "questions")
    assert 0 <= figure.percent <= 100
    assert figure.baseline_percent == 100 * questions.question_only("test")


def test_pairs_run_to_recalls(model, tmp_path):
    figures = pairs.run(model, tmp_path)
    assert [figure.metric for figure in figures] == ["R@1", "R@5"]
    assert all(figure.baseline == "chance" and 0 < figure.baseline_percent < 10 for figure in figures)


def test_clips_run_to_recalls(model, tmp_path):
    figures = clips.run(model, tmp_path)
    assert [figure.metric for figure in figures] == ["R@1", "R@5"]
    assert figures[0].baseline_percent == pytest.approx(100 / 177)


def test_rollouts_run_to_the_recalls_of_four_frames_and_of_one(model, monkeypatch, tmp_path):
    monkeypatch.setattr(rollouts, "KEYS", {**rollouts.KEYS, **SHORT})
    monkeypatch.setattr(rollouts, "SPLITS", {"train": 72, "val": 36, "test": 36})
    of_one_frame, of_chance = rollouts.run(model, tmp_path)
    assert of_one_frame.baseline == "trained on 1 frame"
    assert of_chance.baseline_percent == pytest.approx(100 / 36)


def test_the_page_has_each_figure_and_its_difference(tmp_path):
    write(tmp_path / "results.md", [Figure("a task", "a model", "R@1", 12.34, "chance", 2.0)], {"a": 90.0})
    text = (tmp_path / "results.md").read_text()
    assert "| a task | a model | R@1 | 12.3 | chance | 2.0 | +10.3 |" in text
    assert "Minutes: a 1.5, together 1.5." in text
