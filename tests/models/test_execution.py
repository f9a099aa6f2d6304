"""One execution object for a network and all of its modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sclkern import SCLModel
from sclkern.models import SCLConfig, SCLNetwork
from sclkern.models.attention import Attention
from sclkern.models.execution import Execution
from sclkern.models.layers import FeedForward, PostNormBlock, PreNormBlock, ResidualNorm
from sclkern.models.layouts import Padded
from sclkern.step import StepConfig

HOLDERS = (Attention, FeedForward, ResidualNorm)


def holders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "execution")]


def assert_one_object(model: SCLNetwork) -> None:
    assert all(module.execution is model.execution for module in holders(model))
    assert all(isinstance(module.execution, Execution) for module in model.modules() if isinstance(module, HOLDERS))


def test_every_module_holds_the_object_of_its_network():
    network = SCLNetwork(SCLConfig.preset("tiny"))
    assert_one_object(network)
    assert {type(module) for module in holders(network)} >= set(HOLDERS)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_one_object_of_its_own(duplicate):
    model = SCLModel(SCLConfig.preset("tiny"), step=StepConfig(absorb="never")).set_backend("sdpa")
    twin = duplicate(model)
    assert_one_object(twin)
    assert twin.execution == model.execution == Execution("sdpa", "never", False)
    twin.set_backend("eager").step = StepConfig(checkpoint_blocks=True)
    assert twin.execution == Execution("eager", "auto", True)
    assert model.execution == Execution("sdpa", "never", False)


def test_a_copied_encoder_keeps_the_settings():
    model = SCLModel(SCLConfig.preset("tiny")).set_backend("eager")
    text = copy.deepcopy(model.text)
    model.set_backend("auto")
    assert {module.execution.backend for module in holders(text)} == {"eager"}


def test_it_is_no_part_of_the_state():
    model = SCLModel(SCLConfig.preset("tiny")).set_backend("eager")
    assert not [name for name in model.state_dict() if "execution" in name]
    model.load_state_dict(SCLModel(model.config).state_dict())
    assert_one_object(model)
    assert model.execution.backend == "eager"


@pytest.mark.parametrize(
    "build",
    [
        lambda: Attention(64),
        lambda: FeedForward(64, 4),
        lambda: ResidualNorm(64),
        lambda: PreNormBlock(64, 4, "gelu"),
        lambda: PostNormBlock(64, 4, 0.1, 1e-5, cross=True),
    ],
)
def test_a_module_made_alone_has_its_own(build):
    module, other = build(), build()
    first, *others = (holder.execution for holder in holders(module))
    assert first == Execution() and all(execution is first for execution in others)
    assert all(holder.execution is not first for holder in holders(other))


class Wrapper(nn.Module):
    """As a sharding or checkpointing wrapper puts itself before a block."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return self.module(*args, **options)


def test_settings_reach_wrapped_blocks(make_model, make_batch):
    model, batch = make_model(), make_batch()
    expected = model(batch, seed=0).total
    for blocks in (model.text.blocks, model.vision.blocks, model.fusion.text_layers, model.fusion.image_layers):
        for i, block in enumerate(blocks):
            blocks[i] = Wrapper(block)
    model.set_backend("eager").step = StepConfig(checkpoint_blocks=True)
    inner = model.fusion.text_layers[0].module.attention.execution
    assert (inner.backend, inner.checkpoint_blocks) == ("eager", True)
    torch.testing.assert_close(model(batch, seed=0).total, expected, rtol=1e-9, atol=0)


def test_a_compiled_module_follows_a_change():
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    module = Attention(64).double()
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    compiled = torch.compile(module, backend=keep, fullgraph=True)
    outputs = []
    for backend in ("eager", "sdpa", "eager"):
        module.execution.backend = backend
        outputs.append(compiled(x, Padded()))
    used_sdpa = [any("scaled_dot_product_attention" in name for name in names) for names in graphs]
    assert used_sdpa == [False, True]
    assert torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(("backend", "op_backend"), [("auto", "auto"), ("triton", "triton"), ("sdpa", "eager")])
def test_sdpa_is_a_backend_of_attention_alone(backend, op_backend):
    network = SCLNetwork(SCLConfig.preset("tiny")).set_backend(backend)
    assert network.execution.op_backend == network.backend == op_backend
