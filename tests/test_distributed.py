"""Contrast over ranks; ``python test_distributed.py RANK WORLD DIRECTORY`` is the program of each rank."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from ranks import be_rank, run_ranks

from sclkern import objectives as L
from sclkern.distributed import gather
from sclkern.ops import completion_loss, sigmoid_loss
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.reference import completion_loss as definition
from sclkern.reference import sigmoid_loss as sigmoid_definition

ROWS, FRAMES, TOKENS, WIDTH = 4, 2, 3, 5
# Columns of a rank that belong to no row.
FURTHER = 3
CASES = [*product(["itc", "mvsc", "frames", "mlsc", "mltc"], ["exact", "published"], ["all", "published"])]
KINDS = ["plain", "valid", "groups", "same", "negatives", "negatives and all"]
OP_CASES = [*product(["exact", "published"], ["both", "recovered_to_complete"], KINDS)]
NAMES = ("recovered", "complete", "temperature")


def samples(world):
    """Inputs of all ranks, a map that is shared by them, and its learnable temperature."""
    generator = torch.Generator().manual_seed(world)
    shape = (2, world * ROWS, FRAMES * TOKENS, WIDTH)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    valid = torch.rand(world * ROWS, FRAMES * TOKENS, generator=generator) < 0.6
    # A rank without any token: its part of the mean is empty, not wrong.
    valid[:ROWS] = False
    weight = torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, valid, weight, same_images(world)


def same_images(world):
    """Ids (N,) of the images of all ranks, of which some are the same within a rank, and some on several."""
    return (torch.arange(world * ROWS) % (ROWS + 1)) // 2


def evaluate(name, gather, negatives, inputs, valid, weight, same):
    """The loss, and its gradients by the shared map, the temperature and the mapped features."""
    weight = weight.clone().requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    features = [x @ w for x, w in zip(inputs, weight, strict=True)]
    recovered, complete = features
    options = {"temperature": temperature, "gather": gather}
    if name == "itc":
        loss = L.image_text_contrast(recovered[:, 0], complete[:, 0], temperature, same=same, gather=gather)
    elif name in ("mvsc", "frames"):
        options |= {"same": same, "frame_norm": "features" if name == "mvsc" else "published"}
        loss = L.masked_vision_semantic_completion(recovered[:, :FRAMES], complete[:, :FRAMES], **options)
    elif name == "mlsc":
        options |= {"same": same, "negatives": negatives}
        loss = L.masked_language_semantic_completion(recovered[:, 0], complete[:, 0], **options)
    else:
        loss = L.masked_local_token_completion(recovered, complete, valid, negatives=negatives, **options)
    gradients = torch.autograd.grad(loss, [weight, temperature, recovered])
    return {"loss": loss.detach(), **dict(zip(("weight", "temperature", "features"), gradients, strict=True))}


def op_samples(world, kind):
    """Features (N, D) or (G, N, D) of all ranks, which are valid (not as many on each rank), weights of the losses.
    With further negatives, those of all ranks come after all columns that belong to a row."""
    generator = torch.Generator().manual_seed(10 + world)
    groups, further = (2,) * (kind in ("groups", "same", "negatives and all")), FURTHER * kind.startswith("negatives")
    # Above logits of 20 torch's softplus is its argument, and so no more exact than 2e-9.
    scale = 0.3 if kind == "negatives and all" else 1.0
    features = [
        scale * torch.randn(*groups, world * rows, WIDTH, generator=generator, dtype=torch.float64)
        for rows in (ROWS, ROWS + further)
    ]
    valid = torch.rand(*groups, world * ROWS, generator=generator) < 0.6
    valid[..., 1:ROWS] = False
    return (
        features,
        None if kind in ("plain", "negatives") else valid,
        torch.rand(valid.shape, generator=generator).double(),
    )


def op_ids(world, kind):
    if kind == "negatives and all":
        return torch.cat([same_images(world), torch.arange(world * FURTHER) % 4])
    return same_images(world) if kind == "same" else None


def op_options(kind, directions):
    return {"directions": directions} | ({"normalize": False} if kind == "negatives and all" else {})


def of_rank(rank, world, tensor, dim):
    """Of rows or columns of all ranks those of one; the further columns of ranks come last."""
    further = (tensor.shape[dim] - world * ROWS) // world
    own = [tensor.narrow(dim, rank * ROWS, ROWS), tensor.narrow(dim, world * ROWS + rank * further, further)]
    return torch.cat(own, dim)


def evaluate_op(function, dtype, features, valid, weights=None, **options):
    """The loss and its gradients; with ``weights``, of their sum with the losses of the rows."""
    leaves = [x.to(dtype).requires_grad_() for x in features]
    leaves.append(torch.tensor(0.2, dtype=dtype, requires_grad=True))
    loss = function(*leaves[:2], temperature=leaves[2], valid=valid, **options)
    total = loss if weights is None else (loss * weights.to(dtype)).sum()
    return {"loss": loss.detach(), **dict(zip(NAMES, torch.autograd.grad(total, leaves), strict=True))}


def evaluate_sigmoid(function, dtype, features, **options):
    leaves = [x.to(dtype).requires_grad_() for x in (*features, torch.tensor(3.0), torch.tensor(-2.0))]
    loss = function(*leaves[:2], scale=leaves[2], bias=leaves[3], **options)
    names = "image", "text", "scale", "bias"
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))}


def evaluate_ops(rank, world):
    dtype, results = torch.float32 if interpreted() else torch.float64, {}
    for mode, directions, kind in OP_CASES:
        features, valid, weights = op_samples(world, kind)
        features = [of_rank(rank, world, x, -2) for x in features]
        valid, same = (None if x is None else of_rank(rank, world, x, -1) for x in (valid, op_ids(world, kind)))
        options = {"gather": mode, "same": same, **op_options(kind, directions)}
        results[mode, directions, kind] = evaluate_op(completion_loss, dtype, features, valid, **options)
        results[mode, directions, kind, "none"] = evaluate_op(
            completion_loss, dtype, features, valid, weights, reduction="none", **options
        )
        if kind == "negatives":
            results[mode, directions, kind, "eager"] = evaluate_op(
                completion_loss, dtype, features, valid, backend="eager", **options
            )
    own = [of_rank(rank, world, x, -2) for x in op_samples(world, "plain")[0]]
    for mode, backend in product(["exact", "published"], ["auto", "eager"]):
        results["sigmoid", mode, backend] = evaluate_sigmoid(sigmoid_loss, dtype, own, gather=mode, backend=backend)
    features, valid, _ = op_samples(world, "groups")
    recovered, complete = (of_rank(rank, world, x, -2).to(dtype).requires_grad_() for x in features)
    valid = of_rank(rank, world, valid, -1)
    loss = completion_loss(recovered, complete.detach(), temperature=0.2, valid=valid)
    results["detached"] = torch.autograd.grad(loss, recovered, retain_graph=True)[0]
    results["again"] = torch.autograd.grad(loss, recovered, retain_graph=True)[0]
    try:
        torch.autograd.grad(loss, recovered, create_graph=True)
    except RuntimeError as error:
        results["second"] = str(error)
    return results


def mistakes(rank):
    """What each rank is told when ranks do not fit together."""
    x, half = (
        torch.ones(4 if rank == 0 else 3, WIDTH),
        torch.ones(4, WIDTH).to(torch.float32 if rank else torch.float16),
    )
    valid, same = (torch.ones(4, dtype=torch.bool), torch.ones(4).long()) if rank == 0 else (None, None)
    more = torch.ones(6 if rank else 5, WIDTH)
    calls = {
        "columns": lambda: completion_loss(torch.ones(4, WIDTH), more, temperature=0.1),
        "further": lambda: completion_loss(torch.ones(5, WIDTH), more, temperature=0.1),
        "products": lambda: completion_loss(more[:4], more[:4], temperature=0.1, normalize=rank == 0),
        "rows": lambda: completion_loss(x, x, temperature=0.1),
        "eager rows": lambda: completion_loss(x, x, temperature=0.1, backend="eager"),
        "dtypes": lambda: completion_loss(half, half, temperature=0.1),
        "valid": lambda: completion_loss(torch.ones(4, WIDTH), torch.ones(4, WIDTH), temperature=0.1, valid=valid),
        "same": lambda: completion_loss(torch.ones(4, WIDTH), torch.ones(4, WIDTH), temperature=0.1, same=same),
        "sigmoid": lambda: sigmoid_loss(x, x, scale=1.0, bias=0.0),
        "gather": lambda: gather(x),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            told[name] = str(error)
    return told


def work(rank, world, _):
    ops = evaluate_ops(rank, world)
    if interpreted():
        return {"ops": ops}
    inputs, valid, weight, same = samples(world)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    results = {case: evaluate(*case, inputs[:, own], valid[own], weight, same[own]) for case in CASES}
    results |= {"ops": ops, "mistakes": mistakes(rank)}
    results["integers"] = gather(torch.tensor([rank, 10 + rank]))
    results["bools"] = gather(torch.tensor([rank == 0]))
    # A transposed input: rows that do not lie one after the other.
    results["strided"] = gather((torch.arange(6.0).view(3, 2) + 100 * rank).T)
    groups = [dist.new_group([member]) for member in range(world)]
    results["alone"] = gather(torch.tensor([float(rank)]), groups[rank])
    return results


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    return run_ranks(__file__, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def interpreted_ranks(tmp_path_factory):
    if not TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    return run_ranks(__file__, 2, tmp_path_factory.mktemp("ranks"), TRITON_INTERPRET="1")


def mean(ranks, case, name):
    return sum(results[case][name] for results in ranks) / len(ranks)


def big_batch(world, name):
    return evaluate(name, "exact", "all", *samples(world))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


LOSSES = ["itc", "mvsc", "frames", "mlsc", "mltc"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_has_the_loss_of_the_big_batch(ranks, name):
    for results, mode in product(ranks, ["exact", "published"]):
        close(results[name, mode, "all"]["loss"], big_batch(len(ranks), name)["loss"])


@pytest.mark.parametrize("name", LOSSES)
def test_exact_gradients_average_to_those_of_the_big_batch(ranks, name):
    expected = big_batch(len(ranks), name)
    for parameter in ("weight", "temperature"):
        close(mean(ranks, (name, "exact", "all"), parameter), expected[parameter])


@pytest.mark.parametrize("name", LOSSES)
def test_an_exact_feature_gradient_is_world_times_its_slice(ranks, name):
    expected = big_batch(len(ranks), name)["features"].split(ROWS)
    for results, own in zip(ranks, expected, strict=True):
        close(results[name, "exact", "all"]["features"], len(ranks) * own)


@pytest.mark.parametrize("name", LOSSES)
def test_published_feature_gradients_are_the_slices_themselves(ranks, name):
    expected = big_batch(len(ranks), name)
    for results, own in zip(ranks, expected["features"].split(ROWS), strict=True):
        close(results[name, "published", "all"]["features"], own)
    # What DDP then averages is 1/world of the big batch's gradient.
    close(mean(ranks, (name, "published", "all"), "weight"), expected["weight"] / len(ranks))


@pytest.mark.parametrize("mode", ["exact", "published"])
@pytest.mark.parametrize("name", ["mlsc", "mltc"])
def test_published_negatives_are_those_of_the_rank(ranks, name, mode):
    inputs, valid, weight, same = samples(len(ranks))
    for rank, results in enumerate(ranks):
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        alone = evaluate(name, "exact", "all", inputs[:, own], valid[own], weight, same[own])
        for key, value in alone.items():
            close(results[name, mode, "published"][key], value)


def test_rows_are_stacked_rank_by_rank(ranks):
    world = len(ranks)
    for rank, results in enumerate(ranks):
        assert results["integers"].tolist() == [x for r in range(world) for x in (r, 10 + r)]
        assert results["bools"].tolist() == [r == 0 for r in range(world)]
        assert results["strided"].tolist() == [
            [100 * r + x for x in row] for r in range(world) for row in ([0, 2, 4], [1, 3, 5])
        ]
        assert results["alone"].tolist() == [rank]


def check_op(results, case, none, tolerance, *path):
    world, (mode, directions, kind) = len(results), case
    features, valid, weights = op_samples(world, kind)
    options = {"same": op_ids(world, kind), **op_options(kind, directions)}
    options |= {"reduction": "none", "weights": weights} if none else {}
    big = evaluate_op(definition, torch.float64, features, valid, **options)
    ours = [rank["ops"][(*case, "none") if none else (*case, *path)] for rank in results]
    assert all(torch.equal(rank["loss"], ours[0]["loss"]) for rank in ours)
    factor = world if mode == "exact" else 1
    for rank, own in enumerate(ours):
        torch.testing.assert_close(own["loss"].double(), big["loss"], **tolerance)
        torch.testing.assert_close(own["temperature"].double(), big["temperature"], **tolerance)
        for name in ("recovered", "complete"):
            theirs = factor * of_rank(rank, world, big[name], -2)
            torch.testing.assert_close(own[name].double(), theirs, **tolerance)


@pytest.mark.parametrize("none", [False, True], ids=["mean", "none"])
@pytest.mark.parametrize("case", OP_CASES, ids="-".join)
def test_the_op_across_ranks_is_that_of_one_big_batch(ranks, case, none):
    check_op(ranks, case, none, {"rtol": 1e-10, "atol": 1e-12})


@pytest.mark.parametrize("none", [False, True], ids=["mean", "none"])
@pytest.mark.parametrize("case", OP_CASES, ids="-".join)
def test_the_kernels_across_ranks_are_those_of_one_big_batch(interpreted_ranks, case, none):
    check_op(interpreted_ranks, case, none, {"rtol": 2e-5, "atol": 2e-6})


@pytest.mark.parametrize("case", [case for case in OP_CASES if case[-1] == "negatives"], ids="-".join)
def test_the_definition_across_ranks_is_that_of_one_big_batch(ranks, case):
    check_op(ranks, case, False, {"rtol": 1e-10, "atol": 1e-12}, "eager")


def check_sigmoid(results, mode, backend, tolerance):
    world = len(results)
    big = evaluate_sigmoid(sigmoid_definition, torch.float64, op_samples(world, "plain")[0])
    ours = [rank["ops"]["sigmoid", mode, backend] for rank in results]
    assert all(torch.equal(rank["loss"], ours[0]["loss"]) for rank in ours)
    for rank, own in enumerate(ours):
        for name in ("loss", "scale", "bias"):
            torch.testing.assert_close(own[name].double(), big[name], **tolerance)
        for name in ("image", "text"):
            theirs = (world if mode == "exact" else 1) * of_rank(rank, world, big[name], -2)
            torch.testing.assert_close(own[name].double(), theirs, **tolerance)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("mode", ["exact", "published"])
def test_the_sigmoid_loss_across_ranks_is_that_of_one_big_batch(ranks, mode, backend):
    check_sigmoid(ranks, mode, backend, {"rtol": 1e-10, "atol": 1e-12})


def test_the_kernels_of_the_sigmoid_loss_across_ranks(interpreted_ranks):
    check_sigmoid(interpreted_ranks, "exact", "auto", {"rtol": 2e-5, "atol": 2e-6})


def test_a_detached_side_leaves_the_other_as_it_is_across_ranks(ranks):
    for results in ranks:
        ops = results["ops"]
        full = ops["exact", "both", "groups"]["recovered"]
        assert torch.equal(ops["detached"], full) and torch.equal(ops["again"], full)
        assert 'backend="eager"' in ops["second"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("rows", ["recovered: got rank 0 (4, 5) float32 both, rank 1 (3, 5) float32 both"]),
        ("eager rows", ["recovered: got rank 0 (4, 5) float32 both, rank 1 (3, 5) float32 both"]),
        ("columns", ["complete: got rank 0 (5, 5) float32, rank 1 (6, 5) float32"]),
        ("further", ["recovered: got rank 0 (5, 5) float32 both, rank 1 (5, 5) float32 both further columns"]),
        ("products", ["rank 0 (4, 5) float32 both, rank 1 (4, 5) float32 both plain products"]),
        ("dtypes", ["rank 0 (4, 5) float16", "rank 1 (4, 5) float32"]),
        ("valid", ["rank 0 (4, 5) float32 both valid", "rank 1 (4, 5) float32 both"]),
        ("same", ["rank 0 (4, 5) float32 both same", "rank 1 (4, 5) float32 both"]),
        ("sigmoid", ["image: got rank 0 (4, 5) float32, rank 1 (3, 5) float32"]),
        ("gather", ["features: got rank 0 (4, 5) float32, rank 1 (3, 5) float32", "expected the same on every rank"]),
    ],
)
def test_ranks_that_differ_raise_on_every_rank(ranks, name, parts):
    for results in ranks:
        assert all(part in results["mistakes"][name] for part in parts), results["mistakes"][name]


def test_one_process_gathers_nothing():
    features = torch.randn(3, 2, requires_grad=True)
    assert gather(features) is features


if __name__ == "__main__":
    be_rank(work)
