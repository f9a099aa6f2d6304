"""How a call reaches the kernel: past the dispatcher where nobody can tell, through it where somebody looks; what is
settled once for calls that differ in values alone."""

import threading

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from op_testing import DIFFERENTIABLE, KERNELS_RUN, Calls, small_inputs
from sclkern import ops
from sclkern.ops import _registration, dispatch
from sclkern.tools.specs import SPECS

pytestmark = pytest.mark.skipif(KERNELS_RUN, reason="watches the stand-ins for kernels")
every_op = pytest.mark.parametrize("name", SPECS)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_problems", lambda devices, dtypes: ())


@pytest.fixture
def direct(monkeypatch):
    """The names of the ops that were computed past the dispatcher."""
    called = []
    for name, runners in _registration.RUNNERS.items():
        if "cpu" in runners:

            def run(*arguments, name=name, function=runners["cpu"]):
                called.append(name)
                return function(*arguments)

            monkeypatch.setitem(runners, "cpu", run)
    return called


def arguments_of(name):
    torch.manual_seed(0)
    arguments = small_inputs(name, 6)
    for key in SPECS[name].leaves(arguments) if name in DIFFERENTIABLE else ():
        arguments[key].requires_grad_()
    return arguments


def both(name, arguments):
    """The output and the gradients."""
    out = getattr(ops, name)(**arguments)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, leaves, torch.ones_like(out)) if leaves else ())]


@every_op
def test_the_dispatcher_is_left_out_and_gives_the_same(name, direct):
    arguments = arguments_of(name)
    ours, past = both(name, arguments), list(direct)
    direct.clear()
    with Calls() as calls:
        theirs = both(name, arguments)
    assert past and past == [function._opname for function, _, _ in calls.found]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_graph_holds_the_op(direct, pre_dispatch):
    x, bias = (arguments_of("bias_gelu")[name].detach() for name in ("x", "bias"))
    graph = make_fx(lambda x: ops.bias_gelu(x, bias), pre_dispatch=pre_dispatch)(x)
    assert torch.ops.sclkern.bias_gelu.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(2 * x), ops.bias_gelu(2 * x, bias))


def test_inference_mode_leaves_the_dispatcher_out_too(direct):
    arguments = arguments_of("bias_gelu")
    with torch.inference_mode():
        out = ops.bias_gelu(**arguments)
    assert direct == ["bias_gelu"] and torch.equal(out, ops.bias_gelu(**arguments))


def test_a_profiler_names_the_ops(direct):
    arguments = arguments_of("bias_gelu")
    with torch.profiler.profile() as profiler:
        both("bias_gelu", arguments)
    names = {event.key for event in profiler.key_averages()}
    assert {"sclkern::bias_gelu", "sclkern::bias_gelu_backward"} <= names


def test_selective_checkpointing_sees_the_ops(direct):
    arguments, seen = arguments_of("bias_gelu"), []

    def policy(context, op, *args, **kwargs):
        seen.append(op)
        return (
            CheckpointPolicy.MUST_SAVE
            if op is torch.ops.sclkern.bias_gelu.default
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    x, bias = arguments["x"], arguments["bias"]
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    out = checkpoint(lambda x: ops.bias_gelu(x * 1, bias), x, use_reentrant=False, context_fn=contexts)
    forwards = seen.count(torch.ops.sclkern.bias_gelu.default)
    assert forwards == 1
    found = torch.autograd.grad(out, [x, bias], torch.ones_like(out))
    for a, b in zip(found, both("bias_gelu", arguments)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_subclass_is_dispatched(direct):
    seen = []

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            wrapped.inner = inner
            return wrapped

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))

    arguments = arguments_of("bias_gelu")
    out = ops.bias_gelu(Wrapped(arguments["x"].detach()), arguments["bias"].detach())
    assert torch.ops.sclkern.bias_gelu.default in seen
    torch.testing.assert_close(out, ops.bias_gelu(**arguments).detach())


def test_threads_do_not_disturb_each_other():
    arguments = arguments_of("attention")
    expected, failures = both("attention", arguments), []

    def work():
        for _ in range(5):
            if not all(map(torch.equal, both("attention", arguments), expected)):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class TestChoose:
    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(_registration, "SETTLED_ON", {"cpu"})
        monkeypatch.setattr(_registration, "_choices", {})
        monkeypatch.setattr(_registration, "may_read", lambda tensor: False)

    @every_op
    def test_arguments_are_in_the_order_of_the_parameters(self, name, monkeypatch):
        signature, found = _registration._signature, []
        monkeypatch.setattr(
            _registration, "_signature", lambda op, values: found.append((op, values)) or signature(op, values)
        )
        arguments = arguments_of(name)
        getattr(ops, name)(**arguments)
        op, values = found[0]
        call = _registration.inspect.signature(getattr(ops, name)).bind(**arguments)
        call.apply_defaults()
        assert op == name and len(values) == len(call.arguments)
        assert all(a is b or a == b for a, b in zip(values, call.arguments.values(), strict=True))

    @every_op
    def test_once_for_calls_of_other_values(self, name):
        getattr(ops, name)(**arguments_of(name))
        count = len(_registration._choices)
        getattr(ops, name)(**arguments_of(name))
        assert len(_registration._choices) == count
        # A draw may take no tensor.
        assert count > 0 or name in ("select_patches", "select_tokens")

    def test_a_wrong_call_is_refused_after_a_right_one(self):
        arguments = arguments_of("attention")
        ops.attention(**arguments, dropout_p=0)
        cases: list = [(TypeError, {"dropout_p": False}), (ValueError, {"dropout_p": 1.5})]
        cases += [(ValueError, {"key": arguments["key"][:, :-1]}), (TypeError, {"key": arguments["key"].double()})]
        cases += [(ValueError, {"backend": "cuda"}), (TypeError, {"return_lse": 0})]
        for error, wrong in cases:
            for _ in range(2):
                with pytest.raises(error):
                    ops.attention(**{"dropout_p": 0, **arguments, **wrong})

    def test_what_surrounds_a_call_counts(self, monkeypatch):
        arguments = arguments_of("bias_gelu")
        ops.bias_gelu(**arguments)
        with torch.autocast("cpu", torch.bfloat16):
            ops.bias_gelu(**arguments)
        with torch.no_grad():
            ops.bias_gelu(**arguments)
        monkeypatch.setenv("SCLKERN_BACKEND", "eager")
        ops.bias_gelu(**arguments)
        paths = [choice.path for choice in _registration._choices.values()]
        assert paths == ["triton", "triton", "triton", "eager"]

    def test_values_that_are_checked_are_checked_every_time(self, monkeypatch):
        monkeypatch.setattr(_registration, "may_read", dispatch.may_read)
        arguments = arguments_of("packed_attention")
        ops.packed_attention(**arguments)
        arguments["cu_seqlens_q"] = arguments["cu_seqlens_q"] + 1
        with pytest.raises(ValueError, match="cu_seqlens_q: got"):
            ops.packed_attention(**arguments)

    def test_choices_do_not_grow_for_ever(self, monkeypatch):
        monkeypatch.setattr(_registration, "MAX_CHOICES", 3)
        for length in range(2, 9):
            ops.bias_gelu(torch.zeros(length, 8), torch.zeros(8))
            assert 0 < len(_registration._choices) <= 3
