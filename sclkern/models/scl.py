"""SCLModel: the encoders, the fusion and the heads, with the training step behind ``forward``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sclkern.models.config import SCLConfig
from sclkern.models.fusion import FusionEncoder, LayerAttention
from sclkern.models.heads import MLP, MLMHead, Pooler
from sclkern.models.layers import Attention
from sclkern.models.layouts import MODEL_BACKENDS, Padded
from sclkern.models.text import TextEncoder
from sclkern.models.vision import VisionEncoder, VisionFeatures
from sclkern.nn import DropoutAddLayerNorm, LinearGELU
from sclkern.objectives import ObjectiveConfig
from sclkern.profiling import phase
from sclkern.step.config import StepConfig

TEXT_TYPE, IMAGE_TYPE = 0, 1


class FusedFeatures(NamedTuple):
    """Output of the fusion encoder.

    Attributes:
        text: (B, L, D). image: the image stream, tokens (B, F + F * P, D).
        attentions: one ``LayerAttention`` a layer when they were asked for, else None.
    """

    text: Tensor
    image: VisionFeatures
    attentions: list[LayerAttention] | None = None

    @property
    def text_cls(self) -> Tensor:
        return self.text[:, 0]


class SCLModel(nn.Module):
    """Vision-language model of SCL (arXiv 2211.13437; architecture as in the released scl_module.py).

    >>> model = SCLModel(SCLConfig.preset("tiny"))
    >>> losses = model({"image": images, "text_ids": ids, "text_mask": mask}, seed=0)
    >>> losses.total.backward()
    """

    def __init__(
        self, config: SCLConfig, objectives: ObjectiveConfig | None = None, step: StepConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.objectives = objectives or ObjectiveConfig()
        self.backend = "auto"
        width = config.width
        self.text = TextEncoder(config)
        self.vision = VisionEncoder(config)
        self.text_transform = nn.Linear(width, width)
        self.image_transform = nn.Linear(width, width)
        self.modality = nn.Embedding(config.token_types, width)
        self.fusion = FusionEncoder(config)
        self.text_pooler = Pooler(width)
        self.image_pooler = Pooler(width)
        if "itm" in config.heads:
            self.itm_head = nn.Linear(2 * width, 2)
        if "mlm" in config.heads:
            self.mlm_head = MLMHead(width, config.vocab_size)
        if "itc" in config.heads:
            self.text_projection = MLP(width, width, config.projection_dim)
            self.image_projection = MLP(width, width, config.projection_dim)
            self.temperature = nn.Parameter(torch.tensor(config.temperature_init))
        if "vqa" in config.heads:
            self.vqa_head = MLP(2 * width, 2 * width, config.vqa_answers)
        if "nlvr2" in config.heads:
            self.nlvr2_head = MLP(4 * width, 2 * width, 2)
        if "rank" in config.heads:
            self.rank_head = nn.Linear(2 * width, 1)
        self.step = step or StepConfig()
        self._initialise()

    @property
    def step(self) -> StepConfig:
        """How a step is executed."""
        return self._step

    @step.setter
    def step(self, step: StepConfig) -> None:
        self._step = step
        for module in self.modules():
            if isinstance(module, Attention):
                module.absorb = step.absorb
            elif isinstance(module, (TextEncoder, VisionEncoder, FusionEncoder)):
                module.checkpoint_blocks = step.checkpoint_blocks

    def _initialise(self) -> None:
        """BERT's normal distribution everywhere, Xavier in the vision encoder (reference: both ``init_weights``)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.startswith("vision."):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=self.config.init_std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])

    # -- weights -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path | tuple[str, str], **options) -> SCLModel:
        """Load a directory of ``save_pretrained``, or a (text, vision) pair; see `sclkern.weights.from_pretrained`."""
        from sclkern.weights import from_pretrained

        return from_pretrained(path, **options)

    @classmethod
    def from_reference(cls, source: str | Path | Mapping[str, Tensor], *, strict: bool = True, **options) -> SCLModel:
        """Load weights under the names of SCL's or METER's code; see ``sclkern.weights.from_reference``."""
        from sclkern.weights import from_reference

        return from_reference(source, strict=strict, **options)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the directory ``path``, each whole or not at all."""
        from sclkern.weights import save_pretrained

        save_pretrained(self, path)

    def set_backend(self, backend: str) -> SCLModel:
        """Choose what every op of the model runs on.

        Args:
            backend: "auto" takes the kernels where they can run; "triton" insists on them; "eager" is plain PyTorch
                (``sclkern.reference``); "sdpa" is plain PyTorch but for torch's own fused attention.
        """
        if backend not in MODEL_BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(MODEL_BACKENDS)}")
        self.backend = "eager" if backend == "sdpa" else backend
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend
            elif isinstance(module, (LinearGELU, DropoutAddLayerNorm, VisionEncoder)):
                module.backend = self.backend
        return self

    # -- encoders ----------------------------------------------------------------------------------------------------

    def encode_text(self, ids: Tensor, mask: Tensor, *, attentions: list[Tensor] | None = None) -> Tensor:
        """Unimodal text features after the modality transform.

        Args:
            ids: (B, L) int64. mask: (B, L) bool, True = a token.
            attentions: a list that receives the (B, H, L, L) probabilities of each block (eager path).

        Returns:
            (B, L, D); rows of padding are undefined.

        Raises:
            ValueError: wrong shape, or captions longer than ``max_text_len``.
        """
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(f"ids, mask: got shapes {tuple(ids.shape)} and {tuple(mask.shape)}, expected both (B, L)")
        if ids.shape[1] > self.config.max_text_len:
            raise ValueError(
                f"ids: got {ids.shape[1]} tokens, expected at most max_text_len {self.config.max_text_len}"
            )
        return self.text_transform(self.text(ids, mask.bool(), attentions))

    def encode_image(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: Tensor | None = None,
        attentions: list[Tensor] | None = None,
    ) -> VisionFeatures:
        """Unimodal image features after the modality transform; arguments as in ``VisionEncoder.forward``."""
        features = self.vision(images, keep=keep, replace=replace, probabilities=attentions)
        return features.with_tokens(self.image_transform(features.tokens))

    def fuse(
        self,
        text: Tensor,
        text_mask: Tensor,
        image: VisionFeatures,
        *,
        image_type: int = IMAGE_TYPE,
        return_attention: bool = False,
    ) -> FusedFeatures:
        """Run the fusion encoder on unimodal features.

        Args:
            text: (B, L, D) from ``encode_text``. text_mask: (B, L) bool. image: from ``encode_image``.
            image_type: row of the modality table: 1, or 2 for the second image of NLVR2.
            return_attention: keep every layer's attention probabilities, with their graph (eager path).
        """
        attentions: list[LayerAttention] | None = [] if return_attention else None
        fused_text, fused_image = self.fusion(
            text + self.modality.weight[TEXT_TYPE],
            Padded(text_mask.bool()),
            image.tokens + self.modality.weight[image_type],
            Padded(),
            attentions=attentions,
        )
        return FusedFeatures(fused_text, image.with_tokens(fused_image), attentions)

    def pool(self, fused: FusedFeatures) -> Tensor:
        """(B, 2 D): pooled text CLS, then pooled image CLS (the mean over frames)."""
        return torch.cat([self.text_pooler(fused.text[:, :1]), self.image_pooler(fused.image.cls)], dim=-1)

    def project(self, text: Tensor, image: VisionFeatures) -> tuple[Tensor, Tensor]:
        """Projected unimodal CLS features (text, image), each (B, projection_dim), not normalised."""
        return self.text_projection(text[:, 0]), self.image_projection(image.cls.mean(1))

    def contrast_temperature(self) -> Tensor:
        """Temperature of the image-text contrast, clamped unless the objectives say "reference"."""
        if self.objectives.itc_temperature == "reference":
            return self.temperature
        low, high = self.objectives.itc_temperature_range
        # The clamped value in the forward pass, but the gradient of the free one: else a temperature that once left
        # the range could never come back.
        return self.temperature + (self.temperature.clamp(low, high) - self.temperature).detach()

    def forward(self, batch: Mapping[str, Tensor], *, seed: int | Tensor | None = None):
        """One training step's losses; every mask is drawn on the batch's device from ``seed``.

        Args:
            batch: ``image`` (B, 3, S, S) or (B, F, 3, S, S) float; ``text_ids`` (B, L) int64; ``text_mask`` (B, L)
                bool or 0/1; ``false_image`` like ``image`` when ``itm_negatives`` is "dataset"; ``text_tokens``, an
                int, where the number of tokens in ``text_mask`` is known to be no larger: texts are packed into as many
                (without it into all B * L places).
            seed: int or int64 tensor; None draws one from torch's generator.

        Returns:
            ``sclkern.step.SCLLosses``.
        """
        from sclkern.step import draw_masks, run_step

        if seed is None:
            seed = int(torch.randint(2**62, ()))
        with phase("draw masks"):
            masks = draw_masks(self, batch, seed)
        return run_step(self, batch, masks)
