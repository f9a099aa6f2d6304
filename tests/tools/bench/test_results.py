"""The page of results: published figures with their sources, ours from records alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sclkern.cli import main
from sclkern.tools.bench import records, report, results

ROOT = Path(__file__).parents[3]
PAGE = "<!-- sclkern bench report: begin results -->\nold\n" + report.END + "\n"


def result(task="vqav2", tables=("vqav2_test",), recipe="default", values=None, **changes) -> dict:
    found = {"task": task, "recipe": recipe, "tables": list(tables), "samples": 12, "digest": "0123456789abcdef"}
    found |= {"model": {"image_size": 384}, "precision": "bfloat16", "device": "h200", "commit": "1234abc"}
    return {**found, "values": values or {}, **changes}


@pytest.fixture
def recorded(tmp_path):
    """recorded(name, result, *scores) -> the exit status of recording it."""

    def run(name, found, *scores):
        file = tmp_path / "results.json"
        file.write_text(json.dumps(found))
        return main(["bench", "record", name, str(file), *scores, "--output", str(tmp_path / "records")])

    return run


def lines_of(tmp_path, title):
    """The rows of a table of the page, without its heading."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert main(["bench", "report", str(tmp_path / "records"), "--update", str(page)]) == 0
    table = page.read_text().split(f"### {title}")[1].split("\n\n")[1]
    return [line for line in table.splitlines() if line.startswith("| s") or line.startswith("| SCL")]


def test_the_committed_page_is_what_the_records_and_published_figures_say():
    text = (ROOT / "docs" / "results.md").read_text()
    listed = ["git", "-C", str(ROOT), "ls-files", "--", "benchmarks/results/*.jsonl"]
    files = subprocess.run(listed, capture_output=True, text=True).stdout.split()
    rows = records.read([ROOT / name for name in files] or [records.RESULTS])
    assert text == report.embed(text, rows), "write it again: sclkern bench report --update docs/results.md"


def test_every_published_figure_has_a_source_and_a_column():
    keys = {column.key for table in results.TABLES for column in table.columns}
    for model in json.loads(results.PUBLISHED.read_text()):
        for figures in model["figures"]:
            assert figures["source"] and set(figures["values"]) <= keys
            assert all(0 <= value <= 100 for value in figures["values"].values())


def test_columns_are_of_tables_and_metrics_that_tasks_have():
    from sclkern.tasks.registered import TASKS

    for column in (column for table in results.TABLES for column in table.columns):
        if column.task in TASKS:
            assert (column.table,) in TASKS[column.task].splits.values(), column


def test_a_model_is_shown_below_the_published_ones(tmp_path, recorded, capsys):
    assert recorded("base", result(), "test_dev=0.7654", "test_std=0.77") == 0
    assert "recorded in" in capsys.readouterr().out
    assert recorded("base", result(tables=["vqav2_val"], values={"vqa_accuracy": 0.75})) == 0
    # Trained on most of that split.
    published = result(tables=["vqav2_val"], recipe="published", values={"vqa_accuracy": 0.9})
    assert recorded("base", published) == 0
    assert recorded("base", result("nlvr2", ["nlvr2_dev"], values={"accuracy": 0.81234})) == 0
    assert lines_of(tmp_path, "Visual question answering") == [
        "| SCL, published | 78.72 | 78.78 |  | 83.63 | 84.27 |",
        "| sclkern base, recipe default | 76.54 | 77.00 | 75.00 | 81.23 |  |",
    ]
    text = (tmp_path / "page.md").read_text()
    assert "| base | vqav2 | default | vqav2_test | 12 | 0123456789ab | 384 | bfloat16 | h200 | 1234abc |" in text
    assert list((tmp_path / "records").glob("h200/*-1234abc.jsonl"))


def test_zero_shot_and_fine_tuned_models_have_tables_of_their_own(tmp_path, recorded):
    values = {f"rank_{way}_r{k}": k / 100 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert recorded("base", result("flickr30k", ["f30k_caption_karpathy_test"], "zero-shot", values)) == 0
    better = {name: value + 0.5 for name, value in values.items()}
    assert recorded("base", result("flickr30k", ["f30k_caption_karpathy_test"], values=better)) == 0
    # Of another split: no row.
    assert recorded("other", result("flickr30k", ["f30k_caption_karpathy_val"], values=better)) == 0
    empty = " |" * 6
    expected = f"| sclkern base | 1.0 | 5.0 | 10.0 | 1.0 | 5.0 | 10.0 | {empty[1:]}".replace("| |", "|  |")
    assert lines_of(tmp_path, "Image-text retrieval, zero-shot")[1:] == [expected.replace("| |", "|  |")]
    assert "recipe default | 51.0 | 55.0 | 60.0 |" in lines_of(tmp_path, "Image-text retrieval, fine-tuned")[1]


def test_a_later_record_replaces_an_earlier_one(tmp_path, recorded):
    for accuracy in (0.5, 0.6):
        assert recorded("base", result("nlvr2", ["nlvr2_test1"], values={"accuracy": accuracy})) == 0
    assert lines_of(tmp_path, "Visual question answering")[1].endswith("|  | 60.00 |")


@pytest.mark.parametrize(
    ("name", "changes", "scores", "message"),
    [
        ("base", {}, (), "has no metric, expected one or more; add test_dev=0.7872"),
        ("base", {}, ("test_dev=78.72",), "test_dev: got '78.72', expected a fraction from 0 to 1"),
        ("base", {}, ("accuracy=0.5",), "scores: got 'accuracy=0.5', expected one of test_dev, test_std"),
        ("base", {"task": "nlvr2"}, ("test_dev=0.5",), "expected none: nlvr2 has no server"),
        ("a|b", {}, ("test_dev=0.5",), "NAME: got 'a|b', expected a name of the model"),
        ("base", {"commit": None}, (), "has no 'commit', expected results.json of sclkern finetune or evaluate"),
    ],
)
def test_what_cannot_be_recorded_is_named(tmp_path, recorded, capsys, name, changes, scores, message):
    assert recorded(name, result(**changes), *scores) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_a_file_that_is_no_result_is_refused(tmp_path, capsys):
    assert main(["bench", "record", "base", str(tmp_path / "no.json"), "--output", str(tmp_path)]) == 2
    assert "no.json: cannot be read" in capsys.readouterr().err
