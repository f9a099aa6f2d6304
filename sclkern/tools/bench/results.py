"""The page of results: tables in the papers' form, figures that were published above those of records.

A record is what ``results.json`` of ``sclkern finetune`` or ``evaluate`` says, under a name. Published figures and
their sources are in ``published.json``; one that no source gives is left empty.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sclkern.errors import UserError

# Of the names of cases.
PREFIX = "results/"
# Scores that a task's server gives for a submission, as fractions.
SERVER_SCORES = {"vqav2": ("test_dev", "test_std")}
PUBLISHED = Path(__file__).with_name("published.json")
# What is read of ``results.json``.
_NEEDED = {"task": str, "recipe": str, "tables": list, "model": dict, "values": dict, "device": str, "commit": str}
_ZERO_SHOT, _FINE_TUNED = ("zero-shot",), ("default", "published", "unknown")
# Trained on the training split alone: other recipes also on the split of the column.
_HELD_OUT = ("default",)


class _Column(NamedTuple):
    """Of a table: its title, its key in ``published.json``, and the records that it is of."""

    title: str
    key: str
    task: str
    table: str
    metric: str
    recipes: tuple[str, ...] = _FINE_TUNED
    # Factor of the value: 100 of a share, 1 of a rank.
    scale: float = 100.0


class _Table(NamedTuple):
    title: str
    columns: tuple[_Column, ...]
    digits: int = 1


def _recalls(task: str, table: str, recipes: tuple[str, ...], prefix: str = "") -> tuple[_Column, ...]:
    """Six recalls of a set of pictures: of texts (TR) and of images (IR)."""
    kind = "zero-shot" if recipes == _ZERO_SHOT else "fine-tuned"
    return tuple(
        _Column(f"{prefix}{name}@{k}", f"{task}/{kind}/{name}@{k}", task, table, f"rank_{way}_r{k}", recipes)
        for name, way in (("TR", "image_to_text"), ("IR", "text_to_image"))
        for k in (1, 5, 10)
    )


def _of_clips(task: str, table: str, recipes: tuple[str, ...], prefix: str) -> tuple[_Column, ...]:
    """Recalls of clips by texts, and the median rank."""
    kind, way = "zero-shot" if recipes == _ZERO_SHOT else "fine-tuned", "rank_text_to_image"
    shares = (
        _Column(f"{prefix} R@{k}", f"{task}/{kind}/R@{k}", task, table, f"{way}_r{k}", recipes) for k in (1, 5, 10)
    )
    return (*shares, _Column("MedR", f"{task}/{kind}/MedR", task, table, f"{way}_median_rank", recipes, scale=1))


def _pictures(recipes: tuple[str, ...]) -> tuple[_Column, ...]:
    coco = _recalls("coco", "coco_caption_karpathy_test", recipes, "COCO ")
    return (*_recalls("flickr30k", "f30k_caption_karpathy_test", recipes, "Flickr30K "), *coco)


def _clips(recipes: tuple[str, ...]) -> tuple[_Column, ...]:
    lsmdc = _of_clips("lsmdc", "lsmdc_public_test", recipes, "LSMDC")
    return (*_of_clips("msrvtt", "msrvtt_test", recipes, "MSRVTT"), *lsmdc)


_QUESTIONS = (
    _Column("VQAv2 test-dev", "vqav2/test-dev", "vqav2", "vqav2_test", "test_dev"),
    _Column("VQAv2 test-std", "vqav2/test-std", "vqav2", "vqav2_test", "test_std"),
    _Column("VQAv2 val", "vqav2/val", "vqav2", "vqav2_val", "vqa_accuracy", _HELD_OUT),
    _Column("NLVR2 dev", "nlvr2/dev", "nlvr2", "nlvr2_dev", "accuracy"),
    _Column("NLVR2 test-P", "nlvr2/test-P", "nlvr2", "nlvr2_test1", "accuracy"),
)
_ALIGN = tuple(
    _Column(name, f"align-bench/{name}", "align-bench", "align_bench", name.replace(" ", "_"), _ZERO_SHOT)
    for name in ("global box", "global mask", "local box", "local mask")
)
TABLES = (
    _Table("Visual question answering and reasoning", _QUESTIONS, digits=2),
    _Table("Image-text retrieval, zero-shot", _pictures(_ZERO_SHOT)),
    _Table("Image-text retrieval, fine-tuned", _pictures(_FINE_TUNED)),
    _Table("Video-text retrieval, zero-shot: clips by texts", _clips(_ZERO_SHOT)),
    _Table("Video-text retrieval, fine-tuned: clips by texts", _clips(_FINE_TUNED)),
    _Table("ALIGN-BENCH: attention on the regions of words", _ALIGN, digits=2),
)


def read_result(file: Path | str, given: Sequence[str] = ()) -> dict[str, Any]:
    """Read what a record holds beside its name.

    Args:
        file: ``results.json`` of ``sclkern finetune`` or ``sclkern evaluate``.
        given: ``score=value`` of the task's server.

    Returns:
        Plain values.

    Raises:
        UserError: the file is not such a file, has no metric, or a score is not of the task's server.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}), expected results.json of sclkern evaluate") from error
    for name, kind in _NEEDED.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise UserError(
                f"{file}: has no {name!r}, expected results.json of sclkern finetune or evaluate --output of this "
                "version; evaluate again"
            )
    scores = SERVER_SCORES.get(found["task"], ())
    for one in given:
        name, _, text = one.partition("=")
        if name not in scores:
            expected = f"one of {', '.join(scores)}" if scores else f"none: {found['task']} has no server"
            raise UserError(f"scores: got {one!r}, expected {expected}; leave it out")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise UserError(f"{name}: got {text!r}, expected a fraction from 0 to 1; give 78.72 % as 0.7872")
        found["values"][name] = value
    if not found["values"]:
        remedy = f"add {scores[0]}=0.7872, the score of the server" if scores else "evaluate a split with answers"
        raise UserError(f"{file}: has no metric, expected one or more; {remedy}")
    return dict(found)


