"""``nn.LinearCrossEntropy`` against ``torch.nn.Linear`` and ``cross_entropy``."""

import copy

import pytest
import torch
import torch.nn.functional as F

from op_testing import DEVICE
from sclkern import nn
from sclkern.ops.dispatch import interpreted


class Plain(torch.nn.Linear):
    def forward(self, hidden, labels):
        return F.cross_entropy(super().forward(hidden).flatten(0, -2), labels.flatten())


def tensors():
    labels = torch.randint(11, (2, 3))
    labels[0, 1] = -100
    return torch.randn(2, 3, 8, dtype=torch.float64).requires_grad_(), labels


@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_torch_does(bias, backend, dtype, assert_same):
    ours, theirs = nn.LinearCrossEntropy(8, 11, bias, backend=backend), Plain(8, 11, bias, dtype=torch.float64)
    assert_same(ours, theirs, *tensors(), dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_logits_and_hits():
    head = nn.LinearCrossEntropy(8, 11, reduction="none", ignore_index=4, dtype=torch.float64, device=DEVICE)
    hidden, labels = (t.to(DEVICE) for t in tensors())
    labels[0, 1] = 4
    logits = head.logits(hidden)
    torch.testing.assert_close(logits, F.linear(hidden, head.weight, head.bias))
    labels[1] = logits[1].argmax(-1)
    loss, hits = head(hidden, labels, return_hits=True)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=4, reduction="none")
    torch.testing.assert_close(loss, expected.view(2, 3))
    assert hits == ((logits.argmax(-1) == labels) & (labels != 4)).sum()


def test_weights_tied_to_an_embedding(backend, dtype):
    def gradient(head, embedding, dtype):
        head, embedding = head.to(DEVICE, dtype), embedding.to(DEVICE, dtype)
        head.weight = embedding.weight
        ids = torch.arange(6, device=DEVICE).view(2, 3)
        head(embedding(ids), ids + 2).backward()
        assert embedding.weight.grad is head.weight.grad
        return embedding.weight.grad

    embedding = torch.nn.Embedding(11, 8)
    ours = gradient(nn.LinearCrossEntropy(8, 11, False, backend=backend), copy.deepcopy(embedding), dtype)
    truth = gradient(Plain(8, 11, False), copy.deepcopy(embedding), torch.float64)
    torch.testing.assert_close(ours.double(), truth, rtol=6e-5, atol=6e-6)


def test_autocast_with_float32_parameters(run_module):
    ours, theirs = nn.LinearCrossEntropy(8, 11), Plain(8, 11)
    ours.load_state_dict(theirs.state_dict())
    hidden, labels = tensors()
    hidden = hidden.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, truth = (run_module(head, hidden, labels) for head in (ours, theirs))
    for name, expected in truth.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected, rtol=0.05, atol=0.02)


@pytest.mark.skipif(interpreted(), reason="the eager path")
def test_compiles_whole(run_module):
    head = nn.LinearCrossEntropy(8, 11).double()
    inputs = tensors()
    plain = run_module(head, *inputs)
    head.compile(fullgraph=True, backend="aot_eager")
    for name, tensor in run_module(head, *inputs).items():
        torch.testing.assert_close(tensor, plain[name], msg=name)


def test_copies_and_names():
    head = copy.deepcopy(nn.LinearCrossEntropy(8, 11, reduction="sum", backend="eager"))
    assert (head.reduction, head.backend) == ("sum", "eager")
    assert "in_features=8, out_features=11, bias=True, ignore_index=-100, reduction='sum'" in repr(head)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="reduction: got 'max', expected one of mean, sum, none"):
        nn.LinearCrossEntropy(8, 11, reduction="max")
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        nn.LinearCrossEntropy(8, 11, backend="cuda")
    with pytest.raises(ValueError, match=r"labels: got shape \(2,\), expected \(...\) = \(3,\)"):
        nn.LinearCrossEntropy(8, 11)(torch.zeros(3, 8), torch.zeros(2, dtype=torch.int64))
