"""The ledger of a step: launches and bytes of graphs that can be counted by hand, and the budget."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sclkern import ObjectiveConfig, SCLConfig, SCLModel, ops
from sclkern.ops.dispatch import interpreted
from sclkern.step import StepConfig
from sclkern.step.fake_cuda import backward
from sclkern.tools.ledger import budget
from sclkern.tools.ledger.counting import Ledger, totals
from sclkern.tools.ledger.step import format_ledger, measure

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="in the interpreter the ops choose their paths otherwise")


def counted(function):
    """Lines of a function by name: launches, bytes, kind."""
    with FakeTensorMode(), torch.device("cuda"), Ledger() as ledger:
        function()
    return {name: (line.launches, line.bytes, line.kind) for name, line in ledger.lines[""].items()}


def test_torch_operators_are_counted_with_what_they_read_and_write():
    def function():
        x, weight = torch.empty(6, 8), torch.empty(8, 10, dtype=torch.bfloat16)
        half = x.to(torch.bfloat16)  # reads 192, writes 96
        y = half @ weight  # reads 96 + 160, writes 120
        wide = y[:1].expand(6, 10)  # a view of 10 elements
        z = y + wide  # reads 120 + 20, writes 120
        torch.cat([z.view(60), z.view(60)])  # reads 240, writes 240
        z[2:4].contiguous()  # no copy
        z.t().contiguous()  # reads 120, writes 120
        torch.empty(100), z.detach(), z.reshape(3, 20)  # nothing
        z.index_select(0, torch.empty(2, dtype=torch.int64))  # reads 16 + 40, writes 40
        x.zero_()  # writes 192
        torch.empty(0).to(torch.float16)  # nothing

    assert counted(function) == {
        "_to_copy (cast)": (1, 288, "casts"),
        "mm": (1, 376, "products"),
        "add": (1, 260, "elementwise"),
        "cat": (1, 480, "concatenations"),
        "clone": (1, 240, "copies"),
        "index_select": (1, 96, "gathers"),
        "zero_": (1, 192, "fills"),
    }


def test_kernels_of_an_op_are_counted_with_what_is_computed_around_them():
    def function():
        x, residual = torch.empty(2, 33, 64, requires_grad=True)
        weight, bias = torch.empty(2, 64, requires_grad=True)
        out = ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.1)
        backward(out.sum())

    lines = counted(function)
    row, statistics = 33 * 64 * 4, 2 * 33 * 4
    # x, residual, the output; weight, bias, the seed.
    forward = 3 * row + 2 * 256 + 8 + statistics
    assert lines["dropout_add_layer_norm_forward_kernel"] == (1, forward, "triton")
    launches, moved, _ = lines["dropout_add_layer_norm_backward_kernel"]
    # Its incoming gradient is one number that is expanded, made contiguous before; its partial sums are some rows.
    assert launches == 1
    assert 5 * row < moved < 7 * row
    assert lines["randint"] == (1, 8, "draws")
    assert lines["clone"] == (1, row + 4, "copies")
    assert totals([]) == {"triton": 0, "torch": 0, "bytes": 0, "arithmetic_bytes": 0}


def test_attention_is_counted_apart():
    def function():
        ops.attention(*torch.empty(3, 2, 20, 2, 64, dtype=torch.bfloat16))

    with FakeTensorMode(), torch.device("cuda"), Ledger() as ledger:
        function()
    tensor, lse = 2 * 20 * 2 * 64 * 2, 2 * 40 * 4
    assert totals(ledger.lines[""].values()) == {
        "triton": 1, "torch": 0, "bytes": 0, "arithmetic_bytes": 4 * tensor + lse,
    }  # fmt: skip


def test_the_backward_finds_the_gradients_of_the_engine():
    """Through gradients that meet, broadcasting, casts, in-place operators, and functions of Python with options."""
    torch.manual_seed(0)
    model = SCLModel(SCLConfig.preset("tiny"), ObjectiveConfig(itm_negatives="in_batch")).eval()
    batch = {
        "image": torch.randn(3, 3, 32, 32),
        "text_ids": torch.randint(5, 100, (3, 8)),
        "text_mask": torch.ones(3, 8, dtype=torch.bool),
    }
    with torch.autocast("cpu", torch.bfloat16):
        found = backward(model(batch, seed=0).total)
        model(batch, seed=0).total.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter] for parameter in found} == expected.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[names[parameter]], rtol=0.05, atol=1e-3)


def test_gradients_in_another_order_than_their_parameter_are_copied():
    def function():
        weight = torch.empty(3, 4, requires_grad=True)
        backward((weight.t() * torch.empty(4, 3)).sum())

    assert counted(function)["copy_"] == (1, 2 * 3 * 4 * 4, "copies")


def test_a_step_has_a_ledger_that_grows_with_its_rows():
    config, objectives = SCLConfig.preset("tiny"), ObjectiveConfig(itm_negatives="dataset")
    few, many = (measure(config, objectives, StepConfig(), rows=rows, caption_tokens=8, padded_tokens=9)
                 for rows in (4, 8))  # fmt: skip
    for key in ("triton", "torch"):
        assert many["step"][key] == few["step"][key] == few["forward"][key] + few["backward"][key] > 0
    for key in ("bytes", "arithmetic_bytes"):
        assert few["step"][key] < many["step"][key] < 2 * few["step"][key]
    casts = few["step"]["lines"]["_to_copy (cast)"]["launches"]
    whole = measure(
        config, objectives, StepConfig(), rows=4, caption_tokens=8, padded_tokens=9, precision=None
    )["step"]  # fmt: skip
    assert whole["lines"]["_to_copy (cast)"]["launches"] < casts / 4
    text = format_ledger(few)
    assert "dropout_add_layer_norm_backward_kernel" in text and "concatenations" in text
    assert "others" in text and "others" not in format_ledger(few, names=10**6)


def test_the_base_model_stays_within_its_budget():
    """The other cases are left to ``sclkern plan --ledger --check``."""
    found, recorded = budget.figures(["images, batch 64"]), budget.read()
    assert budget.check(found, recorded) == []
    assert "12e03c6" in budget.format_comparison(found, recorded)
    assert recorded["cases"].keys() == recorded["before"]["cases"].keys() == budget.CASES.keys()


def test_what_is_above_the_budget_is_named(tmp_path):
    recorded = budget.read()
    found = copy.deepcopy(recorded["cases"])
    (case, *_) = found
    found[case]["torch"] += 1
    recorded["torch"] = budget.TORCH
    (line,) = budget.check(found, recorded)
    assert line.startswith(f"{case}: torch ")
    # With another version the operators are cut otherwise.
    assert budget.check(found, recorded | {"torch": "0.0"}) == []
    found[case]["bytes"] *= 2
    assert len(budget.check(found, recorded | {"torch": "0.0"})) == 1
    file = tmp_path / "budget.json"
    file.write_text(budget.BUDGET.read_text())
    budget.write(found, file)
    assert budget.check(found, budget.read(file)) == []
    assert budget.read(file)["before"] == recorded["before"]
