"""A pre-training run of a second, and images for tables of pairs."""

import io

from PIL import Image

from sclkern.data.sources.arrow import write_pairs

# A model small enough to train for a few steps in a second, on the embedded data.
TINY = {
    "model.preset": "tiny",
    "model.vocab_size": 2048,
    "model.mask_id": 2047,
    "model.patch_size": 16,
    "run.batch_size": 8,
    "run.max_steps": 6,
    "run.log_every": 1,
    "run.save_every": 2,
    "optimizer.learning_rate": 1e-3,
    "evaluation.rerank": 2,
    "evaluation.train_images": 20,
    "evaluation.attention_images": 2,
    "data.val_split": "test",
}


def overrides(output, **changes):
    values = {**TINY, "run.output_dir": output, **{k.replace("__", "."): v for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


# Nearly no arithmetic, where only the course of a run is tested.
NO_LAYERS = {"model__text_layers": 0, "model__vision_layers": 0, "model__fusion_layers": 1}


def small_data(folder, count=24):
    """Changes of a run that trains and validates on ``count`` pairs, written to ``folder``."""
    write_pairs(folder / "t.arrow", rows(count))
    tables = {"data__train_tables": "[t]", "data__val_tables": "[t]", "data__val_split": "train"}
    return {"data__root": folder, **tables}


def image_file(color=(200, 30, 30), size=(40, 40)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def rows(count=40, split="train"):
    return [
        {
            "image": image_file((7 * i % 256, 40, 3 * i % 256)),
            "caption": [f"image number {i}"],
            "image_id": str(i),
            "split": split,
        }
        for i in range(count)
    ]
