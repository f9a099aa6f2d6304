"""Two processes: the losses of open_clip beside ours for every choice of flags, and the cached step under DDP.

``python test_open_clip.py RANK WORLD FOLDER`` is the program of each rank.
"""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import be_rank, run_ranks
from torch import nn

from sclkern.integrations import open_clip
from sclkern.integrations.open_clip import ClipLoss, SigLipLoss, cached_step

WORLD, ROWS, INPUT, WIDTH = 2, 6, 5, 16
FLAGS = list(itertools.product((False, True), repeat=2))
EXCHANGES = (None, "shift", "reduce", "gather")
NAMES = [f"clip-{local:d}{gathered:d}" for local, gathered in FLAGS] + [f"siglip-{name}" for name in EXCHANGES]


class Towers(nn.Module):
    """Two linear encoders, of what open_clip's models return."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(INPUT, WIDTH), nn.Linear(INPUT, WIDTH)
        self.dropout = nn.Dropout(0.3)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, images, texts):
        features = {"image_features": self.image(images), "text_features": self.text(self.dropout(texts))}
        features = {name: nn.functional.normalize(value, dim=-1) for name, value in features.items()}
        return {**features, "logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias}


def pairs(rank):
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(ROWS, INPUT, generator=generator)
    return images, images + 0.5 * torch.randn(ROWS, INPUT, generator=generator)


def losses_of(place):
    """Ours and the package's, by name, each as functions without arguments."""
    from open_clip import loss as theirs

    for name, (local, gathered) in zip(NAMES, FLAGS, strict=False):
        arguments = {"local_loss": local, "gather_with_grad": gathered, **place}
        yield name, partial(ClipLoss, **arguments), partial(theirs.ClipLoss, **arguments)
    for name, exchange in zip(NAMES[len(FLAGS) :], EXCHANGES, strict=True):
        arguments = {"dist_impl": exchange, **place}
        yield name, partial(SigLipLoss, **arguments), partial(theirs.SigLipLoss, **arguments)


def trained(loss, rank):
    """The loss, and the gradients that DDP averages."""
    model = nn.parallel.DistributedDataParallel(Towers().eval())
    value = loss(**model(*pairs(rank)), output_dict=True)["contrastive_loss"]
    value.backward()
    return value.item(), [parameter.grad for parameter in model.parameters()]


def cached(loss, rank, whole):
    """The gradients of three micro-batches: taken twice each, or as one batch with the dropout of each."""
    towers = Towers()
    model = nn.parallel.DistributedDataParallel(towers)
    parts = list(zip(*(part.split((1, 3, 2)) for part in pairs(rank)), strict=True))
    torch.manual_seed(rank)
    if not whole:
        cached_step(model, parts, loss)
        return [parameter.grad for parameter in towers.parameters()]
    outputs = [towers(*part) for part in parts]
    features = {name: torch.cat([part[name] for part in outputs]) for name in ("image_features", "text_features")}
    loss(**features, logit_scale=outputs[0]["logit_scale"], logit_bias=outputs[0]["logit_bias"]).backward()
    for parameter in towers.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= WORLD
    return [parameter.grad for parameter in towers.parameters()]


def work(rank, world, folder):
    place = {"rank": rank, "world_size": world}
    results = {}
    # Tiles of four images and of the two that are left.
    open_clip.MAX_SCORES = 4 * WORLD * ROWS
    for name, ours, theirs in losses_of(place):
        results[name] = trained(ours(), rank), trained(theirs(), rank)
    exact = ClipLoss(local_loss=True, gather_with_grad=True, **place)
    results["cached"] = cached(exact, rank, False), cached(exact, rank, True)
    swapped = ClipLoss(rank=1 - rank, world_size=world)
    try:
        swapped(*pairs(rank), 1.0)
    except ValueError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(__file__, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(results, name):
    for of_rank in results:
        ours, theirs = of_rank[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_each_choice_of_flags_has_its_own_gradients(results):
    """Three gradients, and the values of local losses, are different."""
    gradients = [results[0][name][0][1][2] for name in NAMES[:4]]
    different = [(i, j) for i, j in itertools.combinations(range(4), 2) if not gradients[i].allclose(gradients[j])]
    assert different == [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)]
    assert results[0][NAMES[3]][0][0] != results[1][NAMES[3]][0][0]


def test_a_cached_step(results):
    for of_rank in results:
        torch.testing.assert_close(*of_rank["cached"], rtol=1e-6, atol=1e-6)


def test_a_wrong_rank_is_named(results):
    for rank in range(WORLD):
        expected = f"rank, world_size: got {1 - rank}, 2, expected those of torch.distributed: {rank}, 2"
        assert results[rank]["error"] == expected


if __name__ == "__main__":
    be_rank(work)
