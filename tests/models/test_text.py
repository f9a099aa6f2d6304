from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


def test_positions_start_after_the_pad_id_and_skip_padding(make_model, make_batch):
    model, batch = make_model(), make_batch(3)
    seen = []
    model.text.position.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.text(batch["text_ids"], batch["text_mask"])
    count = batch["text_mask"].cumsum(1) + 1
    assert seen[0].tolist() == count.where(batch["text_mask"], 1).tolist()


def test_a_masked_token_keeps_its_position(make_model, make_batch):
    model, batch = make_model(), make_batch(1)
    seen = []
    model.text.position.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    ids = batch["text_ids"].clone()
    model.text(ids, batch["text_mask"])
    ids[0, 3] = model.config.mask_id
    model.text(ids, batch["text_mask"])
    assert torch.equal(*seen)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_tokens_do_not_depend_on_the_padding_width(make_model, make_batch, backend):
    model, batch = make_model().set_backend(backend), make_batch(3)
    ids, mask = batch["text_ids"], batch["text_mask"]
    narrow = model.encode_text(ids, mask)
    wide = model.encode_text(F.pad(ids, (0, 4), value=1), F.pad(mask, (0, 4)))
    torch.testing.assert_close(wide[:, : ids.shape[1]][mask], narrow[mask], rtol=1e-10, atol=1e-12)


def test_tokens_do_not_depend_on_the_rest_of_the_batch(make_model, make_batch):
    model, batch = make_model(), make_batch(3)
    together = model.encode_text(batch["text_ids"], batch["text_mask"])
    for row in range(3):
        length = int(batch["text_mask"][row].sum())
        alone = model.encode_text(batch["text_ids"][row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-10, atol=1e-12)


def test_every_token_is_read_by_every_other(make_model, make_batch):
    model, batch = make_model(), make_batch(1, lengths=[6])
    before = model.encode_text(batch["text_ids"], batch["text_mask"])
    batch["text_ids"][0, 3] += 1
    changed = (model.encode_text(batch["text_ids"], batch["text_mask"]) - before).abs().amax(-1)
    assert (changed > 1e-6).all(), changed


def test_ids_and_mask_of_different_shapes_are_named(make_model, make_batch):
    batch = make_batch(2, lengths=[6, 6])
    with pytest.raises(ValueError, match=r"ids, mask: got shapes \(2, 6\) and \(2, 5\)"):
        make_model().encode_text(batch["text_ids"], batch["text_mask"][:, :5])


def test_a_caption_beyond_the_longest_is_refused(make_model, make_batch):
    batch = make_batch(1, lengths=[16], width=17)
    with pytest.raises(ValueError, match="ids: got 17 tokens, expected at most max_text_len 16"):
        make_model().encode_text(batch["text_ids"], batch["text_mask"])
