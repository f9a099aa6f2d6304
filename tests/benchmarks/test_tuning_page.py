"""The static figures that docs/tuning.md argues with are those of candidates.json, and its leads are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tuning.md").read_text()
PLAN = json.loads((ROOT / "benchmarks" / "tuning" / "candidates.json").read_text())["candidates"]
# Instructions that an H200 issues in a microsecond: four a multiprocessor and cycle.
RATE = 132 * 4 * 1.755e3
LENGTH, HEADS = 325, 64 * 12
KERNELS = {
    "forward": ("forward", "attention forward"),
    "backward by query": ("backward", "attention by query"),
    "backward by key": ("backward", "attention by key"),
}


def attention_rows() -> list[list[str]]:
    lines = (line for line in PAGE.splitlines() if re.match(r"\| (forward|backward)", line))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def figures(name: str, described: str, present: bool) -> tuple[int, int, float, float]:
    """Registers, warps a multiprocessor, instructions a score, issue time of tiles as the page describes them."""
    kernel, _, dropout = name.partition(", ")
    part, choice = KERNELS[kernel]
    size = "attention/325" if dropout else "packed_attention/325-without-dropout"
    queries, keys, warps, stages = map(
        int, re.match(r"(\d+) x (\d+), (\d+) warps(?:, (\d+) stages)?$", described).groups("0")
    )
    values = {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": warps}
    values |= {"num_stages": stages} if stages else {}
    config = "present" if present else ",".join(f"{n}={v}" for n, v in values.items())
    (row,) = (row for row in PLAN if row["case"] == f"{size}/bfloat16/{part}/{choice}/{config}")
    (used,) = row["kernels"]
    assert used["num_warps"] == warps
    spread, walked = (keys, queries) if "key" in choice else (queries, keys)
    programs, steps = HEADS * -(-LENGTH // spread), -(-LENGTH // walked)
    # Packed, the programs of one sequence more end at once.
    assert used["programs"] in (programs, programs * 65 // 64)
    issued = programs * warps * (steps * used["loop"] + used["instructions"] - used["loop"])
    return used["registers"], used["warps"], used["loop"] * warps * 32 / (queries * keys), issued / RATE


@pytest.mark.parametrize("row", attention_rows(), ids=lambda row: row[0])
def test_figures_of_attention_are_those_of_the_plan(row):
    name, *before, now, registers, warps, a_score, issue = row[:9]
    found = figures(name, now, present=True)
    assert (int(registers), int(warps)) == found[:2]
    assert [float(a_score), int(issue)] == [round(found[2], 1), round(found[3])]
    # Of the forward nothing has changed.
    for described, a_score, issue in filter(any, (before, row[9:])):
        found = figures(name, described, present=False)
        assert [float(a_score), int(issue)] == [round(found[2], 1), round(found[3])]


def test_every_lead_has_all_its_parts():
    assert len(attention_rows()) == 6
    listed = re.findall(r"^\| (\d+)\. ", PAGE, re.M)
    sections = re.split(r"^### (\d+)\. ", PAGE, flags=re.M)[1:]
    assert listed == sections[::2] == [str(i + 1) for i in range(len(listed))]
    for number, text in zip(sections[::2], sections[1::2], strict=True):
        for part in ("Is", "Change", "Predicted", "Measure", "Outcome"):
            assert text.count(f"- **{part}**") == 1, (number, part)
