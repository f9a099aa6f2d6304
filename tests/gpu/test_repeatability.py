"""The same bits from run to run, and the same draws and dropout masks as on a CPU."""

import pytest
import torch

from op_testing import DEVICE, DIFFERENTIABLE, SEED, SHAPES, cast, evaluate, inputs_at, small_inputs
from sclkern import ops, reference
from sclkern.tools.specs import SPECS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
REPETITIONS = 1000
KERNEL = {"cross_attention": {"absorb": "keys"}}


def count_of_differing(name, arguments, repetitions, **options):
    """In how many of so many backward passes any bit of any gradient differs from the first; counted on the device."""
    out = getattr(ops, name)(**arguments, backend="triton", **options)
    outputs = out if isinstance(out, tuple) else (out,)
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    weights = [torch.randn(t.shape, device=DEVICE).to(t.dtype) for t in outputs]
    first = torch.autograd.grad(outputs, leaves, weights, retain_graph=True)
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(repetitions):
        again = torch.autograd.grad(outputs, leaves, weights, retain_graph=True)
        # Not equal to itself either: NaN counts as a difference.
        differing += torch.stack([(a != b).any() for a, b in zip(first, again, strict=True)]).any()
    return differing.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_thousand_backward_passes_give_the_same_bits(name, dtype):
    torch.manual_seed(0)
    dropout = {"dropout_p": 0.1, "seed": torch.tensor([SEED], device=DEVICE)} if SPECS[name].dropout else {}
    # Long enough for several programs to meet in whatever is summed over rows.
    arguments = cast(name, small_inputs(name, 517), dtype, ("temperature",)) | dropout
    assert count_of_differing(name, arguments, REPETITIONS, **KERNEL.get(name, {})) == 0


@pytest.mark.parametrize("name", SHAPES)
def test_a_hundred_backward_passes_at_whole_shapes_give_the_same_bits(name):
    torch.manual_seed(0)
    op, shape = SHAPES[name]
    arguments = cast(op, inputs_at(op, shape), torch.bfloat16, shape.float32)
    assert count_of_differing(op, arguments, REPETITIONS // 10, **shape.kernel_options) == 0


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_and_backward_are_those_of_a_cpu(name):
    """With dropout: another mask would be another result."""
    torch.manual_seed(0)
    dropout = {"dropout_p": 0.3} if SPECS[name].dropout else {}
    arguments = small_inputs(name, 65) | dropout | ({"seed": torch.tensor([SEED], device=DEVICE)} if dropout else {})
    on_cpu = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    ours = evaluate(name, cast(name, arguments, torch.float32), backend="triton", **KERNEL.get(name, {}))
    weight = torch.randn(ours["out"].shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).cpu()
    leaves = cast(name, on_cpu, torch.float64)
    out = getattr(ops, name)(**leaves, backend="eager")
    parts = [part for part, value in leaves.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(out, [leaves[part] for part in parts], weight.to(out.dtype) if out.ndim else None)
    for part, expected in zip(["out", *parts], [out.detach(), *gradients], strict=True):
        error = (ours[part].cpu().double() - expected).abs().max()
        assert error <= 6e-5 * expected.abs().max().clamp_min(1.0), (part, error)


def test_attention_drops_the_probabilities_that_a_cpu_drops():
    batch, heads, queries, keys = 3, 4, 130, 64
    query, key = (torch.randn(batch, length, heads, keys, device=DEVICE) for length in (queries, keys))
    # Each key's value marks the key: the output is the matrix of probabilities after dropout.
    value = torch.eye(keys, device=DEVICE)[None, :, None].expand(batch, -1, heads, -1)
    options = {"dropout_p": 0.3, "seed": torch.tensor([SEED], device=DEVICE)}
    kept = ops.attention(query, key, value, **options, backend="triton").permute(0, 2, 1, 3) != 0
    sizes = batch, heads, queries, keys
    assert torch.equal(kept.cpu(), reference.attention_dropout_mask(*sizes, dropout_p=0.3, seed=SEED))


def test_layer_norm_drops_the_elements_that_a_cpu_drops():
    x = torch.randn(1000, 768, device=DEVICE, requires_grad=True)
    weight, bias = torch.ones(768, device=DEVICE), torch.zeros(768, device=DEVICE)
    seed = torch.tensor([SEED], device=DEVICE)
    out = ops.dropout_add_layer_norm(x, x.detach(), weight, bias, dropout_p=0.1, seed=seed, backend="triton")
    out.backward(torch.randn_like(out))
    expected = reference.feature_dropout_keep(1000, 768, 0.1, torch.tensor([SEED]))
    assert torch.equal((x.grad != 0).cpu(), expected)


@pytest.mark.parametrize("patches", [1, 16, 197, 324, 4096])
@pytest.mark.parametrize("kind", ["select_patches", "select_tokens"])
def test_patches_are_those_of_a_cpu(kind, patches):
    for ratio in (0.0, 0.2, 0.3, 1.0):
        ours = getattr(ops, kind)(patches, ratio, 64, seed=SEED, device=DEVICE, backend="triton")
        assert torch.equal(ours.cpu(), getattr(ops, kind)(patches, ratio, 64, seed=SEED, device="cpu"))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", ["mlm", "completion"])
def test_text_masks_are_those_of_a_cpu(kind, published):
    ids, lengths = torch.randint(3, 50264, (512, 50)), torch.randint(0, 51, (512,))
    options = {"kind": kind, "ratio": 0.4, "mask_id": 50264, "vocab_size": 50265, "seed": SEED, "published": published}
    ours = ops.mask_text(ids.to(DEVICE), lengths.to(DEVICE), **options, backend="triton")
    for a, b in zip(ours, ops.mask_text(ids, lengths, **options), strict=True):
        assert torch.equal(a.cpu(), b)
