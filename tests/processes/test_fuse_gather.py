"""CLIP's loss over ranks: by ``fuse(model, gather="exact")`` that of one big batch, however the model is called.

``python test_fuse_gather.py RANK WORLD FOLDER`` is the program of each rank.
"""

import pytest
import torch
import transformers
from ranks import be_rank, run_ranks

import sclkern
from sclkern import UserError

ROWS = 6
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
TEXT = {
    **SIZES,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "eos_token_id": 3,
    "bos_token_id": 2,
    "pad_token_id": 1,
}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}


def clip(gather, **config):
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, **config)).double()
    if gather != "theirs":
        sclkern.fuse(model, only="completion_loss", gather=gather)
    return model


def batch(rows):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 50, (ROWS, 6), generator=generator)
    ids[:, 5] = 3
    images = torch.randn(ROWS, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"input_ids": ids[rows], "pixel_values": images[rows]}


def results(model, inputs):
    """The loss, and every gradient, averaged as DDP does."""
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if torch.distributed.is_initialized():
        for tensor in found.values():
            torch.distributed.all_reduce(tensor)
            tensor /= torch.distributed.get_world_size()
    return found


def work(rank, world, folder):
    mine = batch(slice(rank * ROWS // world, (rank + 1) * ROWS // world))
    tuples = clip("exact")(*mine.values(), None, None, True, return_dict=False)[0].detach()
    return {"exact": results(clip("exact"), mine), "own": results(clip(None), mine), "tuple": tuples}


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_is_that_of_one_big_batch(world, tmp_path):
    expected = results(clip("theirs"), batch(slice(None)))
    for found in run_ranks(__file__, world, tmp_path):
        assert found["exact"].keys() == expected.keys()
        for name, truth in expected.items():
            torch.testing.assert_close(found["exact"][name], truth, atol=1e-10, rtol=1e-6, msg=name)
        torch.testing.assert_close(found["tuple"], expected["loss"])
        alone = torch.allclose(found["own"]["loss"], expected["loss"], atol=1e-6)
        assert alone == (world == 1)


def test_what_cannot_be_gathered():
    with pytest.raises(UserError, match="gather: got 'all', expected 'exact', 'published' or None"):
        clip("all")
    layer = torch.nn.TransformerEncoderLayer(64, 2, batch_first=True)
    with pytest.raises(
        UserError, match="gather: got 'exact', but this TransformerEncoderLayer has no contrastive loss"
    ):
        sclkern.fuse(layer, gather="exact")
    report = sclkern.fuse(clip("theirs"), gather="exact")
    assert "features of all ranks (exact)" in str(report)


if __name__ == "__main__":
    be_rank(work)
