"""One bad picture stops nothing: not the run, nor validation, retrieval, report and maps of a small held-out set."""

import logging

import matplotlib.image
import numpy as np
import pytest

from image_files import bitmap, tiff
from sclkern.data.sources.arrow import write_pairs
from sclkern.errors import UserError
from tiny_run import image_file, rows

BITMAP = bitmap(np.zeros((20, 20, 4)))
BAD = {
    "1 x 1": image_file(size=(1, 1)),
    "1 x 2000": image_file(size=(1, 2000)),
    "empty": b"",
    "null": None,
    "cut short": image_file()[:60],
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "without a scale": tiff(np.ones((40, 40), np.float32), sample_format=3),
    "bomb": BITMAP[:18] + b"\0\0\1\0" * 2 + BITMAP[26:],  # 65536 x 65536 by its header
}


def tables(folder, train, held_out, *, bad_held_out=b""):
    """Tables "train" with these images in place of its first ones, and "val", whose second image is bad."""
    for name, count, replaced in (("train", 100 * len(train), [*train]), ("val", held_out, [None, bad_held_out])):
        content = rows(count)
        for row, image in enumerate(replaced):
            if name == "train" or row == 1:
                content[row]["image"] = image
        write_pairs(folder / f"{name}.arrow", content)
    tables = {"data__train_tables": "[train]", "data__val_tables": "[val]", "data__val_split": "train"}
    return {"data__root": folder, **tables}


def test_bad_pictures_are_named_counted_and_skipped(pretraining, tmp_path, caplog):
    settings = tables(tmp_path, BAD.values(), 6, bad_held_out=BAD["1 x 1"])
    with caplog.at_level(logging.WARNING, "sclkern.data"):
        run = pretraining(**settings, run__max_steps=2, evaluation__train_images=100 * len(BAD))
        assert run.run()
        report = run.results.report().read_text()
    named = [record.getMessage() for record in caplog.records if record.name == "sclkern.data"]
    start = "skipped an image that cannot be decoded: "
    assert named[0] == f"{start}val.arrow row 1 (1) (the image is 1 x 1 pixels, smaller than a patch (16))"
    assert len(named) == 1 + len(BAD) and "unfolds" in named[-1]
    for row, name in enumerate(named[1:]):
        assert name.startswith(f"{start}train.arrow row {row} ({row}) (") and "()" not in name
    assert f"Undecodable training images, skipped: {len(BAD)}" in report
    assert "Undecodable held-out images, skipped: 1" in report and "| held-out, 5 images, 5 captions |" in report
    assert matplotlib.image.imread(tmp_path / "run" / "attention.png")[..., :3].std() > 0.01


@pytest.mark.parametrize("held_out", [2, 3])
@pytest.mark.parametrize("negatives", ["in_batch", "dataset"])
def test_the_smallest_held_out_sets_with_a_bad_picture(pretraining, tmp_path, held_out, negatives):
    settings = tables(tmp_path, [b""], held_out)
    run = pretraining(**settings, run__max_steps=1, objectives__itm_negatives=negatives)
    if (held_out, negatives) == (2, "dataset"):  # there is no other image
        with pytest.raises(UserError, match=r"1 images in a row cannot be decoded, the first is val\.arrow"):
            run.run()
        assert (tmp_path / "run" / "checkpoints" / "latest.pt").exists()
    else:
        assert run.run()
        assert f"| held-out, {held_out - 1} images" in run.results.report().read_text()


def test_more_than_one_of_a_few_stop_the_run(pretraining, tmp_path):
    write_pairs(tmp_path / "more.arrow", [{**row, "image": b""} for row in rows(1)])
    settings = tables(tmp_path, [b""], 6)
    settings["data__val_tables"] = "[val, more]"
    with pytest.raises(UserError, match="2 of 7 images cannot be decoded, expected 1 % at most, or one"):
        pretraining(**settings, run__max_steps=1).run()
    assert (tmp_path / "run" / "checkpoints" / "latest.pt").exists()


def test_maps_are_left_out_if_nothing_can_be_decoded(pretraining, tmp_path, monkeypatch):
    run = pretraining(**tables(tmp_path, [b""], 6), run__max_steps=1, objectives__recipe="[mlm]")
    assert run.run()

    def broken(image):
        raise OSError("gone")

    monkeypatch.setattr(run.data.val_source, "image", broken)
    assert "## Attention" not in run.results.report().read_text()
