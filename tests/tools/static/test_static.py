"""Every kernel compiles for gfx942 without a GPU, and the static check tells right from wrong machine code."""

import copy
import dataclasses
import json
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from sclkern.ops.dispatch import interpreted

if interpreted():
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from static_probes import (
    index_in_32_bits,
    rows_in_32_bits,
    rows_in_64_bits,
    tiny_product,
    too_much_at_once,
    widened_too_late,
    width_in_32_bits,
)

from sclkern.cli import main
from sclkern.tools.static import compilation as static
from sclkern.tools.static.addresses import wrapping_addresses
from sclkern.tools.static.budget import (
    BUDGET,
    Compilation,
    Row,
    broken_rules,
    check,
    compilations,
    inspect,
    measure,
    read_budget,
    worse,
)
from sclkern.tools.static.compilation import compile_entry, entry_name, resident_blocks

# `make static` and `make test-oldest` compile for NVIDIA's GPUs, with the newest and the oldest Triton.
COMPILATIONS = {planned.name: planned for planned in compilations(("gfx942",), apart="none")}
ENTRIES = {entry_name(entry): entry for entry in static.kernels()}


@pytest.fixture(scope="module")
def rows(request):
    """By name, the entries that the selected tests ask for, compiled together."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = dict.fromkeys(params["name"] for params in calls if params.get("name") in COMPILATIONS)
    return {row.name: row for row in measure([COMPILATIONS[name] for name in names])}


@pytest.mark.parametrize("name", COMPILATIONS)
def test_compiles_for_another_maker(rows, name):
    assert rows[name].errors == {}


def test_every_kernel_has_a_name_and_a_budget_of_its_own():
    assert len(ENTRIES) == len(static.kernels())
    kernels = read_budget(BUDGET)["kernels"]
    assert set(ENTRIES) == set(kernels), "`sclkern bench static --update` writes the budget"


def probe(kernel, block=64, warps=4):
    return {
        "kernel": kernel,
        "signature": {"x_ptr": "*bf16", "out_ptr": "*bf16", "index_ptr": "*i32"},
        "constants": {"BLOCK": block},
        "num_warps": warps,
    }


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [(rows_in_64_bits, 0), (rows_in_32_bits, 1), (width_in_32_bits, 1), (widened_too_late, 1), (index_in_32_bits, 1)],
    ids=lambda value: getattr(getattr(value, "fn", None), "__name__", None),
)
def test_offsets_in_32_bits_are_found(kernel, wrong):
    assert len(wrapping_addresses(compile_entry(probe(kernel), "sm_90").asm["ttir"])) == wrong


def broken(entry):
    return broken_rules(Row("probe", *inspect(compile_entry(entry, "sm_90"))))


def test_a_product_without_wgmma_needs_a_reason():
    assert broken(probe(tiny_product)) == []
    (problem,) = broken(probe(tiny_product, block=16, warps=1))
    assert problem.startswith("HMMA 2, HGMMA 0: expected HGMMA alone")
    row = Row("probe", *inspect(compile_entry(probe(tiny_product, block=16, warps=1), "sm_90")))
    assert broken_rules(row, reason="16 rows are fewer than wgmma takes") == []


def test_spills_and_registers_are_reported():
    used, *rest = inspect(compile_entry(probe(too_much_at_once, block=8192, warps=1), "sm_90"))
    (spills,) = broken_rules(Row("probe", used, *rest))
    assert spills.startswith("spills: ") and "spills: 0" not in spills
    assert worse(used, dataclasses.asdict(used) | {"load_width": 2.0}) == ["registers: 255, expected at most 240"]


def planned(entry, *targets):
    return Compilation(entry_name(entry), entry, targets, {target: (target,) for target in targets})


def test_a_kernel_that_does_not_compile_is_reported_and_stops_nothing():
    wrong = probe(tiny_product) | {"signature": {"x_ptr": "*bf16", "out_ptr": "i32"}}
    first, second = measure([planned(entry, "sm_90", "gfx942") for entry in (wrong, probe(rows_in_64_bits))])
    assert set(first.errors) == {"sm_90", "gfx942"} and first.used is None
    # The whole error: the place in the source, and what is wrong there.
    assert all("def tiny_product" in error and "CompilationError" in error for error in first.errors.values())
    assert all("caused by: AttributeError" in error for error in first.errors.values())
    assert second.errors == {} and second.used.registers > 0


def test_each_target_is_checked_in_the_configuration_that_it_selects():
    every, hot, none = compilations(apart="all"), compilations(), compilations(apart="none")
    for target in static.REQUIRED_TARGETS:
        chosen = {entry_name(entry) for entry in static.kernels(target)}
        assert chosen == {one.name for one in none if any(target in of for of in one.limits.values())}
    assert all(set(one.targets) == {name for of in one.limits.values() for name in of} for one in every)
    numbers = [sum(len(one.targets) for one in planned) for planned in (every, hot, none)]
    assert numbers[0] > numbers[1] > numbers[2]
    for one in hot:
        if static.is_hot(one.entry):
            assert set(one.targets) >= {name for of in one.limits.values() for name in of} - {"sm_86"}, one.name


def test_dropout_is_compiled_as_training_has_it():
    """With ids, which a step passes to every op."""
    drawn = [entry for entry in ENTRIES.values() if {"seed_ptr", "ids_ptr"} <= set(entry["kernel"].arg_names)]
    drawn = [entry for entry in drawn if "seed_ptr" not in entry["constants"]]
    assert len({entry["kernel"].fn.__name__ for entry in drawn}) > 9
    assert {entry["signature"].get("ids_ptr") for entry in drawn} == {"*i64"}


def test_too_much_shared_memory_is_reported_for_its_target(monkeypatch):
    # It spills, too.
    monkeypatch.setattr(static, "MOST_COLD_STACK", 2**20)
    wide = probe(tiny_product, block=128, warps=8) | {"signature": {"x_ptr": "*fp32", "out_ptr": "*fp32"}}
    (row,) = measure([Compilation("wide", wide, ("sm_80",), {"sm_80": ("sm_80", "sm_86")})])
    assert row.targets == ["sm_80", "sm_86"] and list(row.errors) == ["sm_86"]
    assert row.errors["sm_86"].startswith("shared memory: ") and row.errors["sm_86"].endswith("at most 101376 on sm_86")


def test_a_hot_kernel_that_spills_is_reported_for_its_target(monkeypatch):
    large = Compilation("large", probe(too_much_at_once, block=8192, warps=1), ("sm_80",), {"sm_80": ("sm_80",)})
    (row,) = measure([large])
    assert re.fullmatch(r"spills: stack [1-9]\d* bytes, expected at most 0 on sm_80", row.errors["sm_80"])
    monkeypatch.setattr(static, "COLD_KERNELS", ("too_much_at_once",))
    stack = int(re.search(r"\d+", row.errors["sm_80"])[0])
    monkeypatch.setattr(static, "MOST_COLD_STACK", stack)
    assert measure([large])[0].errors == {}
    monkeypatch.setattr(static, "MOST_COLD_STACK", stack - 4)
    assert list(measure([large])[0].errors) == ["sm_80"]


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "blocks"),
    # From NVIDIA's occupancy tables for 9.0.
    [(4, 32, 0, 16), (1, 16, 0, 32), (4, 168, 0, 3), (8, 255, 0, 1), (4, 64, 100 * 1024, 2), (4, 64, 227 * 1024, 1)],
)
def test_what_fits_a_multiprocessor(warps, registers, shared, blocks):
    assert resident_blocks(warps, registers, shared) == blocks


@pytest.fixture
def one_kernel(monkeypatch, tmp_path):
    """The budget file of a package with a single kernel."""
    monkeypatch.setattr(static, "kernels", lambda target: [probe(tiny_product)])
    file = tmp_path / "budget.json"
    assert main(["bench", "static", "--update", "--budget", str(file)]) == 0
    return file


def bench(file, capsys, *options):
    capsys.readouterr()
    status = main(["bench", "static", "--budget", str(file), *options])
    return status, capsys.readouterr().out


def test_the_command_prints_a_table_or_json(one_kernel, capsys):
    status, out = bench(one_kernel, capsys, "--check", "--target", "gfx950", "--target", "sm_120")
    assert status == 0 and "| `tiny_product[bf16,BLOCK=64,warps=4]` |" in out and "FAILED" not in out
    status, out = bench(one_kernel, capsys, "--json")
    (row,) = json.loads(out)["kernels"]
    assert status == 0 and row["used"]["hgmma"] > 0 and row["dots"] == ["bf16"] and row["errors"] == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"registers": 8}, "registers: "),
        ({"hgmma": 99}, "HGMMA: "),
        ({"warps": 64, "shared": 0}, "warps that fit a multiprocessor: "),
        ({"load_width": 20.0}, "bytes of a global load: "),
    ],
    ids=str,
)
def test_a_kernel_worse_than_its_budget_fails_the_check(one_kernel, capsys, changes, told):
    budget = json.loads(one_kernel.read_text())
    (name,) = budget["kernels"]
    budget["kernels"][name].update(changes)
    one_kernel.write_text(json.dumps(budget))
    status, out = bench(one_kernel, capsys, "--check")
    (line,) = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert status == 1 and line.startswith(f"FAILED {name}: {told}")


def test_unknown_and_vanished_kernels_fail_the_check(one_kernel, capsys):
    budget = json.loads(one_kernel.read_text())
    budget["kernels"] = {"gone": budget["kernels"].popitem()[1]}
    one_kernel.write_text(json.dumps(budget))
    status, out = bench(one_kernel, capsys, "--check")
    assert status == 1 and "gone: in the budget, but no such kernel" in out and "]: not in the budget" in out


def test_the_committed_table_is_that_of_the_budget():
    lines = BUDGET.with_suffix(".md").read_text().splitlines()
    rows = [line.split("`", 2)[1:] for line in lines if line.startswith("| `")]
    table = {name: [int(figure) for figure in figures.split("|")[1:6]] for name, figures in rows}
    kept = ("registers", "shared", "hgmma", "hmma")
    budget = {name: [entry[k] for k in kept] for name, entry in read_budget(BUDGET)["kernels"].items()}
    # Spills, which must be none, are not in the budget.
    assert table == {name: [registers, 0, *others] for name, (registers, *others) in budget.items()}


def test_an_update_keeps_the_reasons(one_kernel, capsys):
    budget = json.loads(one_kernel.read_text())
    (entry,) = budget["kernels"].values()
    entry |= {"reason": "because", "registers": 1}
    one_kernel.write_text(json.dumps(budget))
    assert bench(one_kernel, capsys, "--update")[0] == 0
    (entry,) = json.loads(one_kernel.read_text())["kernels"].values()
    assert entry["reason"] == "because" and entry["registers"] > 1
    assert f"] | {entry['registers']} |" in one_kernel.with_suffix(".md").read_text().replace("`", "")


def test_another_version_of_triton_is_held_to_the_rules_alone():
    used = inspect(compile_entry(probe(tiny_product), "sm_90"))[0]
    figures = dataclasses.asdict(used) | {"load_width": 99.0}
    budget = {"triton": "0.0", "kernels": {"probe": figures}}
    assert check([Row("probe", used)], budget) == []
    spilled = Row("probe", dataclasses.replace(used, stack=8, spills=16))
    assert check([spilled], copy.deepcopy(budget)) == ["probe: spills: 16 bytes moved, stack 8 bytes, expected none"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--target", "sm_70"], "--target: got 'sm_70'"),
        (["--check", "--budget", "none.json"], "none.json does not exist"),
    ],
)
def test_mistakes_are_explained_in_one_line(options, told, capsys):
    assert main(["bench", "static", *options]) == 2
    assert told in capsys.readouterr().err
