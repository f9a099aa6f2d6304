"""Workers leave signals to their parent, which ends them; their death is an error of one line."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sclkern.data.workers import ignore_signals, iterate
from sclkern.errors import WorkerError


def loader(start_method, workers=2, **options):
    return DataLoader(
        TensorDataset(torch.arange(400)),
        batch_size=4,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        multiprocessing_context=start_method if workers else None,
        **options,
    )


def children():
    return [int(pid) for pid in open(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read().split()]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_signals_do_not_end_workers(start_method):
    before = set(children())
    batches = iterate(loader(start_method, workers=2 if start_method == "fork" else 1))
    first = next(batches)
    workers = set(children()) - before
    # With the process that spawn starts to clean up, which ignores them by itself, unless an earlier test started it.
    assert len(workers) >= (2 if start_method == "fork" else 1)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert torch.cat([first[0], *(batch for (batch,) in batches)]).tolist() == list(range(400))
    assert not set(children()) & workers or start_method == "spawn"


def test_a_dead_worker_is_an_error_and_the_others_end(monkeypatch):
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    before, handler = set(children()), signal.getsignal(signal.SIGCHLD)
    batches = iterate(loader("fork"))
    next(batches)
    # Not torch's, which raises wherever this process is when a worker dies.
    assert signal.getsignal(signal.SIGCHLD) is handler
    victim = max(set(children()) - before)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"a data worker \(process {victim}\) was killed by SIGKILL, as the kernel"):
        list(batches)
    assert set(children()) <= before


@pytest.mark.parametrize(
    ("status", "problem"),
    [(-signal.SIGBUS, "was killed by SIGBUS, perhaps because /dev/shm is full"), (3, "ended with status 3")],
)
def test_the_error_says_how_a_worker_died(status, problem):
    reader, writer = os.pipe()
    os.close(writer)  # as at the end of a process
    dead = SimpleNamespace(is_alive=lambda: False, exitcode=status, pid=17, sentinel=reader, join=lambda: None)

    class Iterator:
        _workers = (dead,)

        def __next__(self):
            raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")

    class Loader:
        def __iter__(self):
            return Iterator()

    with pytest.raises(WorkerError, match=rf"a data worker \(process 17\) {problem}"):
        next(iterate(Loader()))
    os.close(reader)


def test_a_connection_that_breaks_before_its_worker_is_gone(monkeypatch):
    batches, before = iterate(loader("fork", workers=1)), set(children())
    next(batches)
    (worker,) = set(children()) - before

    def breaks(*_, **__):
        # The worker is killed a moment after its connection is seen to break.
        threading.Timer(0.1, os.kill, (worker, signal.SIGKILL)).start()
        raise ConnectionResetError

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", breaks)
    with pytest.raises(WorkerError, match="was killed by SIGKILL"):
        next(batches)


class Hangs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        threading.Event().wait()


def test_a_worker_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    before = set(children())

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(
                iterate(
                    DataLoader(Hangs(), num_workers=1, worker_init_fn=ignore_signals, multiprocessing_context="fork")
                )
            )
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert set(children()) <= before


def test_an_error_of_the_data_is_raised_as_it_is():
    def fails(_):
        raise RuntimeError("of the data")

    with pytest.raises(RuntimeError, match="of the data") as raised:
        list(iterate(loader("fork", workers=1, collate_fn=fails)))
    assert not isinstance(raised.value, WorkerError)
