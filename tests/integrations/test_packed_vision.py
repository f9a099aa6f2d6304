"""Vision models that pack the images of a batch into one sequence: ``ops.packed_attention`` computes all at once."""

import copy
import pickle

import pytest
import torch

import sclkern
from op_testing import DEVICE, needs_kernels, run_in_interpreter
from sclkern import ops
from sclkern.integrations.huggingface import packed

pytest.importorskip("transformers")
SIZES = {"depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 1}
# Window attention in the first layer of Qwen2.5-VL, in windows of 2 by 2 merged patches.
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}
# An image, a video of two frames, and an image of the same size as the first.
GRID = torch.tensor([[1, 4, 6], [2, 6, 4], [1, 4, 6]])
BY = "ops.packed_attention, by Hugging Face's interface"


def qwen2(**options):
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig as Config
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Model

    return Model._from_config(Config(**SIZES, embed_dim=64, hidden_size=48, mlp_ratio=2), **options)


def qwen2_5(**options):
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig as Config
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Model

    config = Config(**SIZES, **WINDOWS, hidden_size=64, intermediate_size=96, out_hidden_size=48)
    return Model._from_config(config, **options)


def qwen3(**options):
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig as Config
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel as Model

    sizes = {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48, "num_position_embeddings": 64}
    return Model._from_config(Config(**SIZES, **sizes, deepstack_visual_indexes=[0]), **options)


MODELS = {"qwen2": qwen2, "qwen2_5": qwen2_5, "qwen3": qwen3}


def make(name="qwen2_5", dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(0)
    model = MODELS[name](**options)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    count = int(GRID.prod(1).sum())
    pixels = torch.randn(count, 2 * SIZES["patch_size"] ** 2, dtype=dtype, device=device)
    return model.to(device, dtype).eval(), (pixels, GRID.to(device))


def run(model, inputs, **options):
    """The outputs, and the gradients of all parameters."""
    model.zero_grad()
    out = model(*inputs, **options)
    out = out if isinstance(out, tuple) else out.to_tuple()
    lists = [one if isinstance(one, (list, tuple)) else [one] for one in out if one is not None]
    tensors = [tensor for one in lists for tensor in one]
    sum(tensor.square().mean() for tensor in tensors).backward()
    return [*tensors, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def agree(actual, expected, relative=1e-9):
    assert len(actual) == len(expected)
    for one, truth in zip(actual, expected, strict=True):
        assert one.dtype == truth.dtype
        torch.testing.assert_close(one, truth, rtol=0, atol=relative * max(1e-2, float(truth.detach().abs().max())))


def equal(actual, expected):
    assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))


@pytest.fixture
def calls(monkeypatch):
    """How many sequences each call of the op got; nothing else may attend."""
    seen, op = [], ops.packed_attention

    def count(query, key, value, ends, *rest, **options):
        seen.append(len(ends) - 1)
        return op(query, key, value, ends, *rest, **options)

    monkeypatch.setattr(ops, "packed_attention", count)
    monkeypatch.setattr(ops, "attention", None)
    return seen


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_each_layer_attends_once(name, implementation, calls):
    model, inputs = make(name, attn_implementation=implementation)
    expected = run(model, inputs)
    report = sclkern.fuse(model, only="attention")
    assert {entry.by for entry in report.replaced} == {BY} and len(report.replaced) == 2
    # In float64, eager attention of transformers computes its softmax in float32.
    agree(run(model, inputs), expected, 1e-5 if implementation == "eager" else 1e-9)
    # Four sequences: two images and two frames; the windows are of 4 by 4, 2 by 4, 4 by 2 and 2 by 2 patches.
    assert calls == ([8, 4] if name == "qwen2_5" else [4, 4])


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_on_kernels(name, calls):
    model, inputs = make(name, torch.float32, DEVICE, attn_implementation="eager")
    expected = run(model, inputs)
    sclkern.fuse(model, only="attention")
    agree(run(model, inputs), expected, 1e-4)
    assert len(calls) == 2


def test_in_the_interpreter():
    run_in_interpreter(f"{__file__}::test_on_kernels")


def test_reverted_it_is_what_it_was():
    model, inputs = make()
    expected, config = run(model, inputs), model.blocks[0].attn.config
    report = sclkern.fuse(model, only="attention")
    assert model.blocks[0].attn.config is not config
    report.revert()
    assert model.blocks[0].attn.config is config
    equal(run(model, inputs), expected)


