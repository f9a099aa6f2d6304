"""The models into which ops are swapped: a class of transformers, what its tiny configuration needs, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from swapped_models import inputs as make
from swapped_models.others import OTHERS
from swapped_models.tiny import stir, tiny


@dataclass(frozen=True)
class Model:
    """An entry of the table.

    Attributes:
        sizes: fields of the configuration beyond what ``tiny`` sets.
        inputs: arguments of the forward beyond what ``make_inputs`` finds.
        dtype: float64, except where the model's own code computes in float32.
        generates: whether ``generate`` takes what the forward takes.
        skip_logits: fused with ``skip_logits=True``, and trained with labels too.
    """

    sizes: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    generates: bool = True
    skip_logits: bool = False


def normal(*shape: int) -> Callable[[Any], torch.Tensor]:
    """An input of this shape, whatever the configuration."""
    return lambda config: torch.randn(make.ROWS, *shape)


def unpadded(config: Any) -> torch.Tensor:
    """A mask of the text that masks nothing."""
    return torch.ones(make.ROWS, make.LENGTH, dtype=torch.long)


FLOAT32 = {"dtype": torch.float32}
STAGES = ["stage2", "stage3", "stage4"]
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
DETR = {"backbone_config": {**RESNET, "out_features": STAGES}, "use_timm_backbone": False, "num_queries": 5}
RT_DETR = {"backbone_config": {"out_features": STAGES}, "num_queries": 5}
EFFICIENTNET = {"num_block_repeats": [1] * 7, "hidden_dim": 256, "width_coefficient": 0.25}
HTSAT = {"hidden_size": 128, "spec_size": 64, "num_mel_bins": 16, "depths": [1, 2], "num_attention_heads": [2, 2]}
SWIN = {"window_size": 4, "depths": [2, 1], "num_heads": [2, 2]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}}
HALF_MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}}
IMAGES = {"pixel_values": normal(1, 3, 32, 32)}
SIZES = {"image_sizes": torch.tensor([[32, 32]] * make.ROWS)}
TILES = {"pixel_values": normal(2, 3, 32, 32), **SIZES}
PATCHES = {
    "pixel_values": normal(16, 192),
    "spatial_shapes": torch.tensor([[4, 4]] * make.ROWS),
    "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [12], [16]])).long(),
}
VIDEO = {"pixel_values": make.frames}

MODELS: dict[str, Model] = {
    # Text.
    "CodeGenForCausalLM": Model({"rotary_dim": 16}),
    "EsmModel": Model({"vocab_size": 64}),
    "FSMTForConditionalGeneration": Model(**FLOAT32),
    # Without padding: the eager attention of a padded query overflows to NaN there, that of torch does not.
    "Glm5NextForConditionalGeneration": Model(inputs={"attention_mask": unpadded}),
    "GPTJForCausalLM": Model({"rotary_dim": 16}),
    "GPTNeoForCausalLM": Model({"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "HunYuanDenseV1ForCausalLM": Model({"head_dim": 32}),
    "Inkling2ForCausalLM": Model(**FLOAT32),
    "LEDForConditionalGeneration": Model({"attention_window": 4}),
    "MinistralForCausalLM": Model({"num_key_value_heads": 2, "head_dim": 32}),
    "MraModel": Model(**FLOAT32),
    "NemotronForCausalLM": Model({"num_key_value_heads": 2}),
    "Qwen2_5_VLTextModel": Model(MROPE),
    "XGLMForCausalLM": Model(**FLOAT32),
    "XLNetLMHeadModel": Model(generates=False),
    "XmodModel": Model({"languages": ["en_XX"], "default_language": "en_XX"}),
    # Images and videos.
    "BeitModel": Model({"use_relative_position_bias": True}),
    "ConditionalDetrModel": Model(DETR),
    "DabDetrModel": Model(DETR, **FLOAT32),
    "DeformableDetrModel": Model(DETR),
    "DetrModel": Model(DETR),
    "DFineModel": Model(RT_DETR),
    "DonutSwinModel": Model(SWIN),
    "RTDetrModel": Model(RT_DETR),
    "SamHQModel": Model({"vision_config": {"num_pos_feats": 32}}),
    "SamModel": Model({"vision_config": {"num_pos_feats": 32}}),
    "SwinModel": Model(SWIN),
    "TableTransformerModel": Model(DETR),
    "TimesformerModel": Model({}, VIDEO),
    "VideoMAEModel": Model({}, VIDEO),
    "VivitModel": Model({}, VIDEO),
    # Text with images or videos.
    "AlignModel": Model({"vision_config": EFFICIENTNET | {"out_channels": [16, 24, 40, 64, 64, 64, 256]}}),
    "Gemma3ForConditionalGeneration": Model({"mm_tokens_per_image": 4}),
    "Glm4vForConditionalGeneration": Model({"text_config": HALF_MROPE}, **FLOAT32),
    "Idefics2ForConditionalGeneration": Model({}, IMAGES),
    "Idefics3ForConditionalGeneration": Model({}, IMAGES),
    "IdeficsForVisionText2Text": Model(
        {}, IMAGES | {"image_attention_mask": torch.ones(make.ROWS, make.LENGTH, 1)}, **FLOAT32
    ),
    "InstructBlipForConditionalGeneration": Model({}, {"qformer_input_ids": make.question}),
    "LayoutLMv3Model": Model({"input_size": 32, "coordinate_size": 12, "shape_size": 8}),
    "LlavaNextForConditionalGeneration": Model({"image_grid_pinpoints": [[32, 32]]}, TILES),
    "LlavaOnevisionForConditionalGeneration": Model({"image_grid_pinpoints": [[32, 32]]}, TILES),
    "LxmertModel": Model({"visual_feat_dim": 64}, {"visual_feats": normal(5, 64), "visual_pos": normal(5, 4)}),
    "Mistral3ForConditionalGeneration": Model({}, SIZES),
    "ModernVBertModel": Model({}, IMAGES),
    "Qwen2_5_VLForConditionalGeneration": Model({"text_config": MROPE}),
    "Qwen2VLForConditionalGeneration": Model({"text_config": MROPE}),
    "Qwen3VLForConditionalGeneration": Model({"text_config": MROPE}),
    "Qwen3VLMoeForConditionalGeneration": Model({"text_config": MROPE}),
    "Siglip2Model": Model({}, PATCHES),
    "SmolVLMForConditionalGeneration": Model({}, IMAGES),
    "XCLIPModel": Model({}, VIDEO),
    # Sound.
    "ASTModel": Model({"max_length": 32, "num_mel_bins": 32}, {"input_values": normal(32, 32)}),
    "BarkSemanticModel": Model({"input_vocab_size": 64, "output_vocab_size": 64}, generates=False),
    "BridgeTowerModel": Model(),
    "ClapModel": Model({"audio_config": HTSAT}, {"input_features": normal(1, 32, 16)}),
    "HiggsAudioV2ForConditionalGeneration": Model(generates=False),
    "Pop2PianoForConditionalGeneration": Model({}, {"input_features": None}, generates=False),
    "Speech2TextForConditionalGeneration": Model({}, {"input_features": normal(16, 80)}),
    "Wav2Vec2BertModel": Model({"feature_projection_input_dim": 32}, {"input_features": normal(16, 32)}),
    "WhisperForConditionalGeneration": Model({}, {"input_features": normal(80, 256)}),
}

# Models that need nothing beyond what ``tiny`` sets and ``make_inputs`` finds.
PLAIN = """
    BlipForConditionalGeneration
    GitForCausalLM
    EvollaForProteinText2Text
    BigBirdPegasusForConditionalGeneration
    AfmoeForCausalLM Aimv2Model Aimv2VisionModel AlbertModel AltCLIPModel Apertus1p5TextForCausalLM
    ApertusForCausalLM ArceeForCausalLM AriaTextForCausalLM AXK1ForCausalLM AXK2ForCausalLM
    AyaVisionForConditionalGeneration BartForConditionalGeneration BeamForCausalLM BeitModel BertGenerationDecoder
    BertModel BigBirdModel BioGptForCausalLM BitNetForCausalLM
    BlenderbotForConditionalGeneration BlenderbotSmallForConditionalGeneration Blip2ForConditionalGeneration
    BloomForCausalLM BrosModel CamembertModel CanineModel
    ChineseCLIPModel ChineseCLIPVisionModel CLIPModel CLIPSegModel CLIPTextModel CLIPVisionModel Cohere2ForCausalLM
    Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereForCausalLM ConvBertModel
    Cosmos3EdgeForConditionalGeneration Cosmos3EdgeTextModel Cosmos3OmniForConditionalGeneration CpmAntForCausalLM
    CTRLLMHeadModel CwmForCausalLM Data2VecAudioModel Data2VecTextModel Data2VecVisionModel DebertaModel
    DebertaV2Model DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM DeepseekVLModel DeiTModel
    DiffLlamaForCausalLM Dinov2Model Dinov2WithRegistersModel DINOv3ViTModel DistilBertModel DogeForCausalLM
    DPRQuestionEncoder DPTModel ElectraModel EmbeddingGemma2TextModel Emu3ForCausalLM Ernie4_5_MoeForCausalLM
    Ernie4_5ForCausalLM ErnieModel EsmcModel EuroBertModel
    Exaone4_5_ForConditionalGeneration Exaone4ForCausalLM ExaoneMoeForCausalLM FalconForCausalLM FlaubertModel
    FlavaModel FlexOlmoForCausalLM FlintForCausalLM Florence2ForConditionalGeneration FunnelModel Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma4ForCausalLM Gemma4UnifiedForCausalLM GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm5NextTextModel GlmAsrEncoder
    GlmForCausalLM GlmMoeDsaForCausalLM GLPNModel GotOcr2ForConditionalGeneration GPT2LMHeadModel
    GPTBigCodeForCausalLM GPTNeoXForCausalLM GPTNeoXJapaneseForCausalLM GptOssForCausalLM GradiumPhononTTSModel
    GraniteDoclingTextModel GraniteDoclingVisionModel GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM GraniteSWAForCausalLM GroupViTModel GteModel
    HeliumForCausalLM HieraModel HubertModel HyperCLOVAXForCausalLM
    HyperCLOVAXVisionV2ForConditionalGeneration HYV3ForCausalLM HYV4ForCausalLM IBertModel Idefics3VisionTransformer
    IJepaModel ImageGPTModel InklingForCausalLM InternVLForConditionalGeneration InternVLVisionModel
    Jais2ForCausalLM JetMoeForCausalLM JinaEmbeddingsV3Model KimiLinearForCausalLM Kosmos2_5ForConditionalGeneration
    LagunaForCausalLM LaraMiniForCausalLM LayoutLMModel Lfm2ForCausalLM Lfm3ForCausalLM
    Lfm3VlForConditionalGeneration Llama4ForCausalLM LlamaForCausalLM LlavaForConditionalGeneration LongformerModel
    LongT5ForConditionalGeneration LukeModel M2M100ForConditionalGeneration MarianMTModel
    MarkupLMModel MaskFormerModel MaskFormerSwinModel MBartForConditionalGeneration MegatronBertModel
    MellumForCausalLM MetaClip2Model MgpstrForSceneTextRecognition MiniCPM3ForCausalLM MiniMaxForCausalLM
    MiniMaxM2ForCausalLM MiniMaxM3SparseForConditionalGeneration MiniMaxM3VLForCausalLM Ministral3ForCausalLM
    Mistral4ForCausalLM MistralForCausalLM MistralLarge4TextModel MixtralForCausalLM MLCDVisionModel
    MllamaForCausalLM MobileBertModel MobileViTModel ModernBertDecoderForCausalLM
    ModernBertModel Molmo2TextModel MoonshineForConditionalGeneration MoshiForCausalLM MPNetModel MptForCausalLM
    MT5ForConditionalGeneration MuseGlimmerTextModel MuseSparkTextModel MvpForConditionalGeneration
    NanoChatForCausalLM NllbMoeForConditionalGeneration NomicBertModel NystromformerModel Olmo2ForCausalLM
    Olmo3ForCausalLM OlmoeForCausalLM OlmoForCausalLM OlmoHybridForCausalLM OpenAIGPTLMHeadModel
    OpenAIPrivacyFilterModel OPTForCausalLM Ovis2ForConditionalGeneration Owlv2Model OwlViTModel
    PaliGemmaForConditionalGeneration PegasusForConditionalGeneration PegasusXForConditionalGeneration
    PersimmonForCausalLM Phi3ForCausalLM Phi4MultimodalForCausalLM PhiForCausalLM PhimoeForCausalLM PixioModel
    PixtralVisionModel PLBartForConditionalGeneration PocketTTSModel PoolFormerModel
    ProphetNetForConditionalGeneration PvtModel PvtV2Model QianfanOCRForConditionalGeneration QianfanOCRVisionModel
    Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM
    Qwen3_5MoeForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLMoeTextModel
    Qwen3VLTextModel RadioModel RemBertModel ResNetModel RobertaModel RobertaPreLayerNormModel
    RoCBertModel RoFormerModel Sam3LiteTextModel Sam3LiteTextTextModel Sam3Model Sam3VisionModel
    Sam3ViTModel SamHQVisionModel SamVisionModel Sapiens2Model SeamlessM4TForTextToText SeamlessM4Tv2ForTextToText
    SeedOssForCausalLM SegformerModel SEWDModel SEWModel SiglipModel SiglipVisionModel SmolLM3ForCausalLM
    SmolVLMVisionTransformer SolarOpenForCausalLM SpeechT5ForSpeechToText SplinterModel SqueezeBertModel
    StableLmForCausalLM Starcoder2ForCausalLM SwiftFormerModel Swin2SRModel Swinv2Model
    SwitchTransformersForConditionalGeneration T5ForConditionalGeneration T5GemmaForConditionalGeneration TapasModel
    Tipsv2Model Tipsv2TextModel Tipsv2VisionModel TrOCRForCausalLM UdopForConditionalGeneration UltrabertModel
    UMT5ForConditionalGeneration UniSpeechModel UniSpeechSatModel UnlimitedOcrForConditionalGeneration
    VaultGemmaForCausalLM VideoLlavaForConditionalGeneration VideoPrismClipModel VideoPrismVisionModel ViltModel
    VisualBertModel VitDetModel ViTMAEModel ViTModel ViTMSNModel VJEPA2Model VoxtralRealtimeEncoder
    Wav2Vec2ConformerModel Wav2Vec2Model WavLMModel XLMModel XLMRobertaModel XLMRobertaXLModel YolosModel
    YosoModel YoutuForCausalLM Zamba2ForCausalLM ZayaForCausalLM
