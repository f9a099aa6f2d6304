"""Batches of a task: one order for all factors of the global batch, and pictures that cannot be decoded."""

import json
import pickle

import pyarrow as pa
import pytest
import torch

from sclkern.data.frames import FrameSampling
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.errors import UserError
from sclkern.tasks.batches import TaskBatches, TaskLoader
from sclkern.tasks.registered import TASKS
from tiny_run import image_file

TASK = TASKS["vqav2"]


def write_table(folder, broken=(), rows=6):
    """Two questions on each of some pictures; the picture of a broken row is no picture."""
    pictures = [b"no picture" if row in broken else image_file((40 * row, 0, 0)) for row in range(rows)]
    columns = {
        "image": pictures,
        "questions": [[f"what is it {row}", f"is it {row}"] for row in range(rows)],
        "answer_labels": [[[0], [1, 2]]] * rows,
        "answer_scores": [[[1.0], [0.3, 0.9]]] * rows,
        "question_id": [[10 * row, 10 * row + 1] for row in range(rows)],
    }
    table = pa.table(columns)
    with pa.ipc.new_file(folder / "t.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    (folder / "vqav2_answers.json").write_text(json.dumps(["red", "yes", "no"]))
    return TASK.open(folder, ["t"])


def loader(source, choose_frames=None, **options):
    transform, tokenizer = build_transform("clip_test", 32), CaptionTokenizer.from_pretrained("demo")
    batches = TaskBatches(
        TASK, source, tokenizer, transform, max_text_len=16, min_size=8, seed=3, choose_frames=choose_frames
    )
    return TaskLoader(batches, seed=3, **options)


def test_samples_are_read_and_pickled(tmp_path):
    source = pickle.loads(pickle.dumps(write_table(tmp_path)))
    assert (source.num_samples, source.num_images) == (12, 6)
    assert source.text(9) == "is it 4" and source.scores(9) == {1: 0.3, 2: 0.9}
    assert source.question_ids()[8:10] == [40, 41]
    batch = next(loader(source, batch_size=5).in_order())
    assert batch["image"].shape == (5, 3, 32, 32) and batch["text_ids"].shape[1] % 8 == 0
    torch.testing.assert_close(batch["targets"][1], torch.tensor([0.0, 0.3, 0.9]))


def test_a_global_batch_is_the_same_for_all_its_factors(tmp_path):
    source = write_table(tmp_path)
    steps = loader(source, batch_size=4, accumulation=2).steps(start=1)
    whole = torch.cat([next(steps)["pair"] for _ in range(2)])
    for rank in range(2):
        own = loader(source, batch_size=4, rank=rank, world_size=2).steps(start=1)
        batch = next(own)
        assert batch["place"].tolist() == list(range(4 * rank, 4 * rank + 4))
        assert torch.equal(batch["pair"], whole[batch["place"]])


def test_every_sample_is_answered_once_by_any_number_of_ranks(tmp_path):
    source = write_table(tmp_path)
    for world in (1, 2, 3):
        found = {}
        for rank in range(world):
            of_rank = loader(source, batch_size=5, rank=rank, world_size=world)
            for number, batch in zip(of_rank.numbers(), of_rank.in_order(), strict=True):
                found[number] = batch["pair"].tolist()
        assert [pair for number in sorted(found) for pair in found[number]] == list(range(12))


def test_a_picture_that_cannot_be_decoded_is_skipped_in_training_and_grey_in_an_evaluation(tmp_path):
    source = write_table(tmp_path, broken=(2,))
    steps = loader(source, batch_size=12).steps()
    batch = next(steps)
    assert list(batch["undecodable"]) == ["t.arrow row 2"]
    assert set(batch["pair"].tolist()) == set(range(12)) - {4, 5}
    batch = next(loader(source, batch_size=12).in_order())
    assert batch["pair"].tolist() == list(range(12)) and list(batch["undecodable"]) == ["t.arrow row 2"]
    assert batch["image"][4].std((1, 2)).max() < 1e-6


def test_a_clip_that_cannot_be_decoded_has_as_many_frames_as_the_others(tmp_path):
    source = write_table(tmp_path, broken=(2,))
    source.frames = lambda image, choose: [source.image(image)] * len(choose(9))
    batch = next(loader(source, FrameSampling(3), batch_size=12).in_order())
    assert batch["image"].shape == (12, 3, 3, 32, 32) and list(batch["undecodable"]) == ["t.arrow row 2"]


def test_only_broken_pictures_are_an_error_of_one_line(tmp_path):
    source = write_table(tmp_path, broken=range(6))
    with pytest.raises(UserError, match=r"6 images in a row cannot be decoded, the first is t\.arrow row"):
        next(loader(source, batch_size=4).steps())


def test_labels_of_another_answer_table_are_refused(tmp_path):
    write_table(tmp_path)
    (tmp_path / "vqav2_answers.json").write_text(json.dumps(["red", "yes"]))
    with pytest.raises(UserError, match=r"t\.arrow: has the label 2, expected 0 to 1 of the 2 answers"):
        TASK.open(tmp_path, ["t"])
    with pytest.raises(UserError, match=r"t\.arrow: no column 'image_0'"):
        TASKS["nlvr2"].open(tmp_path, ["t"])
