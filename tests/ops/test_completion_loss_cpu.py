"""``completion_loss`` apart from its kernels: memory of the CPU path, compiling, bad input."""

import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from op_testing import DEVICE, KERNELS_RUN
from sclkern import reference
from sclkern.kernels import completion_loss_cpu
from sclkern.ops.completion_loss import completion_loss
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted


def features(shape):
    return [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]


@pytest.mark.skipif(not TRITON_INSTALLED or interpreted(), reason="asks the compiler's own description")
def test_no_length_is_compiled_into_a_kernel():
    from sclkern.kernels import completion_loss, completion_loss_backward

    for entry in completion_loss.ahead_of_time("sm_90") + completion_loss_backward.ahead_of_time("sm_90"):
        for parameter in entry["kernel"].params:
            is_absent = parameter.name.endswith("_ptr")  # a pointer that an entry does not name is None
            if not (parameter.is_constexpr or is_absent or parameter.name in entry["signature"] | entry["constants"]):
                assert parameter.do_not_specialize, (entry["kernel"], parameter.name)


@pytest.mark.skipif(KERNELS_RUN, reason="one graph for the CPU path is one for all")
def test_fifty_lengths_compile_once(monkeypatch):
    # The op at every length, not the plain definition.
    monkeypatch.setattr(sys.modules["sclkern.ops.completion_loss"], "MAX_EAGER_ROWS", -1)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def function(recovered, complete):
        return completion_loss(recovered, complete, temperature=0.1)

    counts = set()
    for rows in range(2, 52):
        inputs = features((rows, 4))
        loss = function(*inputs)
        loss.backward()
        torch.testing.assert_close(loss, reference.completion_loss(*inputs, temperature=0.1))
        counts.add(counter.frame_count)
    assert len(counts) == 1


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.skipif(KERNELS_RUN, reason="for the CPU path")
@pytest.mark.parametrize("further", [0, 500])
def test_nothing_of_n_by_n_on_a_cpu(monkeypatch, further):
    monkeypatch.setattr(completion_loss_cpu, "TILE", 2**20)
    # Seen only from inside the op: a dispatch mode that is active outside does not look into it.
    n, m = 6000, 6000 + further
    recovered, complete = (torch.randn(1, rows, 4) for rows in (n, m))
    temperature = torch.tensor(0.1)
    with Largest() as largest:
        features = recovered, complete, temperature, None, None
        losses, positive, lse, _, *rnorms = completion_loss_cpu.forward(*features, True, True, True, 1e-8, 0, n)
        _, sides = completion_loss_cpu.backward(
            torch.ones_like(losses), *features, positive, lse, rnorms, True, 1e-8, ([(0, n)], [(0, m)])
        )
    assert all(side.isfinite().all() for side in (losses, *sides))
    assert n < largest.elements <= 2**20 < n * n


def test_eager_by_name_has_double_backward():
    inputs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    function = lambda *a: completion_loss(*a, temperature=0.7, backend="eager")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs)


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recovered": X.long()}, TypeError, r"recovered: got torch\.int64, expected a floating"),
        ({"recovered": X[0]}, ValueError, r"recovered: got shape \(3,\), expected \(N, D\) or \(G, N, D\)"),
        (
            {"complete": X[:3]},
            ValueError,
            r"complete: got shape \(3, 3\), expected at least 4 rows, of which row i",
        ),
        ({"complete": X[:, :2]}, ValueError, r"complete: got shape \(4, 2\), expected .* = \(any, 3\)"),
        ({"complete": X[None]}, ValueError, r"complete: got shape \(1, 4, 3\), expected .* = \(any, 3\)"),
        ({"complete": X.to("meta")}, ValueError, r"complete: got device meta, expected that of recovered"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0\.0, expected a positive number"),
        ({"temperature": torch.ones(1)}, ValueError, r"temperature: got shape \(1,\), expected \(\)"),
        ({"temperature": torch.tensor(1)}, TypeError, r"temperature: got torch\.int64"),
        ({"valid": torch.ones(4)}, TypeError, r"valid: got torch\.float32, expected torch\.bool"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, r"valid: got shape \(3,\), expected .* = \(4,\)"),
        ({"same": torch.zeros(4)}, TypeError, r"same: got torch\.float32, expected torch\.int64"),
        (
            {"same": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"same: got shape \(3,\), expected \(M,\) = \(4,\)",
        ),
        (
            {"complete": torch.zeros(6, 3), "same": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"same: got shape \(4,\), expected \(M,\) = \(6,\)",
        ),
        ({"normalize": 1}, TypeError, r"normalize: got int, expected a bool"),
        (
            {"same": torch.zeros(4, dtype=torch.int64, device="meta")},
            ValueError,
            r"same: got device meta, expected that",
        ),
        ({"eps": 0.0}, ValueError, r"eps: got 0\.0, expected a positive number"),
        ({"directions": "rows"}, ValueError, r"directions: got 'rows', expected one of both"),
        ({"reduction": "max"}, ValueError, r"reduction: got 'max', expected one of mean"),
        ({"gather": "all"}, ValueError, r"gather: got 'all', expected one of exact"),
        ({"backend": "cuda"}, ValueError, r"backend: got 'cuda', expected one of auto"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        completion_loss(**{"recovered": X, "complete": X, "temperature": 0.1} | changes)


@pytest.mark.skipif(KERNELS_RUN, reason="of the CPU path")
@pytest.mark.parametrize("value", [0.0, -0.01, -0.5, float("nan")])
def test_a_learned_temperature_that_diverged_shows_in_the_loss(value, monkeypatch):
    """A value of the model's, not an argument that somebody got wrong: no error, and what the definition gives."""
    monkeypatch.setattr(sys.modules["sclkern.ops.completion_loss"], "MAX_EAGER_ROWS", -1)
    torch.manual_seed(0)
    inputs, temperature = features((6, 8)), torch.tensor(value)
    loss = completion_loss(*inputs, temperature=temperature)
    expected = completion_loss(*inputs, temperature=temperature, backend="eager")
    if value in (-0.01, -0.5):
        torch.testing.assert_close(loss, expected)
    else:
        assert not loss.isfinite() and not expected.isfinite()
