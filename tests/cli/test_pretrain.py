"""``sclkern pretrain`` as a user meets it: what a run leaves behind, and one line for each mistake."""

import json

import matplotlib.image
import pytest
import torch
import yaml

from sclkern import SCLConfig, SCLModel
from sclkern.cli import main
from sclkern.data.sources.arrow import write_pairs
from tiny_run import overrides, rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a tiny run that went to its end."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", *overrides(directory, run__val_every=3)]) == 0
    return directory


def test_a_run_leaves_what_it_promises(finished):
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    expected = {"config.yaml", "metrics.jsonl", "losses.png", "attention.png", "report.md"}
    expected |= {"checkpoints/latest.pt", "checkpoints/best.pt", "model/config.json", "model/model.safetensors"}
    assert expected <= names
    assert any(name.startswith("tensorboard/events") for name in names)


def test_metrics_hold_every_step_and_validation(finished):
    chosen, *metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    expected = {"backend": "auto", "layer_norm": "sclkern", "optimizer": "adamw"}
    assert chosen == {"kind": "run", "step": 0, **expected}
    assert [(m["kind"], m["step"]) for m in metrics] == [
        ("train", 1), ("train", 2), ("train", 3), ("val", 3), ("train", 4), ("train", 5), ("train", 6), ("val", 6),
    ]  # fmt: skip
    assert all(m[name] > 0 for m in metrics for name in ("total", "itm", "mlm", "itc", "mvsc", "mlsc"))
    assert all(m[name] > 0 for m in metrics if m["kind"] == "train" for name in ("pairs_per_second", "data_seconds"))


def test_report_has_first_and_last_losses_and_recalls(finished):
    report = (finished / "report.md").read_text()
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    train = [m for m in metrics if m["kind"] == "train"]
    for name, title in (("mvsc", "MVSC, masked vision completion"), ("total", "total")):
        assert f"| {title} | {train[0][name]:.3f} | {train[-1][name]:.3f} | {metrics[-1][name]:.3f} |" in report
    for gallery in ("held-out, 119 images", "training, 20 images"):
        for direction in ("image to text", "text to image"):
            for method in ("ITC", "ITM", "chance"):
                assert any(gallery in r and direction in r and f"| {method} |" in r for r in report.splitlines())


def test_plots_are_not_blank(finished):
    for name in ("losses.png", "attention.png"):
        pixels = matplotlib.image.imread(finished / name)
        assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.05, name


def test_the_saved_configuration_repeats_the_run(finished, tmp_path):
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["model"]["width"] == 64 and saved["objectives"]["recipe"] == "scl"
    output = tmp_path / "again"
    assert main(["pretrain", "--config", str(finished / "config.yaml"), f"run.output_dir={output}"]) == 0
    first, second = SCLModel.from_pretrained(finished / "model"), SCLModel.from_pretrained(output / "model")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_finished_run_is_reported_again(finished):
    before = (finished / "report.md").read_text()
    (finished / "report.md").unlink()
    assert main(["pretrain", *overrides(finished, run__val_every=3), "--resume"]) == 0
    assert (finished / "report.md").read_text() == before


