import os
import subprocess
import sys

import pytest
import torch

from sclkern.training.config import load_config
from sclkern.training.pretraining import Pretraining
from tiny_run import overrides


@pytest.fixture
def arguments(tmp_path):
    """arguments(name="run", section__key=value ...) -> command line of a tiny run in tmp_path/name."""
    return lambda name="run", **changes: overrides(tmp_path / name, **changes)


@pytest.fixture
def pretraining(arguments):
    """Like ``arguments``, giving the run itself."""

    def build(name="run", *, resume=False, **changes):
        return Pretraining(load_config(None, arguments(name, **changes)), resume=resume)

    return build


@pytest.fixture
def command():
    """Start the script in a process of its own, as a user does; one thread, so that parallel tests do not compete."""

    def start(args, **options):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "sclkern.pretrain", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )

    return start


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
