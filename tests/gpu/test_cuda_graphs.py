"""Captured once, replayed with other inputs, other seeds and other weights."""

import pytest
import torch

from gpu_model import make
from op_testing import SHAPES, cast, inputs_at, small_inputs
from sclkern import ops
from sclkern.tools.specs import SPECS
from step_testing import losses_of, masks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def capture(call):
    """The graph of a call, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels compile and libraries allocate
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def assert_a_replay_follows(name, arguments, renewed, **options):
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]

    def call():
        out = getattr(ops, name)(**arguments, backend="triton", **options)
        outputs = list(out) if isinstance(out, tuple) else [out]
        if not leaves:
            return outputs
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
        return [*(t.detach() for t in outputs), *gradients]

    graph, outputs = capture(call)
    graph.replay()
    before = [t.clone() for t in outputs]
    with torch.no_grad():
        for key, value in renewed.items():
            if key == "seed":
                arguments[key].add_(1)
            elif isinstance(value, torch.Tensor) and (value.is_floating_point() or key in ("ids", "lengths")):
                arguments[key].copy_(value)
    graph.replay()
    after = [t.clone() for t in outputs]
    for a, b in zip(after, call(), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_a_replay_of_an_op_follows_its_inputs(name):
    dropout = {"dropout_p": 0.3, "seed": torch.tensor([7], device="cuda")} if SPECS[name].dropout else {}
    options = {"absorb": "keys"} if name == "cross_attention" else {}
    arguments, renewed = (cast(name, small_inputs(name, 40) | dropout, torch.bfloat16) for _ in range(2))
    assert_a_replay_follows(name, arguments, renewed, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_a_replay_at_whole_shapes_follows_its_inputs(name):
    op, shape = SHAPES[name]
    torch.manual_seed(0)
    arguments, renewed = (cast(op, inputs_at(op, shape), torch.bfloat16, shape.float32) for _ in range(2))
    if op == "packed_attention":
        # Other lengths would be other shapes of the packed tensors.
        renewed = {key: torch.randn_like(arguments[key]) for key in ("query", "key", "value")} | {"seed": None}
    assert_a_replay_follows(op, arguments, renewed, **shape.kernel_options)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_a_replay_of_the_step_follows_batch_and_seed(recipe, autocast):
    """Without dropout, whose masks torch's generator seeds; lengths within ``text_tokens``, as a bucket has them."""
    model, batch = make(recipe)
    model.eval()
    other = make(recipe, seed=1)[1]
    batch["text_tokens"] = batch["text_ids"].numel()
    seed = torch.tensor([5], device="cuda")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def call():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            losses = losses_of(model, batch, masks_of(model, batch, seed))
        gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
        return [loss.detach() for loss in losses.named().values()] + [g for g in gradients if g is not None]

    graph, outputs = capture(call)
    for key in ("image", "text_ids", "text_mask"):
        batch[key].copy_(other[key])
    seed.add_(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.01)
    graph.replay()
    replayed = [t.clone() for t in outputs]
    for a, b in zip(replayed, call(), strict=True):
        assert torch.equal(a, b)


def test_a_replay_of_the_step_draws_new_dropout():
    model, batch = make()
    batch["text_tokens"] = batch["text_ids"].numel()
    seed = torch.tensor([5], device="cuda")
    graph, (total,) = capture(lambda: [losses_of(model, batch, masks_of(model, batch, seed)).total.detach()])
    totals = []
    for _ in range(3):
        graph.replay()
        totals.append(total.item())
    assert len(set(totals)) == 3
