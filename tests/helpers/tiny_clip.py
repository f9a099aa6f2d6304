"""A small model of open_clip, and pairs for it."""

import open_clip
import torch

WIDTH = 16


def tiny_clip(seed=0, **options):
    torch.manual_seed(seed)
    return open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        output_dict=True,
        **options,
    )


def pairs(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, 16, 16, generator=generator)
    return images, torch.randint(1, 50, (rows, 8), generator=generator)
