"""Which backend an op would take, told in words."""

import pytest
import torch

from sclkern import ops
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("op", ops.OPS)
def test_the_reason_on_a_cpu(op):
    reason = "tensors on cpu, kernels need a GPU" if TRITON_INSTALLED else "Triton is not installed"
    assert str(ops.explain(op, torch.zeros(2, 3, 4, 64))).startswith(f"eager: {reason}")


def test_what_a_kernel_cannot_take_is_told():
    assert "head" in str(ops.explain("attention", torch.zeros(1, 2, 3, 48)))
    assert str(ops.explain("dropout_add_layer_norm", torch.zeros(2, 5000))).startswith("eager: rows of 5000 columns")
    assert str(ops.explain("bias_gelu", torch.zeros(2, dtype=torch.float64))).startswith("eager: ")


def test_the_environment_decides_and_never_silently(monkeypatch):
    monkeypatch.setenv("SCLKERN_BACKEND", "eager")
    assert str(ops.explain("bias_gelu", torch.zeros(2), torch.zeros(2))) == "eager: requested by SCLKERN_BACKEND"
    monkeypatch.setenv("SCLKERN_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"SCLKERN_BACKEND='triton': cannot run: float64 has no kernel"):
        ops.explain("bias_gelu", torch.zeros(2, dtype=torch.float64, device="cpu"))
    monkeypatch.setenv("SCLKERN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"SCLKERN_BACKEND: got 'cuda', expected one of auto"):
        ops.explain("bias_gelu", torch.zeros(2))


def test_unknown_ops_and_no_tensors_are_told():
    with pytest.raises(ValueError, match=r"op: got 'gelu', expected one of attention"):
        ops.explain("gelu", torch.zeros(2))
    with pytest.raises(ValueError, match=r"tensors: got none"):
        ops.explain("bias_gelu")
