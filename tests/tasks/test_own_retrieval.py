"""Retrieval on a folder of one's own, of pictures and of clips, from the tables to the metrics of the test split."""

import json
import random

import pytest
from PIL import Image

import answerable
from look_alikes.tree import encoded
from sclkern.cli import main
from sclkern.data.sources.arrow import write_pairs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def picture(generator):
    return encoded(Image.new("RGB", (32, 32), tuple(generator.choices(range(256), k=3))), "PNG")


@pytest.mark.parametrize("task", ["image-retrieval", "video-retrieval"])
def test_a_folder_of_ones_own(task, tmp_path, capsys):
    generator, clips = random.Random(0), task == "video-retrieval"
    for split, count in {"train": 40, "val": 8, "test": 6}.items():
        content = [[picture(generator) for _ in range(3)] if clips else picture(generator) for _ in range(count)]
        name = "frames" if clips else "image"
        rows = [{name: one, "caption": [f"{split} {number}"]} for number, one in enumerate(content)]
        write_pairs(tmp_path / f"{split}.arrow", rows)
    few = {"task__epochs": "null", "task__val_epochs": "null", "run__max_steps": 2}
    settings = answerable.overrides(
        data__root=tmp_path, run__output_dir=tmp_path / "run", run__batch_size=4, task__global_batch=4, **few
    )
    checkpoint = answerable.checkpoint(tmp_path / "checkpoint")
    assert main(["finetune", task, "--checkpoint", str(checkpoint), *settings]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["tables"] == ["val"]
    capsys.readouterr()
    start = ["evaluate", task, "--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path), "run.device=cpu"]
    assert main([*start, "--split", "test"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["chance_text_to_image_r1"] == pytest.approx(1 / 6)
    assert values["rsum"] > 0
