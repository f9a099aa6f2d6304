"""SCL as a model of transformers: folders both ways, the processor, the loss, Trainer, the hub, and what is refused."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from ranks import environment
from torch.nn.functional import normalize

from sclkern import ObjectiveConfig, SCLConfig, SCLModel, UserError
from sclkern.data.images import decode_image
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform, normalize_images
from sclkern.integrations.transformers import SCLHFConfig, SCLHFModel, SCLImageProcessor, SCLProcessor

TEXTS = ["a dog <mask> on the grass", "two cats", "a bird in the blue sky over the sea"]
PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def pictures(count=3):
    levels = np.random.default_rng(0).integers(0, 256, (count, 50, 70, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in levels]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What ``sclkern export`` writes, of a tiny model."""
    path = tmp_path_factory.mktemp("exported")
    tokenizer = CaptionTokenizer.from_pretrained("demo")
    torch.manual_seed(0)
    config = SCLConfig.preset("tiny").replace(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
    SCLModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return SCLHFModel.from_pretrained(folder)


@pytest.fixture
def processor(folder):
    return SCLProcessor.from_pretrained(folder)


def weights(model):
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def assert_same_weights(actual, expected):
    actual, expected = weights(actual), weights(expected)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


# -- folders ---------------------------------------------------------------------------------------------------------


def test_folders_go_both_ways(folder, model, tmp_path):
    ours = SCLModel.from_pretrained(folder)
    assert_same_weights(model, ours)
    assert model.dtype == torch.float32 and not model.training
    assert model.model.config == ours.config
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_weights(SCLHFModel.from_pretrained(tmp_path), ours)
    back = SCLModel.from_pretrained(tmp_path)
    assert_same_weights(back, ours)
    assert back.config == ours.config


def test_dtypes(model, tmp_path):
    assert SCLHFModel.from_pretrained(model.name_or_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert SCLHFModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert SCLHFModel.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
    assert SCLModel.from_pretrained(tmp_path).modality.weight.dtype == torch.float32


def test_every_size_is_written(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert dataclasses.asdict(model.model.config).keys() <= written.keys()
    assert written["model_type"] == "sclkern"


def test_the_auto_classes_find_it(folder):
    assert type(transformers.AutoConfig.from_pretrained(folder)) is SCLHFConfig
    for auto in (transformers.AutoModel, transformers.AutoModelForZeroShotImageClassification):
        assert type(auto.from_pretrained(folder)) is SCLHFModel
    assert type(transformers.AutoProcessor.from_pretrained(folder)) is SCLProcessor


def test_parts_that_no_file_has_are_drawn_as_in_a_new_network(folder):
    model = SCLHFModel.from_pretrained(folder, heads=["itm", "mlm", "itc", "vqa"], max_frames=2)
    first, norm = model.model.vqa_head[0], model.model.vqa_head[1]
    assert 0.015 < first.weight.std().item() < 0.025 and not first.bias.any()
    assert bool((norm.weight == 1).all()) and model.model.vision.temporal.std().item() > 0.05
    fresh = SCLHFModel(SCLHFConfig(**dataclasses.asdict(SCLConfig.preset("tiny"))))
    torch.manual_seed(0)
    expected = SCLModel(SCLConfig.preset("tiny"))
    torch.manual_seed(0)
    assert_same_weights(SCLHFModel(fresh.config), expected)


def test_a_fresh_process_without_a_network(folder, processor, tmp_path):
    """By the lines of the page."""
    first = BLOCKS[0]
    assert len(re.findall(r".+", first)) <= 10
    processor.save_pretrained(tmp_path / "processor")
    options = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "nothing"))
    run = [sys.executable, "-c", first]
    done = subprocess.run(run, env=options, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[{'score': ")
    assert "not supported" not in done.stderr and "not available" not in done.stderr


def test_pushed_to_a_hub_and_loaded_from_it(model, processor, tmp_path, monkeypatch):
    """A stub of the hub: a folder that commits are written to, and files come from."""
    hub = tmp_path / "hub"

    def create_repo(repo_id, **options):
        (hub / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Repository", (), {"repo_id": repo_id})()

    def create_commit(repo_id, operations, **options):
        for operation in operations:
            (hub / repo_id / operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())

    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("# A model\n")})
    stubs = {"create_repo": create_repo, "create_commit": create_commit}
    stubs["create_and_tag_model_card"] = lambda *args, **options: card()
    # Newer versions call methods of a client, older ones functions that some modules have imported.
    for name in ("create_repo", "create_commit"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, staticmethod(stubs[name]))
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
        for name in stubs.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, stubs[name])
    model.push_to_hub("someone/scl")
    processor.push_to_hub("someone/scl")
    names = set(os.listdir(hub / "someone" / "scl"))
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert_same_weights(transformers.AutoModel.from_pretrained(hub / "someone" / "scl"), model)
    assert type(transformers.AutoProcessor.from_pretrained(hub / "someone" / "scl")) is SCLProcessor


# -- the processor ---------------------------------------------------------------------------------------------------


def test_pixels_are_those_of_retrieval(folder, processor, tmp_path):
    """To the bit, of a file as of a picture: retrieval decodes a large JPEG at a part of its size."""
    transform = build_transform("clip_test", 32, normalize=False)
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    large.save(tmp_path / "large.jpg")
    large.convert("RGBA").rotate(20).save(tmp_path / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures()[0].save(tmp_path / "turned.png", exif=exif)
    pictures()[1].save(tmp_path / "plain.png")
    large.convert("L").save(tmp_path / "grey.png")
    files = [tmp_path / f"{name}" for name in ("large.jpg", "transparent.png", "turned.png", "plain.png", "grey.png")]
    expected = torch.stack([normalize_images(transform(transform.decode(file.read_bytes()))) for file in files])
    for given in (files, [str(file) for file in files], [file.read_bytes() for file in files]):
        assert torch.equal(processor(images=given).pixel_values, expected)
    opened = processor(images=[Image.open(file) for file in files[1:]]).pixel_values
    assert torch.equal(opened, expected[1:])
    levels = np.array(decode_image(files[3].read_bytes()))
    for form in (levels, torch.from_numpy(levels), levels.transpose(2, 0, 1)):
        assert torch.equal(processor(images=form).pixel_values, expected[3:4])


def test_texts_are_those_of_retrieval(processor):
    ids, mask = CaptionTokenizer.from_pretrained("demo")(TEXTS, 16)
    batch = processor(text=TEXTS)
    assert torch.equal(batch.input_ids, ids) and torch.equal(batch.attention_mask.bool(), mask)
    # Whoever calls the tokenizer itself, as the pipeline does, gets the same.
    alone = processor.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert alone.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(alone.input_ids, ids) and torch.equal(alone.attention_mask.bool(), mask)
    long = processor(text="a dog " * 30)
    assert long.input_ids.shape == (1, 16) and long.input_ids[0, -1] == 2
    assert torch.equal(
        processor.tokenizer(["a dog " * 30], truncation=True, return_tensors="pt").input_ids, long.input_ids
    )
    padded = processor(text=TEXTS[:1], padding="max_length", return_tensors="np")
    assert padded["input_ids"].shape == (1, 16) and padded["input_ids"][0, -1] == 1
    assert padded["attention_mask"][0, -1] == 0


def test_the_processor_is_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for loaded in (SCLProcessor.from_pretrained(tmp_path), transformers.AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is SCLProcessor and type(loaded.image_processor) is SCLImageProcessor
        assert (loaded.max_text_len, loaded.image_processor.size) == (16, {"height": 32, "width": 32})
        again, expected = (one(images=pictures(), text=TEXTS) for one in (loaded, processor))
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        assert loaded.tokenizer(["a"]).keys() == {"input_ids", "attention_mask"}
    assert processor.batch_decode(processor(text=["two cats"]).input_ids, skip_special_tokens=True) == [" two cats"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "images, text: got neither"),
        ({"text": ""}, "gives no token"),
        (
            {"images": ["a dog"], "text": pictures(1)[0]},
            r"text: got Image, expected a str or a list .*images come first",
        ),
        ({"text": "a dog " * 30, "truncation": False}, r"text: got \d+ tokens, expected at most 16"),
        ({"text": "a", "max_length": 99}, "max_length: got 99, expected at most max_text_len 16"),
        ({"text": "a", "padding": False}, "padding: got False"),
        ({"text": "a", "return_tensors": "tf"}, "return_tensors: got 'tf'"),
        ({"images": "a dog"}, r"images: 'a dog' \(row 0\) cannot be read"),
        ({"images": [np.zeros((4, 4, 3))]}, r"images: got torch.float64 of shape \(4, 4, 3\)"),
        ({"images": [[1]]}, "images: got list"),
        ({"images": []}, "images: got none"),
    ],
)
def test_what_the_processor_refuses(call, message, processor):
    with pytest.raises(UserError, match=message):
        processor(**call)


def test_processors_that_cannot_be_made(folder, model, tmp_path):
    SCLModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"has no tokenizer.json, expected the tokenizer of the model beside it; name it"
    ):
        SCLProcessor.from_pretrained(tmp_path)
    assert SCLProcessor.from_pretrained(tmp_path, tokenizer=folder).max_text_len == 16
    SCLModel(SCLConfig.preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer: has vocab_size 2048, the model of .* was trained with 120"):
        SCLProcessor.from_pretrained(tmp_path, tokenizer="demo")
    with pytest.raises(UserError, match=r"size: got {'shortest_edge': 32}"):
        SCLImageProcessor({"shortest_edge": 32})
    with pytest.raises(UserError, match="do_resize: unknown option"):
        SCLImageProcessor(32)(pictures(), do_resize=False)


# -- the model -------------------------------------------------------------------------------------------------------


def test_logits_are_the_similarity_of_the_contrast(folder, model, processor):
    batch = processor(images=pictures(2), text=TEXTS)
    ours = SCLModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(**batch)
        text = ours.encode_text(batch.input_ids, batch.attention_mask)
        projected = ours.project(text[:, 0], ours.encode_image(batch.pixel_values).cls)
        # Without a mask, padding is what has the id of padding; and it may stand before the tokens.
        ids = torch.stack([row.roll(int((row == 1).sum())) for row in batch.input_ids])
        assert_close(model(ids, batch.pixel_values).logits_per_image, out.logits_per_image)
        types = torch.zeros_like(batch.input_ids)
        assert_close(model(**batch, token_type_ids=types, return_dict=False)[0], out.logits_per_image)
    text, image = (normalize(features, dim=-1) for features in projected)
    assert_close(out.logits_per_image, image @ text.T / ours.contrast_temperature())
    assert_close(out.logits_per_text, out.logits_per_image.T)
    assert_close(out.text_embeds, text)
    assert_close(out.image_embeds, image)
    assert_close(model.get_text_features(batch.input_ids, batch.attention_mask).pooler_output, projected[0])
    features = model.get_image_features(batch.pixel_values)
    assert_close(features.pooler_output, projected[1])
    assert features.last_hidden_state.shape == (2, 17, 64)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_logits_in_half_precision(model, processor):
    batch = processor(images=pictures(2), text=TEXTS)
    with torch.no_grad():
        expected = model(**batch).logits_per_image
        with torch.autocast("cpu", torch.bfloat16):
            automatic = model(**batch).logits_per_image
        half = model.to(torch.bfloat16)(**batch).logits_per_image
    for actual in (automatic, half):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=0.3, rtol=0.05)


def test_the_pipeline(folder, processor, tmp_path):
    model = SCLHFModel.from_pretrained(folder)
    classify = transformers.pipeline(
        "zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )  # fmt: skip
    found = classify(pictures(1), candidate_labels=TEXTS, hypothesis_template="{}")[0]
    with torch.no_grad():
        expected = model(**processor(images=pictures(1), text=TEXTS)).logits_per_image.softmax(-1)[0]
    assert [one["score"] for one in found] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
    assert found[0]["label"] == TEXTS[int(expected.argmax())]


@pytest.mark.parametrize("objectives", [None, {"recipe": ["itc"], "same_image": "negative"}])
def test_the_loss_is_that_of_the_recipe(objectives, folder, processor):
    model = SCLHFModel.from_pretrained(folder, objectives=objectives or {}, dropout=0.0)
    ours = SCLModel.from_pretrained(folder, objectives=ObjectiveConfig(**(objectives or {})), dropout=0.0)
    batch = processor(images=pictures(), text=TEXTS)
    ids = torch.tensor([1, 1, 2])
    inputs = {
        "image": batch.pixel_values,
        "text_ids": batch.input_ids,
        "text_mask": batch.attention_mask,
        "image_id": ids,
    }
    expected = ours(inputs, seed=7)
    out = model.train()(**batch, image_id=ids, seed=7)
    assert out.keys() == {"loss", "losses"}
    assert torch.equal(out.loss, expected.total)
    assert out.losses.keys() == expected.losses.keys()
    expected.total.backward()
    out.loss.backward()
    for (name, parameter), (_, same) in zip(model.model.named_parameters(), ours.named_parameters(), strict=True):
        assert (parameter.grad is None and same.grad is None) or torch.equal(parameter.grad, same.grad), name
    evaluated = model.eval()(**batch, image_id=ids, seed=7, return_loss=True)
    assert torch.equal(evaluated.loss, expected.total) and evaluated.logits_per_image.shape == (3, 3)
    assert model(**batch).loss is None


def test_checkpointing_recomputes_blocks(model, processor):
    batch = processor(images=pictures(), text=TEXTS)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        model._set_gradient_checkpointing(enable)
        assert model.model.step.checkpoint_blocks == model.model.execution.checkpoint_blocks == enable
        model.train()(**batch, seed=1).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*grads)
    model.gradient_checkpointing_disable()
    assert not model.model.step.checkpoint_blocks
    model.gradient_checkpointing_enable()
    assert model.model.step.checkpoint_blocks
    with pytest.raises(UserError, match="every_n_layers: got 2"):
        model._set_gradient_checkpointing(every_n_layers=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"input_ids": None}, UserError, "input_ids: got None, expected texts and images"),
        ({"pixel_values": None}, UserError, "pixel_values: got None"),
        ({"pixel_values": torch.zeros(3, 3, 64, 64)}, ValueError, r"pixel_values: got shape .* S = 32"),
        ({"pixel_values": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, TypeError, "pixel_values: got torch.uint8"),
        ({"input_ids": torch.zeros(3, 17, dtype=torch.int64), "attention_mask": None}, ValueError, "max_text_len 16"),
        ({"attention_mask": torch.ones(3, 2)}, ValueError, "input_ids, attention_mask: got shapes"),
        ({"token_type_ids": torch.ones(3, 4, dtype=torch.int64)}, ValueError, "token_type_ids: got 1"),
        ({"output_attentions": True}, UserError, "output_attentions: got True.*sclkern visualize"),
        ({"output_hidden_states": True}, UserError, "output_hidden_states: got True"),
        ({"return_loss": True, "pixel_values": torch.zeros(2, 3, 32, 32)}, ValueError, "got 3 texts and 2 images"),
    ],
)
def test_what_the_model_refuses(call, error, message, model, processor):
    with pytest.raises(error, match=message):
        model(**{**processor(images=pictures(), text=TEXTS), **call})