def case_of(name: str, found: Mapping[str, Any]) -> str:
    """The case of a record: a later one of the same name, task, recipe and tables replaces it.

    Args:
        name: of the model.
        found: of ``read_result``.

    Returns:
        The case.

    Raises:
        UserError: the name cannot stand in a table.
    """
    if not name or not name.isprintable() or set(name) & set("|/`<>"):
        raise UserError(f"NAME: got {name!r}, expected a name of the model without | / ` < >, such as base")
    return f"{PREFIX}{found['task']}/{'+'.join(found['tables'])}/{found['recipe']}/{name}"


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables, and what each of our figures comes from.

    Args:
        rows: of ``sclkern.tools.bench.records.read``; those of other cases are left out.

    Returns:
        Markdown.
    """
    ours = sorted((row for row in rows if row["case"].startswith(PREFIX)), key=lambda row: row["case"])
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return "\n\n".join([*(_shown(table, ours, published) for table in TABLES), _records(ours)])


def _shown(table: _Table, ours: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]) -> str:
    heads = ["", *(column.title for column in table.columns)]
    lines = [f"### {table.title}", "", _line(heads), _line(["---"] * len(heads))]
    notes = []
    for model in published:
        values: dict[str, float] = {}
        for figures in model["figures"]:
            there = {key: figures["values"][key] for key in _keys(table) if key in figures["values"]}
            values |= there
            if there:
                notes.append(f"{model['model']}, {model['paper']}: {figures['source']}.")
        cells = [_cell(table, column, values.get(column.key)) for column in table.columns]
        lines.append(_line([f"{model['model']}, published", *cells]))
    of_model: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in ours:
        for column in table.columns:
            value = row["values"].get(column.metric)
            if value is not None and row["recipe"] in column.recipes and row["tables"] == [column.table]:
                of_model[row["name"], row["recipe"]][column.key] = value * column.scale
    for (name, recipe), values in sorted(of_model.items()):
        shown = f"sclkern {name}" + ("" if recipe == "zero-shot" else f", recipe {recipe}")
        lines.append(_line([shown, *(_cell(table, column, values.get(column.key)) for column in table.columns)]))
    if not of_model:
        lines.append(_line(["sclkern", *("" for _ in table.columns)]))
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _keys(table: _Table) -> Iterator[str]:
    return (column.key for column in table.columns)


def _cell(table: _Table, column: _Column, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.{table.digits}f}" if column.scale != 1 else f"{value:g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _records(ours: Sequence[Mapping[str, Any]]) -> str:
    lines = ["### Records", ""]
    if not ours:
        return "\n".join([*lines, "None yet: no model was trained on these sets."])
    heads = ("model", "task", "recipe", "tables", "samples", "digest", "pixels", "precision", "machine", "commit")
    lines += [_line(heads), _line(["---"] * len(heads))]
    for row in ours:
        values = [row["name"], row["task"], row["recipe"], ", ".join(row["tables"]), row.get("samples", "")]
        values += [row.get("digest", "")[:12], row["model"].get("image_size", ""), row.get("precision", "")]
        lines.append(_line([str(value) for value in (*values, row["device"], row["commit"])]))
    return "\n".join(lines)