def test_copies_compute_the_same_and_pickle(calls):
    model, inputs = make()
    sclkern.fuse(model, only="attention")
    expected = run(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        equal(run(other, inputs), expected)
        assert len(calls) == 2


def test_no_configuration_says_our_name(tmp_path):
    model, inputs = make()
    before = model.config.to_json_string()
    sclkern.fuse(model, only="attention")
    attention = model.blocks[0].attn
    assert attention.config._attn_implementation == packed.NAME
    assert model.config.to_json_string() == before == attention.config.to_json_string()
    model.save_pretrained(tmp_path)
    assert "sclkern" not in (tmp_path / "config.json").read_text()
    # Some CPUs round products by where the weights lie in memory, and loaded ones lie elsewhere.
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(run(loaded, inputs)[:2], run(make()[0], inputs)[:2])


def test_another_attention_that_is_chosen_afterwards_is_used(calls):
    model, inputs = make()
    sclkern.fuse(model, only="attention")
    model.set_attn_implementation("eager")
    run(model, inputs)
    assert len(calls) == 2
    from transformers import AttentionInterface

    seen = []

    def own(module, query, *rest, **options):
        seen.append(query.shape[2])
        return AttentionInterface()["sdpa"](module, query, *rest, **options)

    AttentionInterface.register("own", own)
    model.set_attn_implementation("own")
    run(model, inputs)
    assert len(calls) == 2 and sum(seen) == 2 * len(inputs[0])


def test_a_longest_length_that_a_caller_has_computed_wrongly_changes_nothing():
    model, inputs = make("qwen2")
    expected = run(model, inputs)
    sclkern.fuse(model, only="attention")
    try:
        actual = run(model, inputs, max_seqlen=3)
    except TypeError:
        pytest.skip("this transformers takes no max_seqlen")
    # Where the forward hands it on, the model's eager attention computes, whose softmax is float32.
    agree(actual, expected, 1e-6)


def call(module, ends, length=12, **options):
    """The attention of one layer alone."""
    torch.manual_seed(1)
    hidden = torch.randn(length, 64, dtype=torch.float64)
    angles = torch.randn(length, 32, dtype=torch.float64)
    return module(hidden, torch.as_tensor(ends), position_embeddings=(angles.cos(), angles.sin()), **options)


@pytest.mark.parametrize("ends", [[0, 12], [0, 5, 12], [0, 0, 4, 4, 12, 12], [0, 1, 2, 12]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ends(ends, dtype):
    # Torch's attention of transformers takes no empty sequences.
    layer = make(attn_implementation="eager")[0].blocks[0].attn
    ends = torch.tensor(ends, dtype=dtype)
    expected = call(layer, ends)
    sclkern.fuse(layer)
    agree([call(layer, ends)], [expected], 1e-5)


@pytest.mark.parametrize("ends", [[0, 5, 11], [0, 5, 13], [0, 7, 5, 12]])
def test_ends_that_the_model_refuses_stay_refused(ends):
    layer = make()[0].blocks[0].attn
    with pytest.raises((RuntimeError, ValueError)):
        call(layer, ends)
    sclkern.fuse(layer)
    with pytest.raises((RuntimeError, ValueError)):
        call(layer, ends)


def test_what_the_op_does_not_take_goes_one_by_one(monkeypatch):
    layer = make(attn_implementation="sdpa")[0].blocks[0].attn
    expected = call(layer, [0, 5, 12])
    sclkern.fuse(layer)
    monkeypatch.setattr(packed, "plan", lambda *args, **options: ops.dispatch.Choice("eager", ("no kernel",)))
    monkeypatch.setattr(ops, "packed_attention", None)
    with pytest.warns(UserWarning, match="no kernel: packed sequences are computed one by one"):
        agree([call(layer, [0, 5, 12])], [expected])
    monkeypatch.undo()
    # A factor of the scores that no kernel has.
    other = make(attn_implementation="sdpa")[0].blocks[0].attn
    layer.scaling = other.scaling = -0.1
    agree([call(layer, [0, 5, 12])], [call(other, [0, 5, 12])])


def test_a_forward_that_is_not_known_is_not_packed():
    layer = make()[0].blocks[0].attn
    assert packed.packs(layer)
    own = type("Own", (type(layer),), {"forward": lambda self, *args, **options: None})
    layer.__class__ = own
    assert not packed.packs(layer)
    other = make()[0].blocks[0].attn
    other.forward = lambda *args, **options: None
    assert not packed.packs(other)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_maps_of_each_sequence_where_the_forward_returns_them(implementation):
    video = pytest.importorskip("transformers.models.video_llama_3.modeling_video_llama_3")
    from transformers.models.video_llama_3 import VideoLlama3VisionConfig

    config = VideoLlama3VisionConfig(hidden_size=64, num_attention_heads=2)
    config._attn_implementation = implementation
    layer = video.VideoLlama3VisionAttention(config).double()
    torch.manual_seed(1)
    angles = torch.randn(12, 32, dtype=torch.float64)
    inputs = {"position_embeddings": (angles.cos(), angles.sin()), "cu_seqlens": torch.tensor([0, 5, 12])}
    hidden = torch.randn(12, 64, dtype=torch.float64)
    for wanted in (False, True):
        expected, maps = layer(hidden, **inputs, output_attentions=wanted)
        with sclkern.fuse(layer) as report:
            assert report.replaced[0].by == BY
            actual, ours = layer(hidden, **inputs, output_attentions=wanted)
        agree([actual], [expected], 1e-5 if implementation == "eager" else 1e-9)
        assert isinstance(ours, list) and len(ours) == len(maps) == 2
        if wanted and maps[0] is not None:
            agree(ours, maps)
        else:
            assert ours == [None, None]


def test_compiled():
    layer = make("qwen2")[0].blocks[0].attn
    sclkern.fuse(layer)
    with torch.no_grad():
        expected = call(layer, [0, 5, 12])
        agree([call(torch.compile(layer, backend="eager"), [0, 5, 12])], [expected])
