"""The report from plain values: no run is needed to write one."""

import matplotlib.image

from sclkern.evaluation.retrieval import RetrievalResult
from sclkern.training.report import RunSummary, format_report, write_report

ROWS = [
    {"kind": "train", "step": 1, "total": 9.5, "itm": 0.75, "mltc": 3.0},
    {"kind": "train", "step": 2, "total": 8.25, "itm": 0.5, "mltc": None},
    {"kind": "val", "step": 2, "total": 8.5, "itm": 0.625, "mltc": 2.0},
]
DIRECTIONS = ("image_to_text", "text_to_image")
RECALLS = {f"{method}_{d}_r{k}": k / 40 for method in ("itc", "chance") for d in DIRECTIONS for k in (1, 5, 10)}


def summary(**changes):
    values = {"description": "A run.", "rows": ROWS, "retrieval": {"held-out": RetrievalResult(40, 30, RECALLS)}}
    return RunSummary(**{**values, "rerank": 3, "undecodable": {"training": 0, "held-out": 2}, **changes})


def test_losses_recalls_and_skipped_images_are_shown(tmp_path):
    path = write_report(summary(), tmp_path)
    lines = path.read_text().splitlines()
    assert "| total | 9.500 | 8.250 | 8.500 |" in lines
    assert "| MLTC, masked local token completion | 3.000 |  | 2.000 |" in lines
    assert not any(line.startswith("| MLM") for line in lines)
    assert "| held-out, 40 images, 30 captions | image to text | ITC | 2.5 | 12.5 | 25.0 |" in lines
    assert not any("| ITM |" in line for line in lines)
    assert "Undecodable held-out images, skipped: 2" in lines and not any("Undecodable training" in x for x in lines)
    assert not any("attention" in line for line in lines)
    assert matplotlib.image.imread(tmp_path / "losses.png")[..., :3].std() > 0.05


def test_a_report_without_rows_has_no_losses(tmp_path):
    text = write_report(summary(rows=[]), tmp_path).read_text()
    assert "| total |" not in text and "losses.png" not in text and "| held-out, 40 images" in text
    assert not (tmp_path / "losses.png").exists()


def test_a_plot_of_attention_is_linked(tmp_path):
    assert "![attention](attention.png)" in format_report(summary(attention=tmp_path / "attention.png"))


def test_the_line_of_a_retrieval_shows_the_best_method():
    result = RetrievalResult(40, 30, RECALLS)
    assert result.line() == "recall@1/5/10 image to text 2.5/12.5/25.0 %, text to image 2.5/12.5/25.0 %"
    reranked = {f"itm_{d}_r{k}": 1.0 for d in DIRECTIONS for k in (1, 5, 10)}
    assert "image to text 100.0/100.0/100.0 %" in RetrievalResult(40, 30, {**RECALLS, **reranked}).line()


def test_a_recipe_without_contrast_has_no_retrieval():
    text = format_report(summary(retrieval={}))
    assert "no objective of the recipe trains the ITC head" in text and "| R@1 |" not in text


def test_texts_stay_text(tmp_path):
    hard = "# 🤖 $x$ <b>|</b>\n| a_b_ `c` שלום \0"
    result = RetrievalResult(40, 30, RECALLS)
    path = write_report(summary(description=hard, retrieval={"a|b\n": result}, undecodable={hard: 1}), tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    shown = r"\# 🤖 \$x\$ \<b\>\|\</b\> \| a\_b\_ \`c\` שלום \\x00"
    assert lines[2] == shown
    assert f"Undecodable {shown} images, skipped: 1" in lines
    assert r"| a\|b, 40 images, 30 captions | image to text | ITC | 2.5 | 12.5 | 25.0 |" in lines


def test_the_course_of_a_run_is_shown(tmp_path):
    times = {"step_seconds": 0.5, "data_seconds": 0.1, "memory_gb": 1.5, "slowest_rank": 1, "slowest_lag": 0.25}
    rates = {"learning_rate": 1e-4, "learning_rate_fusion": 5e-4, "mfu": 0.4}
    rows = [
        {
            "kind": "train",
            "step": step,
            "total": 9.0,
            "grad_norm": 2.0 * step,
            "pairs_per_second": speed,
            **times,
            **rates,
        }
        for step, speed in ((1, 1.0), (2, 40.0), (3, 50.0), (4, 60.0))
    ]
    lines = write_report(summary(rows=[*rows, {"kind": "ranks", "step": 4, "own_seconds": [1, 2]}]), tmp_path)
    text = lines.read_text()
    for line in (
        "| pairs a second | 50 |",
        "| of the device's peak (MFU) | 40.0% |",
        "| of a step, waiting for data | 20.0 % |",
        "| memory of a process, at most | 1.50 GB |",
        "| slowest process most often | rank 1, 25% behind the median |",
        "![course](course.png)",
    ):
        assert line in text
    assert matplotlib.image.imread(tmp_path / "course.png")[..., :3].std() > 0.03
    assert "## Course" not in format_report(summary())
