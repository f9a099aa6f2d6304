"""The table of what the demo's model reaches on small real tasks."""

from sclkern.tools.bench.report import embed

DOCUMENT = "<!-- sclkern bench report: begin demotasks -->\n<!-- sclkern bench report: end -->"


def record(case: str, percent: float, **values: object) -> dict[str, object]:
    figure = {"task": case, "model": "m", "metric": "R@1", "percent": percent, "baseline": "chance",
              "baseline_percent": 2.5}  # fmt: skip
    return {"case": f"tasks/demo/{case}", "device": "a machine", "commit": "abc", "time": case, "figures": [figure],
            **values}  # fmt: skip


def test_each_figure_has_a_row_and_whole_runs_have_their_minutes():
    shown = embed(DOCUMENT, [record("b", 40.0), record("a", 12.5, seconds=90.0)])
    rows = [line for line in shown.splitlines() if line.startswith(("| a", "| b"))]
    assert rows == ["| a | m | R@1 | 12.5 | chance | 2.5 | +10.0 |", "| b | m | R@1 | 40.0 | chance | 2.5 | +37.5 |"]
    assert "Minutes: a 1.5." in shown


def test_without_records_nothing_is_shown():
    assert "No records." in embed(DOCUMENT, [])
