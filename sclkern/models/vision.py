"""The flexible vision encoder: CLIP's ViT for images, with frame-wise attention for clips, in one set of weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.models.config import SCLConfig
from sclkern.models.execution import Execution
from sclkern.models.layers import PreNormBlock, ResidualNorm, run_block
from sclkern.models.layouts import Layout, Padded
from sclkern.models.norms import LayerNorm


class VisionFeatures(NamedTuple):
    """Output of the vision encoder.

    Attributes:
        tokens: (B, F + F * P, D): the CLS tokens of the F frames first, then the patches frame by frame.
        num_frames: F.
    """

    tokens: Tensor
    num_frames: int

    @property
    def cls(self) -> Tensor:
        """(B, F, D), one CLS a frame."""
        return self.tokens[:, : self.num_frames]

    @property
    def patches(self) -> Tensor:
        """(B, F * P, D)."""
        return self.tokens[:, self.num_frames :]

    def with_tokens(self, tokens: Tensor) -> VisionFeatures:
        """Other features of the same frames."""
        return VisionFeatures(tokens, self.num_frames)


class VisionEncoder(nn.Module):
    """Images or clips to features (published code: clip_model.py, clip_model_video.py; no output projection).

    Args:
        config: the sizes.
        execution: how it runs; shared with the network.
    """

    def __init__(self, config: SCLConfig, execution: Execution | None = None) -> None:
        super().__init__()
        self.execution = shared = execution or Execution()
        scale = config.width**-0.5
        self.max_frames, self.image_size = config.max_frames, config.image_size
        self.image_temporal = config.image_temporal
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.cls = nn.Parameter(scale * torch.randn(config.width))
        self.position = nn.Parameter(scale * torch.randn(1 + config.num_patches, config.width))
        self.temporal = (
            nn.Parameter(scale * torch.randn(config.max_frames, config.width)) if config.max_frames else None
        )
        self.mask_token = nn.Parameter(torch.randn(config.width)) if config.patch_mask_token else None
        self.norm_pre = LayerNorm(config.width, execution=shared)
        self.blocks = nn.ModuleList(
            PreNormBlock(config.width, config.mlp_ratio, config.vision_activation, shared)
            for _ in range(config.vision_layers)
        )
        self.norm_post = ResidualNorm(config.width, execution=shared)

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: Tensor | None = None,
        probabilities: list[Tensor] | None = None,
    ) -> VisionFeatures:
        """Encode images or clips.

        Args:
            images: (B, 3, S, S) or (B, F, 3, S, S), float.
            keep: (B, K) int64, patches that are embedded, the same in every frame; None = all.
            replace: (B, P) bool, patches that become the mask token, the same in every frame.
            probabilities: receives the (B, H, L, L) attention probabilities of each block (eager path), L = F * (1 + K)
                tokens frame by frame with each CLS first.

        Returns:
            The features.

        Raises:
            ValueError: wrong shape, more frames than the temporal table has, or no mask token to replace with.
        """
        x, frames = self.embed(images, keep=keep, replace=replace)
        x = self.encode(x, Padded(num_frames=frames), probabilities)
        if frames > 1:
            framed = x.unflatten(1, (frames, -1))
            x = torch.cat([framed[:, :, 0], framed[:, :, 1:].flatten(1, 2)], dim=1)
        return VisionFeatures(x, frames)

    def embed(self, images: Tensor, *, keep: Tensor | None = None, replace: Tensor | None = None) -> tuple[Tensor, int]:
        """Embed images or clips as the input of the first block.

        Args:
            images: as in ``forward``.
            keep: as in ``forward``.
            replace: as in ``forward``.

        Returns:
            The tokens (B, F * (1 + K), D), frame by frame with each CLS first, and F.

        Raises:
            ValueError: as in ``forward``.
        """
        if images.ndim == 4:
            images = images[:, None]
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 5 or tuple(images.shape[2:]) != expected:
            raise ValueError(
                f"images: got shape {tuple(images.shape)}, expected (B, 3, S, S) or (B, F, 3, S, S) with S = "
                f"{self.image_size}"
            )
        frames = images.shape[1]
        if frames > max(1, self.max_frames):
            raise ValueError(
                f"images: got {frames} frames, expected at most {max(1, self.max_frames)} (max_frames of the model)"
            )
        if replace is not None and self.mask_token is None:
            raise ValueError("replace: the model has no mask token for patches (patch_mask_token is False)")
        fused = self.execution.layer_norm == "sclkern"
        x = ops.embed_patches(
            images,
            self.patch_embed.weight,
            self.position,
            self.cls,
            temporal=self._temporal_table(frames),
            keep=keep,
            replace=replace,
            mask_token=self.mask_token if replace is not None else None,
            norm_weight=self.norm_pre.weight if fused else None,
            norm_bias=self.norm_pre.bias if fused else None,
            eps=self.norm_pre.eps,
            backend=self.execution.op_backend,
        )
        return x if fused else self.norm_pre(x), frames

    def _temporal_table(self, frames: int) -> Tensor | None:
        """Temporal positions from that of the first frame on."""
        if self.temporal is None or frames > 1 or self.image_temporal == "first":
            return self.temporal
        # A row of zeros in front, not None: DDP waits for a gradient of every parameter, which is 0 here.
        return nn.functional.pad(self.temporal, (0, 0, 1, 0))

    def encode(self, x: Tensor, layout: Layout, probabilities: list[Tensor] | None = None) -> Tensor:
        """Run the blocks and the last norm on embedded tokens in any layout.

        Args:
            x: (B, L, D) or packed (T, D).
            layout: of x.
            probabilities: receives the attention probabilities of each block; padded tokens only.

        Returns:
            Like x.
        """
        checkpoint = self.execution.checkpoint_blocks
        update: Tensor | None = None
        for block in self.blocks:
            x, update = run_block(block, x, update, layout, checkpoint=checkpoint, probabilities=probabilities)
            if checkpoint and update is not None:
                # A block then keeps one input tensor, not two.
                x, update = x + update, None
        return self.norm_post(x, update)
