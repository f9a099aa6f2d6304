"""Exported models of the demo's tokenizer."""

from sclkern.data.tokenizer import CaptionTokenizer

TOKENIZER = CaptionTokenizer.from_pretrained("demo")


def export(make_model, folder, **changes):
    """A model as ``sclkern export`` writes it."""
    model = make_model(vocab_size=2048, mask_id=2047, **changes)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model
