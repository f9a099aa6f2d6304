"""What the fused attention cannot compute in models of transformers stays with them: nothing is dropped in silence."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sclkern
from sclkern import UserError, ops
from sclkern.integrations.huggingface import maps, masks
from sclkern.integrations.huggingface.masks import key_padding
from sclkern.integrations.huggingface.warn import _warn_once

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
IDS = torch.arange(1, 19).view(2, 9)


@pytest.fixture(autouse=True)
def registered():
    sclkern.register_attention()
    _warn_once.cache_clear()


@pytest.fixture
def op_calls(monkeypatch):
    """The shapes of the queries with which ``ops.attention`` is called from the interface."""
    calls = []

    def spy(query, key, value, **options):
        calls.append(tuple(query.shape))
        return ops.attention(query, key, value, **options)

    spied = type("ops", (), {"attention": staticmethod(spy)})
    monkeypatch.setattr("sclkern.integrations.huggingface.interface.ops", spied)
    return calls


def build(name, config=None, implementation=None, **options):
    """A small model of transformers in evaluation mode, its weights changed so that each counts."""
    config = getattr(transformers, config or name.replace("Model", "Config"))(**options)
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def first(out):
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).detach()


def llama(implementation=None):
    return build("LlamaModel", implementation=implementation, **SMALL, num_key_value_heads=2)


def opt():
    sizes = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 64, "max_position_embeddings": 32}
    return build("OPTModel", implementation="sdpa", **sizes)


@pytest.mark.parametrize("part", [lambda model: model.layers, lambda model: model.layers[1]])
def test_a_part_of_a_causal_model_stays_causal(part):
    model = llama()
    expected = first(model(IDS))
    with pytest.raises(UserError, match="causal attention, which torch's attention computes"):
        sclkern.fuse(part(model))
    sclkern.fuse(part(model), strict=False)
    assert torch.equal(first(model(IDS)), expected)


def test_causality_without_a_mask_is_kept():
    """CLIP's text model tells its layers by a keyword; alone, they do not show that they are causal."""
    model = build("CLIPTextModel", implementation="sdpa", **SMALL, max_position_embeddings=16, eos_token_id=49)
    expected = first(model(IDS))
    encoder = model.encoder if hasattr(model, "encoder") else model.text_model.encoder
    sclkern.fuse(encoder.layers, strict=False)
    torch.testing.assert_close(first(model(IDS)), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_none_is_what_the_model_means_by_it(implementation):
    """Eager attention without a mask attends to all; torch's is causal where the layer says so."""
    model = llama(implementation)
    layer = model.layers[0].self_attn
    inputs = {"hidden_states": torch.randn(2, 5, 64), "attention_mask": None}
    inputs["position_embeddings"] = model.rotary_emb(inputs["hidden_states"], torch.arange(5)[None])
    expected = layer(**inputs)[0]
    from sclkern.integrations.huggingface.config import view

    layer.config = view(layer.config)
    torch.testing.assert_close(layer(**inputs)[0], expected)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
    fused = layer(**{**inputs, "attention_mask": mask})[0]
    layer.config = layer.config._sclkern_plain
    torch.testing.assert_close(fused, layer(**{**inputs, "attention_mask": mask})[0])


GPT_OSS = dict(
    vocab_size=50, hidden_size=32, head_dim=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, pad_token_id=0,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
OTHER_FORMULAS = {
    "sinks": ("GptOssModel", "GptOssConfig", GPT_OSS, "its attention has sinks"),
    "softcap": ("Gemma2Model", "Gemma2Config", {**SMALL, "num_key_value_heads": 2, "head_dim": 32}, "softcap"),
}


@pytest.mark.parametrize("kind", OTHER_FORMULAS)
@pytest.mark.parametrize("options", [{}, {"output_attentions": True}])
def test_other_formulas_are_computed_by_the_model(kind, options):
    name, config, sizes, _ = OTHER_FORMULAS[kind]
    eager = build(name, config, "eager", **sizes)
    ours = build(name, config, "sclkern", **sizes)
    expected, actual = eager(IDS, **options), ours(IDS, **options)
    torch.testing.assert_close(first(actual), first(expected))
    for theirs, fused in zip(expected.attentions or (), actual.attentions or (), strict=True):
        torch.testing.assert_close(fused, theirs)
    assert bool(actual.attentions) == bool(options)


@pytest.mark.parametrize("kind", OTHER_FORMULAS)
def test_other_formulas_are_left(kind):
    name, config, sizes, why = OTHER_FORMULAS[kind]
    model = build(name, config, "eager", **sizes)
    expected = first(model(IDS))
    report = sclkern.fuse(model, only="attention", strict=False)
    assert not report.replaced and (not report.left or why in report.left[0].why)
    assert torch.equal(first(model(IDS)), expected)


def test_sparse_attention_is_refused():
    if not hasattr(transformers, "DeepseekV32ForCausalLM"):
        pytest.skip("this transformers has no DeepSeek V3.2")
    sizes = dict(
        **SMALL, num_key_value_heads=2, pad_token_id=0, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=2, index_topk=3, index_head_dim=16,
        index_n_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = build("DeepseekV32ForCausalLM", "DeepseekV32Config", **sizes)
    report = sclkern.fuse(model, only="attention", strict=False)
    assert not report.replaced and "more with the name of its attention" in report.left[0].why
    model = build("DeepseekV32ForCausalLM", "DeepseekV32Config", "sclkern", **sizes)
    with pytest.raises(UserError, match=r'indices is given.*attn_implementation="eager"'):
        model(IDS, use_cache=False)


def masks_of_one_row():
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, 6:] = False
    soft = torch.linspace(-4, 0, 9).expand(2, 1, 1, 9)
    hard = torch.zeros(2, 1, 1, 9).masked_fill(~padding[:, None, None], torch.finfo(torch.float32).min)
    return {
        "soft": soft,
        "soft, one for all": soft[:1],
        "hard": hard,
        "old": hard.clamp_min(-1e4),
        "2-D": padding.long(),
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", ["name", "fuse eager", "fuse sdpa"])
def test_masks_of_one_row(way, compiled, op_calls):
    # Other tests' graphs of the same model count towards the limit of recompilations.
    torch.compiler.reset()
    eager = build("BertModel", implementation="eager", **SMALL)
    own = {"name": "sclkern", "fuse eager": "eager", "fuse sdpa": "sdpa"}[way]
    model = build("BertModel", implementation=own, **SMALL)
    if way != "name":
        sclkern.fuse(model, only="attention")
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    given = masks_of_one_row()
    # transformers 5.0 and 5.1 have no collector that tells, and a compiler hides who asks for maps.
    hidden = compiled and way == "name" and maps._collector is None
    with torch.no_grad():
        for name in ("soft", "2-D") if compiled else given:
            op_calls.clear()
            actual = first(run(IDS, attention_mask=given[name]))
            torch.testing.assert_close(actual, first(eager(IDS, attention_mask=given[name])))
            assert len(op_calls) == (0 if hidden or "soft" in name else 2), name


def test_what_is_known_of_a_mask_goes_with_its_values():
    mask = masks_of_one_row()["hard"]
    padding, reason = key_padding(mask, 2, 9)
    assert reason is None and padding.tolist() == (mask[:, 0, 0] == 0).tolist()
    mask[1, ..., 0] = -1.0
    assert key_padding(mask, 2, 9) == (None, "a mask that adds numbers other than 0")
    # A slice knows nothing of what it was cut from.
    full = masks_of_one_row()["hard"].expand(2, 1, 9, 9).contiguous()
    assert key_padding(full, 2, 9)[1] is None
    full[:, :, 0, 0] = torch.finfo(torch.float32).min
    assert "differs between queries" in key_padding(full, 2, 9)[1]
    assert key_padding(full[:, :, 1:2], 2, 1)[1] is None
    assert key_padding(mask.clone().requires_grad_(), 2, 9) == (None, "a mask with a gradient")
    with torch.inference_mode():
        mask = masks_of_one_row()["hard"]
        assert key_padding(mask, 2, 9)[1] is None
        mask[1, ..., 0] = -1.0
        assert key_padding(mask, 2, 9)[1] is not None


def test_values_are_read_once(monkeypatch):
    reads = []
    read = masks._read
    monkeypatch.setattr(masks, "_read", lambda *args: reads.append(1) or read(*args))
    mask = masks_of_one_row()["hard"]
    for _ in range(3):
        assert key_padding(mask, 2, 9)[1] is None
    assert len(reads) == 1


VISION = {**SMALL, "image_size": 16, "patch_size": 8}
del VISION["vocab_size"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sclkern"])
@pytest.mark.parametrize("part", ["model", "layer"])
def test_maps_are_those_of_the_layers_they_belong_to(implementation, part):
    pixels = torch.randn(2, 3, 16, 16)
    model = build("SiglipVisionModel", implementation="eager", **VISION)
    expected = model(pixels, output_attentions=True).attentions
    model = build("SiglipVisionModel", implementation=implementation, **VISION)
    encoder = model.encoder if hasattr(model, "encoder") else model.vision_model.encoder
    if implementation != "sclkern":
        sclkern.fuse(model if part == "model" else encoder.layers[0], only="attention")
    actual = model(pixels, output_attentions=True).attentions
    if implementation == "sdpa" and part == "layer":
        # Torch's attention gives none for the other layer.
        assert not actual
        return
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_configuration_may_ask_for_maps():
    for before in (True, False):
        model = build("BertModel", implementation="eager", **SMALL)
        model.config.output_attentions = before
        sclkern.fuse(model, only="attention")
        model.config.output_attentions = True
        assert len(model(IDS).attentions) == 2 and model.config.output_attentions
        model.config.output_attentions = False
        assert model(IDS).attentions is None


def test_a_configuration_is_shared_and_keeps_its_class(tmp_path):
    model = build("BertModel", implementation="sdpa", **SMALL)
    config = model.config
    with sclkern.fuse(model, only="attention"):
        assert isinstance(model.config, transformers.BertConfig) and model.config == config
        assert (model.config._attn_implementation, config._attn_implementation) == ("sclkern", "sdpa")
        model.config.use_cache = False
        assert config.use_cache is False
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.config._attn_implementation == "sclkern"
            torch.testing.assert_close(first(copied(IDS)), first(model(IDS)))
        model.save_pretrained(tmp_path)
        assert type(type(model.config)()) is transformers.BertConfig
        # A choice that is made later counts.
        model.config._attn_implementation = "flash_attention_2"
        assert model.config._attn_implementation == "flash_attention_2"
        model.config._attn_implementation = "sdpa"
    assert model.config is config
    assert transformers.BertModel.from_pretrained(tmp_path).config.hidden_size == 64


def test_a_function_that_is_not_known_computes_by_itself(monkeypatch, op_calls):
    """The source decides, not the name: a module that patches its eager attention keeps what it patched."""
    module = transformers.models.bert.modeling_bert
    own = module.eager_attention_forward

    def eager_attention_forward(module, query, key, value, attention_mask, **options):
        return own(module, query, key, 2 * value, attention_mask, **options)

    monkeypatch.setattr(module, "eager_attention_forward", eager_attention_forward)
    from sclkern.integrations.huggingface import formulas

    monkeypatch.setattr(formulas, "_formulas", {})
    expected = first(build("BertModel", implementation="eager", **SMALL)(IDS))
    torch.testing.assert_close(first(build("BertModel", implementation="sclkern", **SMALL)(IDS)), expected)
    report = sclkern.fuse(build("BertModel", implementation="sdpa", **SMALL), only="attention", strict=False)
    assert not report.replaced and report.left[0].why == "an attention function that sclkern does not know"


def test_one_warning_for_all_shapes(recwarn):
    model = llama("sclkern")
    for length in (3, 4, 5):
        model(IDS[:, :length])
    assert len([warning for warning in recwarn if "sclkern" in str(warning.message)]) == 1


def test_generation_is_that_of_eager():
    sizes = {**SMALL, "num_key_value_heads": 1}
    expected, actual = (
        build("LlamaForCausalLM", "LlamaConfig", implementation, **sizes).generate(
            IDS, attention_mask=(IDS > 2).long(), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        for implementation in ("eager", "sclkern")
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contrastive_loss_has_the_models_dtype(dtype, make):
    model, inputs = make("clip")
    model = model.to(dtype).eval()
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype), "return_loss": True}
    expected = model(**inputs).loss
    sclkern.fuse(model, only="completion_loss")
    actual = model(**inputs).loss
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, atol=3e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2)


def test_another_contrastive_loss_is_left():
    class Video(transformers.XCLIPModel):
        pass

    text = {**SMALL, "max_position_embeddings": 16, "eos_token_id": 49}
    vision = dict(**VISION, num_frames=2, mit_hidden_size=64, mit_intermediate_size=64, mit_num_hidden_layers=1)
    config = transformers.XCLIPConfig(
        text_config=text, vision_config={**vision, "mit_num_attention_heads": 2}, projection_dim=64,
        prompt_attention_heads=2,
    )  # fmt: skip
    inputs = {"input_ids": IDS, "pixel_values": torch.randn(2, 2, 3, 16, 16), "return_loss": True}
    for cls in (transformers.XCLIPModel, Video):
        model = cls(config).eval()
        expected = model(**inputs).loss
        report = sclkern.fuse(model, strict=False)
        assert "completion_loss" not in {entry.by for entry in report.replaced}
        assert any("its loss is not known" in left.why for left in report.left)
        torch.testing.assert_close(model(**inputs).loss, expected)


def test_layers_of_another_library_are_no_obstacle():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = build("BertModel", implementation="eager", **SMALL)

        def forward(self, ids):
            return self.bert(ids).last_hidden_state

    model = Wrapper()
    expected = model(IDS)
    sclkern.fuse(model, only="attention")
    torch.testing.assert_close(model(IDS), expected)


@pytest.mark.parametrize("mask", [torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0]), torch.zeros(9, dtype=torch.int32)])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_mask_of_integers_is_added_as_eager_attention_adds_it(mask, rows):
    mask = mask.expand(2, 1, rows, 9)
    expected = first(build("BertModel", implementation="eager", **SMALL)(IDS, attention_mask=mask))
    fused = build("BertModel", implementation="eager", **SMALL)
    sclkern.fuse(fused, only="attention")
    for model in (fused, build("BertModel", implementation="sclkern", **SMALL)):
        torch.testing.assert_close(first(model(IDS, attention_mask=mask)), expected)


def test_revert_keeps_a_configuration_that_was_given_later():
    model = build("BertModel", implementation="sdpa", **SMALL)
    report = sclkern.fuse(model, only="attention")
    later = copy.deepcopy(model.config._sclkern_plain)
    model.config = later
    report.revert()
    assert model.config is later
    assert not any("sclkern" in str(type(getattr(module, "config", None)).__mro__) for module in model.modules())


def test_a_vision_model_that_takes_no_mask_is_not_causal(op_calls):
    """GIT's text is causal, and its masks stay there."""
    vision = {**VISION, "hidden_size": 64}
    config = transformers.GitConfig(vision_config=vision, **SMALL, max_position_embeddings=32)
    torch.manual_seed(0)
    model = transformers.GitModel._from_config(config, attn_implementation="eager").eval()
    inputs = {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = first(model(**inputs))
    report = sclkern.fuse(model)
    if all(left.module != "GitVisionAttention" for left in report.left):
        torch.testing.assert_close(first(model(**inputs)), expected)
        assert len(op_calls) == 2
    else:
        # transformers 5.0 adds up two masks in it.
        assert {left.why for left in report.left} == {"its forward makes a mask of its own"}
