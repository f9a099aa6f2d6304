"""One process by itself, and what a process takes from its environment; tests/processes has many."""

import signal
import threading

import pytest
import torch
import torch.distributed as dist

from sclkern.errors import Interrupted, RankError, UserError, WorkerError
from sclkern.objectives import ObjectiveConfig
from sclkern.training import preflight, world
from sclkern.training.config import build_config
from sclkern.training.failures import Failure, left_alone
from sclkern.training.parallel import check_parallel, reached_parameters
from sclkern.training.preflight import gpu_of, join_world, place_of_process
from sclkern.training.setup import resolve_device
from sclkern.training.world import Agreement, Place, World

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Set exactly these variables of torchrun."""

    def set_to(*values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in zip(VARIABLES, values, strict=False):
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_to


def test_the_place_is_that_of_torchrun(environment):
    environment()
    assert place_of_process() == Place(0, 1, 0)
    environment("5", "8", "1", "host", "29500")
    assert place_of_process() == Place(5, 8, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("0", "2"), "got RANK, WORLD_SIZE without LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start the processes with"),
        (("a", "2", "0", "host", "1"), "are no integers"),
        (("2", "2", "0", "host", "1"), "got RANK=2, WORLD_SIZE=2, LOCAL_RANK=0, expected 0 <= LOCAL_RANK <= RANK < WO"),
        (("1", "2", "0", "host", "tcp"), "got MASTER_PORT=tcp, expected a number from 1 to 65535"),
        (("1", "2", "0", "host", "65536"), "got MASTER_PORT=65536, expected a number from 1 to 65535"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment, values, message):
    environment(*values)
    with pytest.raises(UserError, match=message):
        place_of_process()


def test_one_process_of_torchrun_joins_nobody(environment):
    environment("0", "1", "0", "host", "29500")
    with join_world(build_config({})) as world:
        assert world.size == 1 and world.main
        assert world.gather(3) == [3] and world.broadcast({"a": 1}) == {"a": 1} and world.mean({"a": 2.0}) == {"a": 2.0}
        agreement = Agreement(world)
        agreement.ask(True, False)
        assert agreement.answer() == [True, False]


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 4)
    assert gpu_of(Place(6, 8, 2)) == 2
    with pytest.raises(UserError, match=r"process 5 of machine .*, which has 4 GPUs; start with --nproc-per-node 4"):
        gpu_of(Place(4, 8, 4))
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 1)
    assert gpu_of(Place(4, 8, 4)) == 0


def test_one_gpu_cannot_be_named_for_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = World()
    world.size = 2
    with pytest.raises(UserError, match="got 'cuda:1' for 2 processes, each of which takes a GPU of its own; use cuda"):
        resolve_device("cuda:1", world)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("no data"), 2, "rank 1: no data"),
        (WorkerError("worker died"), 3, "rank 1: worker died"),
        (ZeroDivisionError("by\nzero"), 1, "rank 1: ZeroDivisionError: by zero"),
        (Interrupted(signal.SIGTERM), 143, "rank 1: interrupted by SIGTERM"),
    ],
)
def test_the_others_end_with_the_status_of_the_failure(error, status, text):
    failure = Failure.of(error, 1)
    assert (failure.status, str(failure)) == (status, text)


def test_what_a_broken_collective_says_is_known():
    assert left_alone(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"))
    assert not left_alone(UserError("gloo is bad")) and not left_alone(RuntimeError("shapes differ"))


def test_who_holds_the_store_waits_until_the_others_have_read_the_difference():
    store, waits, told = dist.HashStore(), threading.Event(), []

    class Store:
        """As rank 0 and rank 1 see it: the latter reads when the former waits for it."""

        def __init__(self, rank):
            self.rank = rank

        def __getattr__(self, name):
            return getattr(store, name)

        def wait(self, keys, *limit):
            if self.rank == 0 and keys[0].startswith(preflight._READ):
                waits.set()
            store.wait(keys, *limit)

        def multi_get(self, keys):
            if self.rank == 1:
                assert waits.wait(20) and not told
            return store.multi_get(keys)

    def meet(rank):
        try:
            preflight._meet(Store(rank), Place(rank, 2, 0), {"machine": "a", "gpu": "-", "run.seed": rank}, 20)
        except UserError as error:
            told.append(str(error))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 2 and all("rank 1 on a: run.seed is 1, on rank 0 (a) it is 0" in text for text in told)


def test_the_signal_that_follows_a_death_does_not_hide_it(monkeypatch):
    def interrupted(*_, **__):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("sclkern.training.world.first_failure", interrupted)
    world = World(Place(1, 1, 1), dist.HashStore())
    with pytest.raises(RankError) as raised:
        world.__exit__(RuntimeError, RuntimeError("Connection closed by peer"), None)
    assert raised.value.status == 3


def processes(size, **run):
    world = World()
    world.size = size
    optimizer = {"name": run.pop("optimizer", "adamw")}
    check_parallel(build_config({"run": run, "optimizer": optimizer}), world)


def test_what_fsdp_cannot_do_is_refused():
    with pytest.raises(UserError, match=r"run\.cuda_graphs: got true with run\.parallel=fsdp"):
        processes(2, parallel="fsdp", cuda_graphs=True)
    with pytest.raises(UserError, match=r"optimizer\.name: got 'apex' with run\.parallel=fsdp"):
        processes(2, parallel="fsdp", optimizer="apex")
    processes(1, parallel="fsdp", cuda_graphs=True)


@pytest.mark.parametrize(
    ("wanted", "remedy"),
    [
        (64, None),
        (128, "set run.accumulation=4"),
        (100, "set it to a multiple of 32, and run.accumulation to their ratio"),
    ],
)
def test_a_contrastive_batch_is_that_of_a_step(wanted, remedy):
    options = {"batch_size": 16, "accumulation": 2, "contrastive_batch": wanted}
    if remedy is None:
        processes(2, **options)
        return
    with pytest.raises(
        UserError, match=rf"got {wanted}, expected 64, the batch of a step \(2 processes x .*; {remedy}"
    ):
        processes(2, **options)


def test_a_contrastive_batch_is_not_recorded():
    with pytest.raises(UserError, match=r"run\.cuda_graphs: got true with run\.contrastive_batch"):
        processes(1, batch_size=4, contrastive_batch=4, cuda_graphs=True)


@pytest.mark.parametrize("recipe", ["scl", "glscl", ("itc",)])
def test_parameters_that_no_loss_reaches(make_model, make_batch, recipe):
    model = make_model(ObjectiveConfig(recipe=recipe), heads=("itm", "mlm", "itc", "vqa"))
    model(make_batch(), seed=0).total.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached_parameters(model.config, model.objectives) == with_gradient


def test_the_end_waits_for_threads_that_hold_tensors(monkeypatch):
    """The interpreter aborts if one of them lets go while it ends."""
    released = []

    class Work:
        def __init__(self, tensor):
            self.ended = threading.Event()
            self.thread = threading.Thread(target=self.hold, args=[tensor])
            self.thread.start()

        def hold(self, tensor):
            self.ended.wait()
            threading.Event().wait(0.05)
            released.append(float(tensor))

        def wait(self):
            self.ended.set()

    monkeypatch.setattr(world.dist, "all_reduce", lambda tensor, group, async_op: Work(tensor))
    world._part(None, works=3)
    assert len(released) == 3
