"""A process that makes no progress is named and ends the run; one that does is left alone."""

import sys
import threading
import time

import torch.distributed as dist

from sclkern.training.watchdog import HANGS, Report, Watchdog, blame, describe


def reports(*values):
    return {rank: Report(9, step, seconds, where, waits) for rank, (step, seconds, where, waits) in enumerate(values)}


def test_whoever_does_not_wait_for_others_is_blamed():
    there = reports((7, 61.0, "all_reduce, called by a", True), (7, 60.0, "next (data.py:3)", False))
    assert blame(there, set(), 2) == (
        "rank 1 hangs for 60 s in step 7, in next (data.py:3); rank 0 waits in all_reduce, called by a; go on with "
        "--resume, and raise run.watchdog_seconds if this was only slow"
    )


def test_whoever_is_behind_is_blamed():
    there = reports((8, 61.0, "a", False), (7, 60.0, "b", True), (8, 60.0, "a", False))
    assert blame(there, set(), 3).startswith("rank 1 hangs for 60 s in step 7, in b; ranks 0, 2 wait in a; go on")


def test_a_process_that_no_longer_reports_is_blamed():
    there = reports((8, 61.0, "all_reduce", True), (8, 3.0, "a", False))
    assert blame(there, {1}, 2).startswith("rank 1 has stopped in step 8, in a; rank 0 waits in all_reduce; ")
    assert blame({0: there[0]}, {1}, 2).startswith("rank 1 hangs and has said nothing; rank 0 waits")


def test_one_process_is_the_run():
    assert blame(reports((8, 61.0, "next (loader.py:3)", False)), set(), 1).startswith("the run hangs for 61 s in step")


def test_the_line_of_this_package_is_told():
    class Frame:
        def __init__(self, file, name, line, back):
            self.f_code = type("Code", (), {"co_filename": file, "co_name": name})
            self.f_lineno, self.f_back = line, back

    loop = Frame("/x/sclkern/training/loop.py", "train_step", 5, None)
    torch = "/x/torch/distributed/"
    inner = Frame(f"{torch}distributed_c10d.py", "all_reduce", 1, Frame(f"{torch}c10d_logger.py", "wrapper", 2, loop))
    assert describe(inner) == ("all_reduce, called by train_step (sclkern/training/loop.py:5)", True)
    assert describe(loop) == ("train_step (sclkern/training/loop.py:5)", False)
    backward = Frame("/x/torch/autograd/graph.py", "_engine_run_backward", 1, loop)
    assert describe(backward) == ("the backward, called by train_step (sclkern/training/loop.py:5)", True)
    world = Frame("/x/sclkern/training/world.py", "answer", 9, loop)
    assert describe(world) == ("answer, called by train_step (sclkern/training/loop.py:5)", True)
    assert describe(None) == ("code outside of sclkern", False)
    assert describe(sys._getframe()) == ("code outside of sclkern", False)


def test_a_hang_ends_the_process_and_progress_does_not(capfd):
    ended = threading.Event()
    statuses = []

    def end(status):
        statuses.append(status)
        ended.set()

    with Watchdog(0.4, lambda: 6, end=end) as watchdog:
        for _ in range(20):
            time.sleep(0.04)
            watchdog.beat()
        assert not ended.is_set()
        assert ended.wait(20)
    assert statuses == [HANGS]
    assert "error: the run hangs for" in capfd.readouterr().err


def test_what_the_others_report_is_heard(capfd):
    """Of two watchdogs over one store the one whose process waits names the other, and one line is written."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    ended = [threading.Event(), threading.Event()]
    steps = [8, 7]

    def hang(rank):
        watchdog = Watchdog(0.8, lambda: steps[rank], store=store, rank=rank, size=2, end=lambda _: ended[rank].set())
        with watchdog:
            assert ended[rank].wait(30)

    threads = [threading.Thread(target=hang, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and "error: rank 1 hangs for" in error and "in step 8" in error


def test_it_watches_nothing_at_0_seconds():
    before = threading.active_count()
    with Watchdog(0, lambda: 1):
        assert threading.active_count() == before