def test_starting_from_the_weights_of_a_run(finished, tmp_path, capsys):
    args = overrides(tmp_path / "next", weights__pretrained=finished / "model", run__max_steps=1)
    assert main(["pretrain", *args]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"objectives__recipe": "glscl"},
        {"objectives__itm_negatives": "hard"},
        {"run__precision": "bfloat16"},
        {
            "objectives__recipe": "glscl", "optimizer__no_decay": "published",
            **{
                f"objectives__{name}": "published"
                for name in ("negatives", "gather", "directions", "text_mask", "mlm_mask", "itm_negatives",
                             "frame_norm", "itc_temperature", "empty_selections")
            },
            "step__share_encodings": "none", "step__pack": False, "step__prune_last_layer": False,
            "step__absorb": "never",
        },
    ],
    ids=["glscl", "hard negatives", "bfloat16", "published"],
)  # fmt: skip
def test_other_recipes_and_precisions_train(tmp_path, options):
    assert main(["pretrain", *overrides(tmp_path / "run", run__max_steps=3, **options)]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 3 and 0 < last["total"] < 40
    assert ("mltc" in last) == ("objectives__recipe" in options)


def test_overrides_may_stand_on_both_sides_of_an_option(finished, capsys):
    before, after = overrides(finished, run__val_every=3)[:5], overrides(finished, run__val_every=3)[5:]
    assert main(["pretrain", *before, "--resume", *after]) == 0


@pytest.fixture
def fails(tmp_path, capsys):
    """fails(pattern, section__key=value ...): the run ends with status 2 and one line that holds the patterns."""

    def check(*patterns, args=(), **changes):
        output = changes.pop("run__output_dir", tmp_path / "run")
        status = main(["pretrain", *overrides(output, **changes), *args])
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("sclkern pretrain: error: ")]
        assert (status, len(errors)) == (2, 1), lines
        assert errors[0] == lines[-1] and not any("Traceback" in line for line in lines)
        for pattern in patterns:
            assert pattern in errors[0], errors[0]

    return check


def data(tmp_path, pairs, name="mine", **changes):
    write_pairs(tmp_path / f"{name}.arrow", pairs)
    return {
        "data__root": tmp_path, "data__train_tables": f"[{name}]", "data__val_tables": f"[{name}]",
        "data__val_split": "train", "evaluation__train_images": 0, **changes,
    }  # fmt: skip


def test_missing_arrow_file(fails, tmp_path):
    write_pairs(tmp_path / "other.arrow", rows(2))
    fails("mine.arrow", "other", data__root=tmp_path, data__train_tables="[mine]")


def test_unreadable_arrow_file(fails, tmp_path):
    (tmp_path / "mine.arrow").write_bytes(b"ARROW1\0\0 and then nothing")
    fails("mine.arrow", data__root=tmp_path, data__train_tables="[mine]")


def test_arrow_file_cut_short(fails, tmp_path):
    settings = data(tmp_path, rows())
    content = (tmp_path / "mine.arrow").read_bytes()
    (tmp_path / "mine.arrow").write_bytes(content[: len(content) // 2])
    fails("mine.arrow", **settings)


def test_wrong_columns(fails, tmp_path):
    import pyarrow as pa

    table = pa.table({"image": [b"x"], "text": ["a"]})
    with pa.ipc.new_file(str(tmp_path / "mine.arrow"), table.schema) as writer:
        writer.write_table(table)
    fails("mine.arrow", "caption", data__root=tmp_path, data__train_tables="[mine]", data__train_split="null")


def test_empty_split(fails, tmp_path):
    fails("'dev'", "train", **data(tmp_path, rows(), data__train_split="dev"))


@pytest.mark.parametrize("caption", ["", "  \t"])
def test_caption_without_tokens(fails, tmp_path, caption):
    pairs = rows()
    pairs[3]["caption"] = [caption]
    fails("mine.arrow", "3", "caption", **data(tmp_path, pairs))


def test_more_than_one_percent_undecodable(fails, tmp_path):
    pairs = rows()
    pairs[5]["image"] = pairs[6]["image"] = b"no image"
    fails("2 of 40 images cannot be decoded", "mine.arrow row ", "1 %", **data(tmp_path, pairs, run__max_steps=20))


def test_a_few_undecodable_are_counted_and_named(tmp_path, caplog):
    pairs = rows(120)
    pairs[5]["image"] = b"no image"
    write_pairs(tmp_path / "good.arrow", rows(8))
    settings = data(tmp_path, pairs, run__max_steps=15, data__val_tables="[good]")
    assert main(["pretrain", *overrides(tmp_path / "run", **settings)]) == 0
    assert sum("mine.arrow row 5 (5)" in r.getMessage() for r in caplog.records if r.name == "sclkern.data") == 1
    assert "Undecodable training images, skipped: 1" in (tmp_path / "run" / "report.md").read_text()


def test_too_little_data_for_a_batch(fails, tmp_path):
    fails("8", "3", **data(tmp_path, rows(3)))


def test_width_not_a_multiple_of_64(fails):
    fails("model.width: got 100, expected a positive multiple of 64", model__width=100)


def test_unknown_key(fails):
    fails("unknown key 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'?", optimizer__learning_rat=1)


def test_cuda_graphs_without_a_gpu(fails):
    fails("cuda_graphs: needs a GPU, the device is cpu", run__cuda_graphs=True, run__device="cpu")


def test_a_tokenizer_of_another_vocabulary(fails):
    fails("model.vocab_size: got 120, the tokenizer 'demo' has 2048", model__vocab_size=120, model__mask_id=119)


def test_weights_of_another_architecture(fails, tmp_path):
    model = SCLModel(SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047, text_layers=1, patch_size=16))
    model.save_pretrained(tmp_path / "model")
    fails("text.blocks.1", weights__pretrained=tmp_path / "model")


def test_weights_cut_short(fails, tmp_path):
    model = SCLModel(SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047, patch_size=16))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    fails("model.safetensors", "cut short", weights__pretrained=tmp_path / "model")


