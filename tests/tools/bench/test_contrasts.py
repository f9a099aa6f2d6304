"""Contrasts in the report: measured and computed figures are told apart, and only ours is the measure of others."""

from __future__ import annotations

import pytest

from sclkern.cli import main
from sclkern.tools.bench import plots, records, report
from sclkern.tools.bench.contrasts import contrast_table, contrast_tables
from sclkern.tools.bench.figures import memory_text


def memory_record(folder, way: str, rows: int, peak: float, source: str = "measured", kind: str = "clip") -> None:
    values = {"kind": kind, "way": way, "rows": rows, "width": 64, "dtype": "float32", "source": source}
    records.append(f"contrast_memory/{kind}/{rows}/{way}", results=folder, peak_bytes=peak, **values)


def time_record(folder, way: str, seconds: float, dtype: str = "float32") -> None:
    values = {"kind": "clip", "way": way, "rows": 4096, "dtype": dtype, "median_seconds": seconds}
    records.append(f"contrast/clip/4096/{dtype}/{way}", results=folder, **values)


@pytest.fixture
def memory(tmp_path):
    memory_record(tmp_path, "open_clip", 65536, 68.7e9, "computed")
    memory_record(tmp_path, "open_clip", 4096, 0.27e9)
    memory_record(tmp_path, "sclkern", 4096, 88e6)
    memory_record(tmp_path, "sclkern", 65536, 120e6)
    memory_record(tmp_path, "cached", 4096, 11.6e6, kind="ranking")
    return tmp_path


def test_what_is_computed_is_marked(memory):
    lines = report.report(records.read([memory])).splitlines()
    start = lines.index("| memory of a loss of N rows, 64 channels | by | N = 4,096 | N = 65,536 |")
    assert lines[start + 2 : start + 5] == [
        "| CLIP's | sclkern | 88 MB | 120 MB |",
        "| CLIP's | open_clip | 270 MB | (68.7 GB) |",
        "| ranking | cached | 11.6 MB |  |",
    ]
    assert lines[start + 6].startswith("In brackets: computed")


def test_nothing_is_said_of_brackets_where_all_is_measured(tmp_path):
    memory_record(tmp_path, "sclkern", 4096, 88e6)
    assert "brackets" not in contrast_tables(records.read([tmp_path]))


def test_times_are_multiples_of_ours(tmp_path):
    time_record(tmp_path, "open_clip", 0.3)
    assert len(contrast_table(records.read([tmp_path])).splitlines()) == 2
    time_record(tmp_path, "sclkern", 0.2)
    time_record(tmp_path, "open_clip", 0.1, "bfloat16")
    table = contrast_table(records.read([tmp_path])).splitlines()
    # Of bfloat16 there is nothing of ours to compare with.
    assert table[2:] == ["| CLIP's | 4096 | float32 | 200 ms | open_clip 300 ms (1.50x) |"]


def test_a_report_without_contrasts_has_no_table():
    assert contrast_tables([]) == ""


@pytest.mark.parametrize(("size", "text"), [(17_309_724, "17.3 MB"), (4.295e9, "4.29 GB"), (68.7e9, "68.7 GB")])
def test_memory_has_three_digits_and_a_unit(size, text):
    assert memory_text(size) == text


def test_the_plot_draws_computed_points_hollow(memory, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    files = plots.write_plots(records.read([memory]), memory / "plots")
    assert [file.name for file in files] == [f"{records.device_name()}-contrast-memory.png"]
    clip, ranking = figures[0].axes
    assert (clip.get_xscale(), clip.get_yscale()) == ("log", "log") and len(ranking.lines) == 1
    drawn = [(list(line.get_xdata()), line.get_linestyle(), line.get_markerfacecolor()) for line in clip.lines]
    assert [points for points, _, _ in drawn] == [[4096, 65536], [4096], [4096, 65536]]
    assert drawn[2][1:] == ("--", "white") and drawn[1][1:] != drawn[2][1:]


def test_the_command_shows_them(memory, tmp_path, capsys):
    assert main(["bench", "report", str(memory), "--output", str(tmp_path / "report")]) == 0
    assert "(68.7 GB)" in capsys.readouterr().out
    assert "contrast-memory.png)" in (tmp_path / "report" / "report.md").read_text()
