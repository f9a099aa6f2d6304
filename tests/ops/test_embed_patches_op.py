"""``embed_patches``: the CPU path here; the kernels in the interpreter (`make test` runs it) or on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from op_testing import BACKENDS, DEVICE, DTYPES, needs_kernels, run_in_interpreter, thorough_except
from sclkern import ops, reference
from sclkern.ops.dispatch import interpreted

NAMES = ("images", "weight", "position", "cls", "temporal", "keep", "replace", "mask_token", "norm_weight", "norm_bias")
LEARNED = tuple(name for name in NAMES if name not in ("images", "keep", "replace"))
# The optional tensors: all of them, and those of a model of images.
EVERYTHING = {"temporal", "replace", "mask_token", "norm_weight", "norm_bias"}
IMAGE = {"norm_weight", "norm_bias"}


def inputs(samples=2, frames=2, side=6, size=2, columns=20, kept=None, given=EVERYTHING, dtype=torch.float32, seed=0):
    """Tensors by name; with ``kept``, that many patches in no order; ``given`` names the optional ones."""
    generator = torch.Generator().manual_seed(seed)
    patches = (side // size) ** 2
    shapes = {
        "images": (samples, frames, 3, side, side),
        "weight": (columns, 3, size, size),
        "position": (1 + patches, columns),
        "temporal": (frames + 1, columns),
    } | dict.fromkeys(("cls", "mask_token", "norm_weight", "norm_bias"), (columns,))
    tensors = {
        name: torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_(name != "images")
        for name, shape in shapes.items()
    }
    if "replace" in given:
        tensors["replace"] = (torch.rand(samples, patches, generator=generator) < 0.4).to(DEVICE)
    if kept is not None:
        rows = [torch.randperm(patches, generator=generator)[:kept] for _ in range(samples)]
        tensors["keep"] = torch.stack(rows).to(DEVICE) if rows else torch.zeros(0, kept, dtype=torch.int64).to(DEVICE)
    always = ("images", "weight", "position", "cls", "keep")
    return {name: tensors[name] for name in NAMES if name in tensors and (name in always or name in given)}


def run(function, tensors, grad=None, dtype=None, **options):
    """The output and every gradient, by name."""
    tensors = {
        name: t.detach().to((dtype or t.dtype) if t.is_floating_point() else t.dtype).requires_grad_(name in LEARNED)
        for name, t in tensors.items()
    }
    out = function(**tensors, **options)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(out.shape, generator=generator).to(DEVICE) if grad is None else grad
    out.backward(grad.to(out.dtype))
    return {"out": out.detach()} | {name: t.grad for name, t in tensors.items() if name in LEARNED}


def assert_as_exact_as_eager(tensors):
    truth = run(reference.embed_patches, tensors, dtype=torch.float64)
    eager = run(reference.embed_patches, tensors)
    ours = run(ops.embed_patches, tensors, backend="triton")
    for name, exact in truth.items():
        a, b = ours[name], eager[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if not exact.numel():
            continue
        error, allowed = ((value.double() - exact).abs().max().item() for value in (a, b))
        largest = exact.abs().max().item()
        # Half a unit in the last place is what rounding the exact result costs, half what orders of summing differ by.
        assert error <= 1.5 * allowed + torch.finfo(a.dtype).eps * largest, (name, error, allowed, largest)
        if a.dtype == torch.float32:
            assert error <= (2e-5 if name == "out" else 6e-5) * largest, (name, error, largest)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", thorough_except([3], [None, 3]))
@pytest.mark.parametrize("given", [IMAGE, EVERYTHING, EVERYTHING - IMAGE], ids=len)
def test_error_is_at_most_that_of_eager(given, kept, dtype):
    assert_as_exact_as_eager(inputs(side=4, given=given, kept=kept, dtype=dtype))


@needs_kernels
@pytest.mark.parametrize("kept", thorough_except([0, 33], [0, 1, 15, 16, 33, 64]))
def test_numbers_of_kept_patches_around_the_tiles(kept):
    assert_as_exact_as_eager(inputs(1, 1, side=9, size=1, columns=40, kept=kept))


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 1, 2, 2, 17), (1, 1, 8, 1, 33), (0, 2, 6, 2, 8), (1, 2, 6, 3, 257)], ids=str)
def test_shapes_of_any_size(shape):
    assert_as_exact_as_eager(inputs(*shape))


@needs_kernels
def test_a_row_of_one_column_is_its_bias():
    tensors = inputs(1, 1, columns=1, given=IMAGE)
    ours = run(ops.embed_patches, tensors, backend="triton")
    assert (ours["out"] == tensors["norm_bias"]).all() and not ours["weight"].any() and not ours["norm_weight"].any()


@needs_kernels
@given(
    samples=st.integers(1, 3),
    frames=st.integers(1, 2),
    line=st.integers(1, 3),
    size=st.integers(1, 4),
    columns=st.integers(8, 40),
    kept=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    given=st.sampled_from([set(), IMAGE, EVERYTHING]),
)
@settings(max_examples=5, deadline=None)
def test_any_configuration(samples, frames, line, size, columns, kept, dtype, given):
    kept = kept if kept <= line * line else None
    assert_as_exact_as_eager(inputs(samples, frames, line * size, size, columns, kept, given, dtype))


@needs_kernels
def test_dropped_and_replaced_pixels_are_never_read():
    tensors = inputs(kept=4)
    keep, replace = tensors["keep"], tensors["replace"]
    read = torch.zeros_like(replace).scatter_(1, keep, True) & ~replace
    pixels = read.view(2, 1, 1, 3, 1, 3, 1).expand(2, 2, 3, 3, 2, 3, 2).reshape(2, 2, 3, 6, 6)
    poisoned = tensors | {"images": tensors["images"].where(pixels, torch.nan)}
    for backend in BACKENDS[1:]:
        clean, dirty = (run(ops.embed_patches, case, backend=backend) for case in (tensors, poisoned))
        assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@needs_kernels
def test_any_strides_and_expanded_gradients():
    tensors = inputs(kept=4)
    images, weight = tensors["images"], tensors["weight"]
    tensors["weight"] = weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    tensors["position"] = torch.randn(10, 40, device=DEVICE)[:, ::2]
    tensors["keep"] = torch.cat([tensors["keep"]] * 2, 1)[:, 4:]
    tensors["norm_bias"] = torch.randn(1, device=DEVICE).expand(20)
    for view in (
        images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),  # channels last
        images[:, :1].expand(-1, 2, -1, -1, -1),
        torch.cat([images, images], 4)[..., ::2],
        images.transpose(3, 4),
    ):
        case = tensors | {"images": view}
        grad = torch.ones(1, device=DEVICE).expand(2, 10, 20)
        ours, truth = (
            run(function, case, grad=grad)
            for function in (lambda **o: ops.embed_patches(**o, backend="triton"), reference.embed_patches)
        )
        for name in truth:
            torch.testing.assert_close(ours[name], truth[name], atol=1e-5, rtol=1e-4)


@needs_kernels
def test_a_large_mean_of_the_rows_costs_no_accuracy():
    tensors = inputs(columns=96)
    tensors["cls"] = tensors["cls"].detach() + 1000
    tensors["temporal"] = tensors["temporal"].detach() + 1000
    ours = run(ops.embed_patches, tensors, backend="triton")
    truth = run(reference.embed_patches, tensors, dtype=torch.float64)
    # A unit in the last place of 2000 is 1.2e-4.
    torch.testing.assert_close(ours["out"].double(), truth["out"], atol=1e-3, rtol=1e-3)


@needs_kernels
def test_runs_are_equal_to_the_bit():
    tensors = inputs(3, kept=5)
    first, second = (run(ops.embed_patches, tensors, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted", [("weight",), ("position", "temporal", "norm_bias"), ("cls", "mask_token", "norm_weight")], ids=len
)
def test_any_inputs_may_be_frozen_and_the_graph_kept(wanted, backend):
    tensors = inputs(kept=4)
    whole = run(ops.embed_patches, tensors, grad=torch.ones(2, 10, 20, device=DEVICE), backend=backend)
    tensors = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    out = ops.embed_patches(**tensors, backend=backend).sum()
    for _ in range(2):
        gradients = torch.autograd.grad(out, [tensors[name] for name in wanted], retain_graph=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            assert torch.equal(gradient, whole[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_token_without_replacement_gets_no_gradient(backend):
    tensors = inputs(given={"mask_token"})
    assert run(ops.embed_patches, tensors, backend=backend)["mask_token"] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_selected_is_embedded(backend):
    tensors = inputs(2, 1, side=8, columns=8)
    options = {"seed": 5, "device": DEVICE, "backend": backend}
    tensors["keep"] = ops.select_patches(16, 0.4, 2, **options)
    tensors["replace"] = ops.select_tokens(16, 0.4, 2, **options)
    ours, truth = ops.embed_patches(**tensors, backend=backend), reference.embed_patches(**tensors)
    torch.testing.assert_close(ours, truth, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [set(), IMAGE], ids=len)
def test_autocast_gives_the_dtypes_of_eager(backend, given):
    tensors = inputs(given=given, kept=4)
    results = []
    for function in (lambda **o: ops.embed_patches(**o, backend=backend), reference.embed_patches):

        def cast(function=function, **tensors):
            with torch.autocast(DEVICE, dtype=torch.float16):
                return function(**tensors)

        results.append(run(cast, tensors))
    for name, eager in results[1].items():
        assert results[0][name].dtype == eager.dtype, name
        torch.testing.assert_close(results[0][name], eager, atol=3e-2, rtol=1e-2)


@needs_kernels
def test_no_second_derivative_through_the_kernel():
    tensors = inputs()
    out = ops.embed_patches(**tensors, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), tensors["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        first.sum().backward()


def of_op(tensors):
    """The arguments of the registered op."""
    return [tensors.get(name) for name in NAMES]


@pytest.mark.parametrize(("given", "kept"), [(set(), None), (EVERYTHING, 2)], ids=["plain", "everything"])
def test_registration(given, kept):
    tensors = inputs(1, side=4, given=given, kept=kept)
    options = 1e-5, torch.float32
    torch.library.opcheck(torch.ops.sclkern.embed_patches, (*of_op(tensors), *options))
    plain = [None if t is None else t.detach() for t in of_op(tensors)]
    out, *saved = torch.ops.sclkern.embed_patches(*plain, *options)
    torch.library.opcheck(torch.ops.sclkern.embed_patches_backward, (torch.ones_like(out), *plain, *saved))


@pytest.mark.parametrize(("given", "kept"), [(set(), None), (EVERYTHING, 4)], ids=["plain", "everything"])
def test_registered_op_equals_the_reference(given, kept):
    tensors = inputs(given=given, kept=kept)

    def call(**tensors):
        return torch.ops.sclkern.embed_patches(*of_op(tensors), 1e-5, torch.float32)[0]

    ours, truth = run(call, tensors), run(reference.embed_patches, tensors, dtype=torch.float64)
    for name, exact in truth.items():
        assert (ours[name].double() - exact).abs().max() <= 6e-5 * exact.abs().max(), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    tensors = inputs(kept=4)

    def call(images, **others):
        arguments = of_op({"images": images * 2} | others)
        return torch.ops.sclkern.embed_patches(*arguments, 1e-5, torch.float32)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours = run(compiled, tensors)
    truth = run(lambda images, **others: reference.embed_patches(images * 2, **others), tensors)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_public_function_compiles_whole(backend):
    tensors = inputs(kept=4)
    compiled = torch.compile(ops.embed_patches, fullgraph=True, backend="aot_eager")
    ours, truth = run(compiled, tensors, backend=backend), run(reference.embed_patches, tensors)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], atol=5e-5, rtol=1e-4)


@pytest.mark.skipif(interpreted(), reason="no kernel takes part")
def test_eager_has_first_and_second_derivatives():
    tensors = inputs(1, 1, side=2, size=1, columns=3, kept=3, dtype=torch.float64)
    names = [name for name, t in tensors.items() if t.is_floating_point()]
    tensors["images"].requires_grad_()

    def call(*values):
        return ops.embed_patches(**(tensors | dict(zip(names, values, strict=True))), backend="eager")

    values = [tensors[name] for name in names]
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