def test_output_directory_not_writable(fails, tmp_path):
    (tmp_path / "file").write_text("")
    fails("run.output_dir", "file/run", "Not a directory", run__output_dir=tmp_path / "file" / "run")


@pytest.mark.parametrize("device", ["tpu9", "meta"])
def test_an_unknown_device(fails, device):
    fails(f"device: got '{device}'", run__device=device)


def test_one_pair_has_no_negative_image(fails, tmp_path):
    fails("run.batch_size: got 1, expected 2 or more", run__batch_size=1)
    settings = data(tmp_path, rows(20))
    write_pairs(tmp_path / "one.arrow", rows(1))
    fails("data.val_tables: got 1 pair, expected 2 or more", **{**settings, "data__val_tables": "[one]"})


def test_a_recipe_the_model_cannot_train(fails):
    fails("patch_mask_token", "glscl", objectives__recipe="glscl", model__patch_mask_token="false")
    fails("heads", "['itc', 'mlm']", model__heads="[itm]")


def test_undecodable_held_out_images_stop_the_run_and_keep_the_weights(fails, tmp_path):
    pairs = rows()
    write_pairs(tmp_path / "bad.arrow", [{**pair, "image": b"no image"} for pair in pairs[:2]] + pairs[2:])
    fails("2 of 40 images cannot be decoded", "bad.arrow row 0", **data(tmp_path, pairs, data__val_tables="[bad]"))
    assert (tmp_path / "run" / "checkpoints" / "latest.pt").exists()


def test_a_few_undecodable_held_out_images_are_counted(tmp_path):
    pairs = rows(120)
    write_pairs(tmp_path / "bad.arrow", [{**pairs[0], "image": b"no image"}, *pairs[1:]])
    settings = data(tmp_path, pairs, data__val_tables="[bad]")
    assert main(["pretrain", *overrides(tmp_path / "run", run__max_steps=1, **settings)]) == 0
    assert "Undecodable held-out images, skipped: 1" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("name", ["report.md", "losses.png", "tensorboard"])
def test_a_file_that_cannot_be_written(fails, tmp_path, name):
    if name == "tensorboard":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text("a file where a folder should be")
    else:
        (tmp_path / "run" / name).mkdir(parents=True)  # a folder where a file should be
    fails(name)


def test_a_report_without_metrics(finished, tmp_path):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(["pretrain", *overrides(tmp_path / "run", run__val_every=3), "--resume"]) == 0


def test_a_started_run(fails, finished):
    fails("already holds a run; add --resume", run__output_dir=finished)
