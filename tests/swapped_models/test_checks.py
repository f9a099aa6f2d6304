"""The checks of the matrix see a difference, a claim that is not kept, and an exception."""

from sclkern import ops
from sclkern.integrations.fuse import FuseReport
from swapped_models.checks import examine


def test_a_small_difference_is_seen(monkeypatch):
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **options: attention(*args, **options) * 1.0001)
    outcome, faults = examine("nn.TransformerEncoder")
    assert outcome["taken"]
    assert any(fault.startswith("fused: AssertionError: ") for fault in faults)


def test_a_claim_that_is_not_kept_is_seen(monkeypatch):
    fuse = examine.__globals__["sclkern"].fuse

    def claim_more(model, **options):
        report = fuse(model, **options)
        report.replaced.append(report.replaced[0]._replace(path="layers.0.norm1", module="LayerNorm"))
        report._modules.append(model)
        return report

    monkeypatch.setattr("sclkern.fuse", claim_more)
    _, faults = examine("nn.TransformerEncoder")
    assert any("never call their op: ['layers.0.norm1" in fault for fault in faults)


def test_an_exception_is_seen(monkeypatch):
    def revert(self):
        raise RuntimeError("no way back")

    monkeypatch.setattr(FuseReport, "revert", revert)
    _, faults = examine("nn.TransformerEncoder")
    assert faults == ["reverted: RuntimeError: no way back"]


def test_without_changes_nothing_is_seen():
    _, faults = examine("nn.TransformerEncoder")
    assert not faults