def test_what_a_configuration_refuses(folder, model, tmp_path):
    with pytest.raises(UserError, match="widht: unknown option, did you mean 'width'"):
        SCLHFConfig(widht=64)
    with pytest.raises(UserError, match="width: got 65"):
        SCLHFConfig(hidden_size=65)
    with pytest.raises(UserError, match="objectives: unknown option 'recipes', did you mean 'recipe'"):
        SCLHFConfig(objectives={"recipes": "scl"})
    with pytest.raises(UserError, match="tie_word_embeddings: got True"):
        SCLHFConfig(tie_word_embeddings=True)
    with pytest.raises(UserError, match="resize_token_embeddings: SCL's vocabulary is fixed"):
        model.resize_token_embeddings(3000)
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()
    with pytest.raises(UserError, match=r"attn_implementation: got 'sdpa', expected none.*set_backend"):
        SCLHFModel.from_pretrained(folder, attn_implementation="sdpa")
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="describes 'bert', expected a folder of SCLModel or SCLHFModel"):
        SCLHFModel.from_pretrained(tmp_path)
    without = SCLHFModel.from_pretrained(folder, heads=["itm", "mlm"])
    with pytest.raises(UserError, match=r"heads: the model has \['itm', 'mlm'\], features and logits need 'itc'"):
        without.get_image_features(torch.zeros(1, 3, 32, 32))


