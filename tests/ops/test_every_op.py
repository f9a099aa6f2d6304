"""What holds for every op, over the table sclkern.tools.specs.SPECS.

Where no kernel runs, the op itself is taken all the same: ``cpu_kernels`` computes it by its definition, but everything
around it (registration, fake functions, autograd, checks) is what runs on a GPU.
"""

import contextlib
import inspect
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from op_testing import DEVICE, DIFFERENTIABLE, KERNELS_RUN, Calls, run_in_interpreter, small_inputs
from sclkern import ops
from sclkern.ops import dispatch
from sclkern.ops.dispatch import interpreted
from sclkern.tools.specs import SPECS

LENGTH = 6
HALF = torch.bfloat16
every_op = pytest.mark.parametrize("name", SPECS)
every_differentiable_op = pytest.mark.parametrize("name", DIFFERENTIABLE)
# They compute each op many times, and what they show does not depend on who computes it.
not_interpreted = pytest.mark.skipif(interpreted(), reason="takes minutes in the interpreter")


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """Every op believes in a GPU; on a CPU its definition computes (``cpu_kernels``)."""
    if not KERNELS_RUN:
        monkeypatch.setattr(dispatch, "_problems", lambda devices, dtypes: ())


def build(name, length=LENGTH, **changes):
    """Arguments of the op; floating tensors are leaves."""
    torch.manual_seed(length)
    arguments = small_inputs(name, length)
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(key not in SPECS[name].frozen)
    return arguments | changes


def leaves(arguments):
    return [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]


def results(out):
    return list(out) if isinstance(out, tuple) else [out]


def gradients(out, arguments, **options):
    """Of a fixed random projection of the output."""
    out = results(out)[0]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return torch.autograd.grad(out, leaves(arguments), weight, **options)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_every_public_function_is_in_the_table():
    public = {name for name in ops.__all__ if callable(getattr(ops, name))} - {"explain"}
    assert public == set(ops.OPS) == set(SPECS)
    for name, value in vars(ops).items():
        assert name.startswith("_") or not inspect.isfunction(value) or name in {*public, "explain"}, name


@every_op
def test_eager_gives_the_same(name):
    arguments = build(name)
    function = getattr(ops, name)
    ours, theirs = function(**arguments), function(**arguments, backend="eager")
    assert_same(results(ours), results(theirs), rtol=1e-4, atol=1e-5)
    if name in DIFFERENTIABLE:
        assert_same(gradients(ours, arguments), gradients(theirs, arguments), rtol=1e-4, atol=1e-5)


@every_op
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=r"backend: got 'cuda', expected one of auto, triton, eager"):
        getattr(ops, name)(**build(name), backend="cuda")


@every_op
def test_explain_answers(name):
    if "public_op" in vars(sys.modules[getattr(ops, name).__module__]):
        choice = ops.explain(name, **build(name))
        assert choice.backend == "triton" and choice.reasons


@not_interpreted
@every_op
def test_compiles_whole(name):
    function, arguments = getattr(ops, name), build(name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, theirs = compiled(**arguments), function(**arguments)
    assert_same(results(ours), results(theirs))
    if name in DIFFERENTIABLE:
        assert_same(gradients(ours, arguments), gradients(theirs, arguments))


@not_interpreted
@every_op
def test_fifty_lengths_compile_once(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend=counter, dynamic=True)
    counts = []
    # From 35 on no length equals another size, which the first compilation would take for the same.
    for length in range(35, 85):
        arguments = build(name, length)
        ours = compiled(**arguments)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0] > 0
    theirs = getattr(ops, name)(**arguments)
    assert_same(results(ours), results(theirs))
    if name in DIFFERENTIABLE:
        assert_same(gradients(ours, arguments), gradients(theirs, arguments))


@not_interpreted
@every_op
def test_registration(name):
    arguments = build(name)
    with Calls() as calls:
        out = getattr(ops, name)(**arguments)
        if name in DIFFERENTIABLE:
            gradients(out, arguments)
    names = {function._opname for function, _, _ in calls.found}
    assert any(n.endswith("backward") for n in names) == (name in DIFFERENTIABLE) and names
    for function, args, kwargs in calls.found:
        backward = function._opname.endswith("backward")
        args = [
            a.detach().requires_grad_(a.requires_grad and not backward) if isinstance(a, torch.Tensor) else a
            for a in args
        ]
        torch.library.opcheck(function, tuple(args), kwargs)


