"""The ranking loss of embeddings over N: ours beside sentence-transformers' two, of one thread on a CPU.

Anchors, positives and one column of hard negatives, of random embeddings; forward and backward of the loss alone. A
case is timed only after the gradients of both agreed. The peak of memory is beside the embeddings. N x 2 N similarities
of more rows than here are not worth their time in the package's plain loss.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness.profiler_trace import peak_bytes, record_trace

WIDTH, ROUNDS, MOST_ROWS_OF_PLAIN = 64, 3, 8192


def gradients_of(loss: nn.Module, columns: list[Tensor]) -> list[Tensor]:
    """Of the embeddings, by the way that each class takes from embeddings to their gradients."""
    leaves = [column.detach().requires_grad_() for column in columns]
    if hasattr(loss, "calculate_loss"):
        loss.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
    else:
        loss.compute_loss_from_embeddings(leaves, None).backward()
    return [leaf.grad for leaf in leaves]


def seconds_of(call) -> float:
    if not torch.cuda.is_available():
        begin = time.thread_time()
        call()
        return time.thread_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.priority(2)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rows", [1024, 4096, 16384])
def test_ranking_losses(rows, record):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from sclkern.integrations import sentence_transformers as ours

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = [torch.randn(rows, WIDTH, device=device) for _ in range(3)]
    columns[1] += columns[0]
    model = nn.ModuleList([nn.Identity()])
    implementations = {
        "sclkern": ours.MultipleNegativesRankingLoss(model),
        "sentence-transformers": losses.MultipleNegativesRankingLoss(model),
        "sentence-transformers, cached": losses.CachedMultipleNegativesRankingLoss(model),
    }
    if rows > MOST_ROWS_OF_PLAIN:
        del implementations["sentence-transformers"]
    expected = gradients_of(implementations["sentence-transformers, cached"], columns)
    for name, loss in implementations.items():
        found = gradients_of(loss, columns)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        seconds = [seconds_of(lambda loss=loss: gradients_of(loss, columns)) for _ in range(ROUNDS)]
        if device.type == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            gradients_of(loss, columns)
            peak = torch.cuda.max_memory_allocated() - held
        else:
            peak = peak_bytes(record_trace(lambda loss=loss: gradients_of(loss, columns)))
        record(
            f"ranking_loss/{rows}/{name}",
            dtype="float32", rows=rows, width=WIDTH, seconds=sorted(seconds), median=statistics.median(seconds),
            peak_bytes=peak,
        )  # fmt: skip
