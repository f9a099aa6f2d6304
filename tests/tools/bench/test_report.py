"""Records: written one by one, read back, shown; and no figure in a document without its record."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from sclkern.cli import main
from sclkern.errors import UserError
from sclkern.tools.bench import ablations, figures, plots, records, report
from sclkern.tools.bench.roofline import measure, planned_table

ROOT = Path(__file__).parents[3]
DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/retrieval.md", "docs/ablations.md")
# A number with a unit of speed, or a ratio of speeds.
FIGURE = re.compile(
    r"\d\s?(?:ms|µs|us|[GMT]B/s|[GT]FLOP/s|TFLOPS|(?:pairs|samples|images|tokens)(?: a second|/s))\b|"
    r"\d(?:x|\u00d7| times) (?:faster|slower|as fast)"
)


def op_record(name: str, seconds: float, size: str = "1024", **changes) -> dict:
    values = {"op": "completion_loss", "size": size, "values": {"N": int(size)}, "dtype": "float32", "pass": "both"}
    values |= {"way": name, "seconds": seconds, "floor_seconds": 1e-3, "roofline_fraction": 1e-3 / seconds}
    return values | {"dropout_p": 0.0, "peak_bytes": None} | changes


def write(folder: Path, *rows: dict) -> Path:
    for row in rows:
        case = f"op/{row['op']}/{row['size']}/{row['dtype']}/{row['pass']}/{row['way']}"
        file = records.append(case, results=folder, **row)
    return file


def test_a_record_holds_what_it_depends_on(tmp_path):
    file = records.append("op/x", results=tmp_path, seconds=1.0)
    assert file.parent == tmp_path / records.device_name()
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"case", "time", "device", "commit", "torch", "triton", "threads", "seconds"} <= set(row)


def test_of_each_case_the_newest_is_read(tmp_path):
    write(tmp_path, op_record("sclkern", 2.0), op_record("eager", 3.0), op_record("sclkern", 1.0))
    rows = records.read([tmp_path])
    assert {row["way"]: row["seconds"] for row in rows} == {"sclkern": 1.0, "eager": 3.0}


def test_a_line_that_was_cut_off_is_left_out_and_a_broken_one_named(tmp_path):
    file = write(tmp_path, op_record("sclkern", 2.0))
    whole = file.read_text()
    file.write_text(whole + whole[:40])
    assert len(records.read([file])) == 1
    file.write_text("not json\n" + whole)
    with pytest.raises(UserError, match=r"\.jsonl:1: not a record"):
        records.read([file])
    with pytest.raises(UserError, match="does not exist"):
        records.read([tmp_path / "nowhere"])


def test_the_table_compares_with_ours(tmp_path):
    library = op_record("cut-cross-entropy", 0.004, without=["bias"], dropout_p=0.1)
    write(tmp_path, op_record("eager", 0.006), op_record("sclkern", 0.002), library)
    table = report.report(records.read([tmp_path]))
    line = next(line for line in table.splitlines() if line.startswith("| completion_loss"))
    assert "| 2 ms | 50% |" in line
    assert "eager 6 ms (3.00x)" in line
    assert "cut-cross-entropy 4 ms (2.00x, no dropout, no bias)" in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2, "2 s"), (0.25, "250 ms"), (0.0123456, "12.3 ms"), (9.87e-6, "9.87 µs"), (3e-8, "0.03 µs")],
)
def test_times_have_three_digits_and_a_unit(seconds, text):
    assert figures.seconds_text(seconds) == text


def test_the_command_writes_tables_and_plots(tmp_path, capsys):
    sizes = [op_record(name, 0.1 * n, str(n), peak_bytes=n**2) for name in ("sclkern", "eager") for n in (1024, 4096)]
    write(tmp_path / "results", *sizes)
    phases = {"fusion": 0.1, "fusion layer 0": 0.1, "loss itm": 0.1, "backward": 0.6, "draw masks": 0.1}
    step = {"rows": 2, "dtype": "float32", "median_seconds": 1.5, "pairs_per_second": 1.3, "phases": phases}
    step |= {"activation_bytes": 2.5e9}
    records.append("step/base/planned", results=tmp_path / "results", **step)
    ratio = {"rows": 2, "dtype": "float32", "ratio": 2.4, "flops_ratio": 2.18, "quotient": 1.1}
    records.append("step_ratio/base/dataset", results=tmp_path / "results", **ratio)
    decoding = {"rows": 4, "width": 640, "height": 480, "pixels": 224, "fastest_other": "torchcodec"}
    decoding |= {"pictures_per_second": {"published": 150, "sclkern": 375.4, "torchcodec": 340}}
    decoding |= {"faster_than_published": 2.5, "faster_than_other": 1.1}
    records.append("decoding/coco/224", results=tmp_path / "results", **decoding)
    clips = {"rows": 4, "frames": 250, "fastest_other": "torchcodec", "faster_than_other": 1.12}
    clips |= {"clips_per_second": {"sclkern": 36.35, "PyAV, all frames": 28, "torchcodec": 32.1}}
    records.append("clips/320x240/250", results=tmp_path / "results", **clips)
    document = tmp_path / "page.md"
    begin = "<!-- sclkern bench report: begin -->"
    document.write_text(f"before\n{begin}\nold\n{report.END}\nafter\n")
    out = tmp_path / "report"
    assert main(["bench", "report", str(tmp_path / "results"), "--output", str(out), "--update", str(document)]) == 0
    printed = capsys.readouterr().out
    assert "base/planned | 2 | float32 | 1.5 s | 1.3 | 2.5 GB |" in printed
    assert "| coco/224 | 640 x 480 to 224 | 375 | 150 | 2.50x | torchcodec 340 | 1.10x |" in printed
    assert "| 320x240/250 | 4 of 250 | 36.4 | torchcodec 32.1 | 1.12x |" in printed
    assert "| base/dataset | 2 | 2.40x | 2.18x | 1.10 |" in printed
    assert document.read_text() == f"before\n{begin}\n{printed.strip()}\n{report.END}\nafter\n"
    device = records.device_name()
    shown = plots.digests(records.read([tmp_path / "results"]))[device]
    for name in ("times", "roofline", "step", "step-ratio", "decoding", "loss-memory"):
        assert (out / f"{device}-{name}.png").stat().st_size > 5000
        assert f"]({device}-{name}.png)" in (out / "report.md").read_text()
        assert Image.open(out / f"{device}-{name}.png").info["Comment"] == shown


def test_a_step_is_grouped_into_phases():
    phases = {
        "fusion": 0.1,
        "fusion layer 0": 0.2,
        "loss itm": 0.1,
        "loss itc": 0.05,
        "backward": 0.5,
        "draw masks": 0.05,
    }
    seconds = report.grouped_phases({"median_seconds": 2.0, "phases": phases})
    assert list(seconds) == list(report.GROUPS)
    assert seconds["fusion"] == pytest.approx(0.6) and seconds["losses"] == pytest.approx(0.3)
    assert seconds["other"] == pytest.approx(0.1) and sum(seconds.values()) == pytest.approx(2.0)


def test_models_are_shown_fused_beside_unfused(tmp_path):
    model = {"model": "vilt", "layers": "two", "rows": 2, "dtype": "float32"}
    records.append("model/vilt/unfused", results=tmp_path, way="unfused", median_seconds=0.3, **model)
    assert "vilt" not in report.report(records.read([tmp_path]))
    records.append("model/vilt/fused", results=tmp_path, way="fused", median_seconds=0.2, **model)
    assert "| vilt | two | 2 | float32 | 300 ms | 200 ms | 1.50x |  |" in report.report(records.read([tmp_path]))
    model |= {"peak_bytes": 2e9}
    for way, seconds in (("unfused", 0.3), ("fused", 0.2)):
        records.append(f"model/vilt/{way}", results=tmp_path, way=way, median_seconds=seconds, **model)
    assert "| 1.50x | 2 GB, 2 GB |" in report.report(records.read([tmp_path]))


def test_pairs_a_second_of_a_retrieval_are_shown(tmp_path):
    rates = {"pairs_a_second": [14.0, 12.0, 13.0], "published_pairs_a_second": [2.0], "ratio": 6.5}
    records.append("retrieval/256", results=tmp_path, dtype="float32", images=2, texts=64, **rates)
    expected = "| 256 channels, 2 images, 64 captions | float32 | 13 | 2 | 6.50x |"
    assert expected in report.report(records.read([tmp_path]))


def test_a_training_run_is_shown(tmp_path):
    records.append("training/demo/encodings", results=tmp_path, rows=1)
    assert report.report(records.read([tmp_path])) == "No records."
    run = {"steps": 300, "batch_size": 64, "precision": "bfloat16", "pairs_per_second": 512.3, "mfu": 0.36}
    run |= {"data_wait_share": 0.02, "peak_bytes": 2e10, "curve": [[1, 20.0], [300, 9.5]]}
    records.append("training/base/fused", results=tmp_path, **run)
    expected = "| base/fused | 300 | 64 | bfloat16 | 512 | 36.0% | 2.0% | 20 GB | 20.00 to 9.50 |"
    assert expected in report.report(records.read([tmp_path]))


def test_ablations_are_shown_with_the_range_over_seeds(tmp_path):
    def validation(itc: float, step: int = 20) -> dict:
        values = {"itc": itc, "itm": 0.5, "chance": 0.01}
        recalls = {f"{m}_{d}_r{k}": r for m, r in values.items() for d in ablations.DIRECTIONS for k in (1, 5)}
        return {"step": step, "mlm": 6.0, **recalls, "itc_image_to_text_r1": itc - 0.02}

    def final(itc: float) -> dict:
        first = {f"{m}_{d}_r1": r for m, r in (("itc", itc), ("itm", 0.2)) for d in ablations.DIRECTIONS}
        return {"held-out": first | {name.replace("r1", "r8"): 0.5 for name in first}}

    curves = [[validation(0.9, step=10), validation(0.1)], [validation(0.3)]]
    scl = {"curves": curves, "final": [final(0.1), final(0.2)], "reranked": 8}
    records.append("training/demo/ablation/scl", results=tmp_path, **scl)
    glscl = {"curves": [[validation(0.1)]], "final": [final(0.4)], "reranked": 8}
    records.append("training/demo/ablation/glscl", results=tmp_path, **glscl)
    lines = report.report(records.read([tmp_path])).splitlines()
    means = "19.0 (9.0 to 29.0) | 20.0 (10.0 to 30.0) | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0)"
    expected = [f"| scl | 2 | {means} | 6.00 (6.00 to 6.00) |", "| glscl | 1 | 9.0 (9.0 to 9.0) | 10.0"]
    table = lines.index(expected[0])
    assert lines[table + 1].startswith(expected[1])
    assert lines[table + 2] == "| chance | | 1.0 | 1.0 | 1.0 | 1.0 | |"
    assert lines[-4].startswith("| right answer first") and lines[-4].endswith("| held-out, ITC | held-out, ITM |")
    assert lines[-2:] == ["| scl | 30 (20 to 40) | 40 (40 to 40) |", "| glscl | 80 (80 to 80) | 40 (40 to 40) |"]


def test_a_document_chooses_its_tables(tmp_path):
    write(tmp_path, op_record("sclkern", 2.0))
    step = {"rows": 2, "dtype": "float32", "median_seconds": 1.5, "pairs_per_second": 1.3}
    records.append("step/base/planned", results=tmp_path, **step)
    rows = records.read([tmp_path])
    page = "<!-- sclkern bench report: begin{} -->\nold\n" + report.END
    assert "| completion_loss" not in report.embed(page.format(" step"), rows)
    assert "base/planned" in report.embed(page.format(" step"), rows)
    assert "base/planned" not in report.embed(page.format(" ops memory"), rows)
    with pytest.raises(
        UserError,
        match=r"\['speed'\], expected some of step, ratio, decoding, clips, retrieval, models, training, ablations",
    ):
        report.embed(page.format(" speed"), rows)


def test_a_document_without_markers_is_refused(tmp_path, capsys):
    document = tmp_path / "page.md"
    document.write_text("no markers\n")
    (tmp_path / "results").mkdir()
    assert main(["bench", "report", str(tmp_path / "results"), "--update", str(document)]) == 2
    assert "page.md: expected <!-- sclkern bench report: begin --> once" in capsys.readouterr().err
    assert document.read_text() == "no markers\n"


def test_the_roofline_is_measured_and_recorded(tmp_path, capsys, monkeypatch):
    from sclkern.tools.bench import roofline

    small = measure(copy_bytes=2**20, matrix=64)
    assert small["copy_bytes_per_second"] > 0 and small["matrix_flops_per_second"]["float32"] > 0
    rates = {"copy_bytes_per_second": 2e10, "matrix_flops_per_second": {"float32": 1e11}}
    monkeypatch.setattr(roofline, "measure", lambda: rates)
    assert main(["bench", "roofline", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "copy: 20.0 GB/s" in printed and "matrix, float32: 0.1 TFLOP/s" in printed
    assert "Planned, not measured" in printed
    (row,) = records.read([tmp_path])
    assert row["case"] == "roofline" and row["copy_bytes_per_second"] == 2e10


def test_the_planned_lower_bounds_are_those_of_the_formulas():
    # 64 * 325 rows of 768 in bfloat16, three tensors, at 4.3 TB/s.
    line = next(line for line in planned_table().splitlines() if line.startswith("| dropout_add_layer_norm | 64x325"))
    assert f"| {3 * 64 * 325 * 768 * 2 / 4.3e12 * 1e6:.3g} |" in line
    assert "e+" not in planned_table()


def committed_records() -> list[Path]:
    """Without those that a run of the benchmarks has just left here; all of them outside a git checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "--", "benchmarks/results"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [ROOT / name for name in listed if name.endswith(".jsonl")] or [records.RESULTS]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_shows_no_figure_that_no_record_holds(name):
    text = (ROOT / name).read_text()
    if report.BEGIN.search(text):
        expected = report.embed(text, records.read(committed_records()))
        assert text == expected, f"{name} is not what the records say: sclkern bench report --update {name}"
        text = report.embed(text, [])
    figures = [line for line in text.splitlines() if FIGURE.search(line)]
    assert not figures, figures


def test_the_committed_report_is_what_the_records_say():
    """Its plots too: their comment is the digest of the records they show."""
    rows, folder = records.read(committed_records()), ROOT / "docs" / "report"
    text = (folder / "report.md").read_text()
    assert text.startswith(report.report(rows) + "\n"), "write it again: sclkern bench report --output docs/report"
    plots_shown = {file.name: Image.open(file).info["Comment"] for file in folder.glob("*.png")}
    for device, expected in plots.digests(rows).items():
        comments = {name: comment for name, comment in plots_shown.items() if name.startswith(device)}
        assert comments and set(comments.values()) == {expected}, f"{device}: draw them again, as above"
        assert all(f"]({name})" in text for name in comments)
    assert set(re.findall(r"docs/report/([\w.-]+\.png)", (ROOT / "README.md").read_text())) <= set(plots_shown)


@pytest.mark.parametrize(
    "line", ["a step takes 12 ms", "3.1x faster than eager", "reaches 2.9 TB/s", "88 pairs a second", "740 samples/s"]
)
def test_a_figure_is_recognised(line):
    assert FIGURE.search(line)
