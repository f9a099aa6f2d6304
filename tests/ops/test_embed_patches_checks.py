"""``embed_patches``: what its kernels cannot take, and which input is refused."""

import pytest
import torch

from op_testing import DEVICE, run_in_interpreter
from sclkern import ops
from sclkern.ops.dispatch import may_read


def inputs():
    """Every tensor but ``keep`` by name: two clips of two frames of 9 patches, rows of 20 columns."""
    shapes = {"images": (2, 2, 3, 6, 6), "weight": (20, 3, 2, 2), "position": (10, 20), "temporal": (3, 20)}
    shapes |= dict.fromkeys(("cls", "mask_token", "norm_weight", "norm_bias"), (20,))
    tensors = {
        name: torch.randn(shape, device=DEVICE).requires_grad_(name != "images") for name, shape in shapes.items()
    }
    return tensors | {"replace": torch.rand(2, 9, device=DEVICE) < 0.4}


def test_values_on_a_device_are_read_in_debugging_alone(monkeypatch):
    there, here = torch.zeros(1, device="meta"), torch.zeros(1)
    monkeypatch.delenv("SCLKERN_DEBUG", raising=False)
    assert may_read(here) and not may_read(there)
    monkeypatch.setenv("SCLKERN_DEBUG", "1")
    assert may_read(there)


def test_unsupported_arguments_are_reported():
    tensors = inputs()
    images = tensors["images"].requires_grad_()
    assert "images require a gradient, which the kernels do not compute" in str(ops.explain("embed_patches", images))
    ops.embed_patches(**tensors).sum().backward()
    assert images.grad is not None
    with pytest.raises(ValueError, match=r"backend='triton': cannot run: images require a gradient"):
        ops.embed_patches(**tensors, backend="triton")
    wide = torch.zeros(4097, 3, 2, 2, device=DEVICE)
    assert "rows of 4097 columns, the kernel holds at most 4096" in str(
        ops.explain("embed_patches", images.detach(), wide)
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 6, 6)}, ValueError, r"images: got shape \(2, 3, 6, 6\), expected \(B, F, C"),
        ({"images": torch.zeros(2, 2, 3, 6, 6).long()}, TypeError, r"images: got torch\.int64, expected a floating"),
        (
            {"weight": torch.zeros(20, 3, 4, 4)},
            ValueError,
            r"weight: got shape \(20, 3, 4, 4\), expected \(D, C, p, p\)",
        ),
        ({"position": torch.zeros(9, 20)}, ValueError, r"position: got shape \(9, 20\), .*\(1 \+ P, D\) = \(10, 20\)"),
        ({"cls": torch.zeros(1, 20)}, ValueError, r"cls: got shape \(1, 20\), expected \(D,\) = \(20,\)"),
        ({"temporal": torch.zeros(1, 20)}, ValueError, r"temporal: got shape \(1, 20\), expected \(F or more, D\)"),
        ({"keep": torch.zeros(2, 1)}, TypeError, r"keep: got torch\.float32, expected torch\.int64"),
        ({"keep": torch.tensor([[1, 2]])}, ValueError, r"keep: got shape \(1, 2\), expected \(B, K\) with B = 2"),
        ({"keep": torch.tensor([[1, 9], [0, 1]])}, ValueError, r"keep: got patches 0 to 9, expected 0 to P - 1 = 8"),
        ({"keep": torch.tensor([[1, -1], [0, 1]])}, ValueError, r"keep: got patches -1 to 1"),
        ({"keep": torch.tensor([[1, 0], [2, 2]])}, ValueError, r"keep: got a patch twice in a sample"),
        ({"replace": torch.zeros(2, 9)}, TypeError, r"replace: got torch\.float32, expected torch\.bool"),
        (
            {"replace": torch.zeros(2, 4).bool()},
            ValueError,
            r"replace: got shape \(2, 4\), expected \(B, P\) = \(2, 9\)",
        ),
        ({"mask_token": None}, ValueError, r"mask_token: got None, expected \(D,\) with replace"),
        ({"norm_bias": None}, ValueError, r"norm_weight, norm_bias: got one of them"),
        ({"norm_bias": torch.zeros(20, device="meta")}, ValueError, r"norm_bias: got device meta, expected that of"),
        ({"eps": -1.0}, ValueError, r"eps: got -1\.0, expected a finite number of at least 0"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    good = {name: tensor.cpu() for name, tensor in inputs().items()}
    with pytest.raises(error, match=message):
        ops.embed_patches(**(good | changed))


def test_in_the_interpreter():
    run_in_interpreter(__file__)