@every_differentiable_op
def test_autocast_with_float32_parameters(name):
    truth_arguments = build(name)
    truth = getattr(ops, name)(**truth_arguments)
    arguments = {
        key: value.detach().to(HALF).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key not in SPECS[name].float32
        else value
        for key, value in truth_arguments.items()
    }
    with torch.autocast(DEVICE, HALF):
        out = getattr(ops, name)(**arguments)
    found = gradients(out, arguments)
    assert [g.dtype for g in found] == [leaf.dtype for leaf in leaves(arguments)]
    tolerance = {"rtol": 0.05, "atol": 0.05, "check_dtype": False}
    assert_same(results(out), results(truth), **tolerance)
    exact = gradients(truth, truth_arguments)
    scale = max(g.abs().max().item() for g in exact)
    assert_same([g / scale for g in found], [g / scale for g in exact], **tolerance)


@every_differentiable_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_same_dropout(name, reentrant):
    arguments = build(name, **({"dropout_p": 0.4, "seed": None} if SPECS[name].dropout else {}))

    def call(*values):
        # Times 1: the recomputation starts inside, as behind the layers of a model.
        values = [v * 1 if isinstance(v, torch.Tensor) and v.requires_grad else v for v in values]
        return results(getattr(ops, name)(**dict(zip(arguments, values, strict=True))))[0]

    found = []
    for function in (call, lambda *values: checkpoint(call, *values, use_reentrant=reentrant)):
        torch.manual_seed(3)
        out = function(*arguments.values())
        torch.rand(3, device=DEVICE)
        for leaf in leaves(arguments):
            leaf.grad = None
        out.backward(torch.ones_like(out))
        found.append([out.detach(), *(leaf.grad for leaf in leaves(arguments))])
    assert_same(*found, rtol=0, atol=0)


@pytest.mark.skipif(not interpreted(), reason="no launch to watch")
@every_op
def test_kernels_are_launched_on_the_device_of_the_tensors(name, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    current, launches, run = [], [], InterpretedFunction.run

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def watched(self, *arguments, **options):
        launches.append(bool(current))
        return run(self, *arguments, **options)

    # The tensors are on another device than the current one.
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(InterpretedFunction, "run", watched)
    arguments = build(name)
    out = getattr(ops, name)(**arguments)
    if name in DIFFERENTIABLE:
        gradients(out, arguments)
    assert launches and all(launches)


@every_op
def test_without_gradients(name):
    arguments, function = build(name), getattr(ops, name)
    usual = results(function(**arguments))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = results(function(**arguments))
        assert not any(t.requires_grad for t in out)
        assert_same(out, [t.detach() for t in usual], rtol=1e-5, atol=1e-6)


@every_differentiable_op
def test_a_second_backward_gives_the_same(name):
    arguments = build(name)
    out = getattr(ops, name)(**arguments)
    first = gradients(out, arguments, retain_graph=True)
    assert_same(first, gradients(out, arguments), rtol=0, atol=0)


@every_differentiable_op
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_eager_has_second_derivatives(name, how, monkeypatch):
    arguments, options = build(name), {"backend": "eager"} if how == "argument" else {}
    if how == "environment":
        monkeypatch.setenv("SCLKERN_BACKEND", "eager")
    first = gradients(getattr(ops, name)(**arguments, **options), arguments, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves(arguments), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in second)


@every_differentiable_op
def test_without_second_derivatives_the_kernel_names_the_eager_path(name):
    arguments = build(name)
    first = gradients(getattr(ops, name)(**arguments), arguments, create_graph=True)
    with pytest.raises(RuntimeError, match=r'^\w+: the kernel has no second derivative; backend="eager" has$'):
        sum(g.square().sum() for g in first).backward()


@not_interpreted
def test_an_op_is_vmapped():
    arguments = build("bias_gelu")
    x, bias = torch.randn(3, *arguments["x"].shape, device=DEVICE), arguments["bias"].detach()
    ours = torch.vmap(lambda x: ops.bias_gelu(x, bias))(x)
    torch.testing.assert_close(ours, ops.bias_gelu(x, bias, backend="eager"))


def test_in_the_interpreter():
    run_in_interpreter(__file__)
