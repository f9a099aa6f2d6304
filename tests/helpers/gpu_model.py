"""A model and a batch on the GPU, without the data code, which needs more packages than a GPU machine may have."""

import torch

from sclkern import ObjectiveConfig, SCLConfig, SCLModel


def make(recipe="glscl", preset="tiny", rows=8, length=12, seed=0, frames=None, **changes):
    """Model in training mode and batch, both float32; clips of ``frames`` frames if given."""
    torch.manual_seed(seed)
    config = SCLConfig.preset(preset).replace(**changes)
    model = SCLModel(config, ObjectiveConfig(recipe=recipe)).cuda()
    ids = torch.randint(5, config.vocab_size - 1, (rows, length))
    lengths = torch.randint(3, length + 1, (rows,))
    column = torch.arange(length)
    ids[:, 0] = 0
    ids = torch.where(column == lengths[:, None] - 1, 2, torch.where(column >= lengths[:, None], 1, ids))
    samples = (rows,) if frames is None else (rows, frames)
    image = torch.randn(*samples, 3, config.image_size, config.image_size)
    return model, {"image": image.cuda(), "text_ids": ids.cuda(), "text_mask": (ids != 1).cuda()}