"""
MODELS |= {name: Model() for name in PLAIN.split() if name not in MODELS} | {name: Model() for name in OTHERS}

# Models for masked language modelling, in tests/integrations/fuse/test_masked_lm.py too.
MASKED_LM = """
    Albert Bert BigBird BridgeTower Camembert ConvBert Data2VecText DistilBert Electra Ernie Gte JinaEmbeddingsV3
    LayoutLM MegatronBert MPNet NomicBert Nystromformer RemBert Roberta RobertaPreLayerNorm RoCBert RoFormer Vilt
    XLMRoberta XLMRobertaXL Xmod
"""
MODELS |= {
    f"{name}ForMaskedLM": Model(MODELS[f"{name}Model"].sizes if f"{name}Model" in MODELS else {}, skip_logits=True)
    for name in MASKED_LM.split()
}

# By model: classes that are taken, but that it hands what the op does not have (the causal mask of a decoder, whose
# class its cross-attention shares; masks of image blocks; wider keys than values), or that these inputs do not reach.
IDLE = {
    "BigBirdPegasusForConditionalGeneration": "BigBirdPegasusDecoderAttention",
    "BlipForConditionalGeneration": "BlipTextSelfAttention",
    "ConditionalDetrModel": "ConditionalDetrDecoderCrossAttention",
    "EvollaForProteinText2Text": "EvollaSaProtSelfAttention",
    "GitForCausalLM": "GitSelfAttention",
    "Kosmos2_5ForConditionalGeneration": "Kosmos2_5TextAttention",
    "Lfm3VlForConditionalGeneration": "Lfm3VlVisionAttention",
    "Mistral3ForConditionalGeneration": "PixtralAttention",
    "MoonshineForConditionalGeneration": "MoonshineAttention",
    "NllbMoeForConditionalGeneration": "NllbMoeAttention",
    "PegasusXForConditionalGeneration": "PegasusXAttention",
    "Phi4MultimodalForCausalLM": (
        "Phi4MultimodalVisionAttention Phi4MultimodalVisionEncoderLayer Phi4MultimodalVisionMLP"
    ),
    "PixtralVisionModel": "PixtralAttention",
    "Sam3LiteTextModel": "Sam3LiteTextAttention",
    "Sam3Model": "Sam3Attention",
    "VideoLlavaForConditionalGeneration": "CLIPAttention CLIPEncoderLayer CLIPMLP",
}


def build(name: str, dropout: dict[str, float] | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny model in eval mode, whose weights are stirred, and its inputs.

    Args:
        name: a model of the table.
        dropout: see ``tiny``; in models that are not of transformers, "p" is every probability.
        **options: arguments of ``_from_config`` of transformers, such as ``attn_implementation``.

    Returns:
        The model and the keyword arguments of its forward.
    """
    torch.manual_seed(0)
    if name in OTHERS:
        return _build_other(name, (dropout or {}).get("p", 0.0))
    import transformers

    entry, cls = MODELS[name], getattr(transformers, name)
    # Configurations keep lists and nested configurations that they are given.
    config = tiny(cls.config_class, dropout, **entry.sizes)
    for one in (config, *(inner for inner in vars(config).values() if hasattr(inner, "model_type"))):
        # The fast way, torch's grouped product, has no float64.
        one._experts_implementation = "eager"
    model = stir(cls._from_config(config, **options).to(entry.dtype)).eval()
    torch.set_default_dtype(entry.dtype)
    try:
        return model, make.make_inputs(model, entry.inputs)
    finally:
        torch.set_default_dtype(torch.float32)


def _build_other(name: str, dropout: float) -> tuple[nn.Module, dict[str, Any]]:
    torch.set_default_dtype(torch.float64)
    try:
        model, inputs = OTHERS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = dropout
    return stir(model).eval(), inputs