# -- Trainer ---------------------------------------------------------------------------------------------------------


def test_trainer_by_the_lines_of_the_page(folder, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")  # of the extra "test"; the machine with a GPU lacks it
    code = BLOCKS[1]
    assert len(re.findall(r".+", code)) <= 10
    monkeypatch.chdir(tmp_path)
    rows = [{"image": picture, "text": text} for picture, text in zip(pictures(), TEXTS, strict=True)] * 2
    names = {"folder": str(folder), "rows": rows, "__name__": "example"}
    exec(compile(code, "example", "exec"), names)
    trainer = names["trainer"]
    assert np.isfinite(next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry))
    metrics = trainer.evaluate(rows[:3])
    assert np.isfinite(metrics["eval_loss"])
    assert_same_weights(SCLModel.from_pretrained(tmp_path / "trained"), trainer.model)


def test_trainer_divides_the_loss_by_its_micro_batches(folder, processor, tmp_path):
    pytest.importorskip("accelerate")  # likewise
    rows = [dict(zip(("image", "text"), pair, strict=True)) for pair in zip(pictures(2), TEXTS[:2], strict=True)]

    def collate(rows):
        batch = processor(images=[row["image"] for row in rows], text=[row["text"] for row in rows])
        return {**batch, "return_loss": True}

    logged = {}
    for accumulation in (1, 2):
        model = SCLHFModel.from_pretrained(folder, dropout=0.0, objectives={"recipe": ["itc"]})
        arguments = transformers.TrainingArguments(
            str(tmp_path), remove_unused_columns=False, per_device_train_batch_size=2, max_steps=1, report_to=[],
            gradient_accumulation_steps=accumulation, logging_steps=1, use_cpu=True, save_strategy="no",
            max_grad_norm=0.0, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows * accumulation, data_collator=collate)
        trainer.train()
        logged[accumulation] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged[2] == pytest.approx(logged[1], abs=1e-3)
