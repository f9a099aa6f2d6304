"""``sclkern pretrain`` with faults; ``torchrun ... faulty_run.py FAULTS ARGUMENTS`` is the program of each rank.

FAULTS is JSON, a list of [kind, rank, step, attempt]: what happens to a rank when it reads the batch of a step, in one
of the attempts of ``torchrun --max-restarts``. "sigterm" and "write" tell by a file ``ready`` in the working directory
that the process waits for a signal: in a step, or with half of a checkpoint written.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from sclkern.cli import main
from sclkern.training import checkpoint
from sclkern.training.pretraining import Pretraining

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def wait_for_the_end():
    Path("ready").touch()
    while True:
        time.sleep(60)


class HalfADisk:
    """A file that takes some bytes of what is written; then ``end`` is called."""

    def __init__(self, file, end):
        self.file, self.end, self.left = file, end, 50_000

    def write(self, data):
        self.file.write(memoryview(data)[: self.left])
        self.left -= len(data)
        if self.left <= 0:
            self.file.flush()
            self.end()
        return len(data)

    def flush(self):
        self.file.flush()


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def writes_half(end):
    original = torch.save
    checkpoint.torch.save = lambda content, file: original(content, HalfADisk(file, end))


def happen(kind, run, batch):
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        while True:
            time.sleep(60)
    elif kind == "nan":
        batch["image"] = batch["image"].float()
        batch["image"].view(-1)[7] = torch.nan
    elif kind == "worker":
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    elif kind == "sigterm":
        Path("ready").touch()
        # Until the signal has come: the step is taken then.
        while not run.stop.requested:
            time.sleep(0.01)
    elif kind in ("full", "write"):
        run.keeper.writer.wait()
        writes_half(no_space if kind == "full" else wait_for_the_end)
    else:
        raise ValueError(kind)


original = Pretraining._next


def faulty(run, batches):
    batch = original(run, batches)
    for kind, rank, step, attempt in json.loads(sys.argv[1]):
        if (rank, step, attempt) == (RANK, run.state.step + 1, ATTEMPT):
            happen(kind, run, batch)
    return batch


if __name__ == "__main__":
    Pretraining._next = faulty
    sys.exit(main(["pretrain", *sys.argv[2:]]))
