"""ALIGN-BENCH: the reader beside what went in, the scores beside a computation of their own."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from exported_model import TOKENIZER, export
from PIL import Image

import look_alikes
from sclkern.cli import main
from sclkern.data.convert import Options, convert
from sclkern.data.transforms import build_transform
from sclkern.errors import UserError
from sclkern.tasks import align_bench
from sclkern.tasks.align_bench import (
    AlignBench,
    Regions,
    caption_words,
    evaluate_align_bench,
    region_score,
    score_picture,
)
from sclkern.training.opening import open_model


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def weights(length, grid):
    """(grid, length): each output is a sum over the inputs within the kernel, stretched by the factor of the shrink."""
    scale = length / grid
    stretch = max(scale, 1.0)
    rows = []
    for output in range(grid):
        centre = (output + 0.5) * scale
        row = [cubic((place + 0.5 - centre) / stretch) if abs(place + 0.5 - centre) < 2 * stretch else 0.0
               for place in range(length)]  # fmt: skip
        rows.append([weight / sum(row) for weight in row])
    return np.array(rows)


def score(a, pixels, grid=4):
    """sum(m a) / sum(a), from a set of (row, column) and the sizes of the picture."""
    inside, height, width = pixels
    m = np.array([[float((row, column) in inside) for column in range(width)] for row in range(height)])
    m = np.clip(weights(height, grid) @ m @ weights(width, grid).T, 0, 1)
    return sum(m[i, j] * a[i, j] for i in range(grid) for j in range(grid)) / sum(map(sum, a))


HEIGHT, WIDTH = 30, 47


def box_pixels(x1, y1, x2, y2):
    return {(row, column) for row in range(HEIGHT) for column in range(WIDTH) if y1 <= row < y2 and x1 <= column < x2}


def mask_of(pixels):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for row, column in pixels:
        mask[row, column] = True
    return mask


def regions(*pairs):
    return Regions(np.array([box for box, _ in pairs], dtype=float), np.stack([mask_of(pixels) for _, pixels in pairs]))


SMALL, OTHER, HUGE = (3, 5, 20, 17), (15, 10, 46, 29), (0, 0, 47, 28)  # the last covers 93 % of the picture
DISC = {(r, c) for r in range(HEIGHT) for c in range(WIDTH) if (r - 12) ** 2 + (c - 30) ** 2 < 60}
DOTS = {(2, 2), (29, 46), (15, 15)}


def test_the_scores_of_a_picture():
    generator = np.random.default_rng(0)
    attention = generator.random((8, 4, 4)) + 0.01
    words = [("a", [1]), ("red", [2, 3]), ("car", [4]), ("a", [5]), ("street", [6])]
    annotated = {
        "red car": regions((SMALL, DISC), (OTHER, DOTS)),
        "a": regions((OTHER, DOTS)),
        "street.": regions((HUGE, box_pixels(*HUGE))),
        "dog": regions((SMALL, DISC)),
    }
    found, missing = score_picture(attention, words, annotated)
    size = HEIGHT, WIDTH
    a = attention.tolist()

    def added(*tokens):
        return np.array([[sum(a[t][i][j] for t in tokens) for j in range(4)] for i in range(4)])

    both = box_pixels(*SMALL) | box_pixels(*OTHER)
    expected = {
        "global_box": score(added(0), (both, *size)),
        "global_mask": score(added(0), (DISC | DOTS, *size)),
        "local_box": np.mean(
            [
                score(added(2, 3, 4), (both, *size)),
                score(added(1), (box_pixels(*OTHER), *size)),
                score(added(6), (box_pixels(*HUGE), *size)),
                score(added(1), (box_pixels(*SMALL), *size)),
            ]
        ),
        "local_mask": np.mean(
            [
                score(added(2, 3, 4), (DISC | DOTS, *size)),
                score(added(1), (DOTS, *size)),
                score(added(6), (box_pixels(*HUGE), *size)),
                score(added(1), (DISC, *size)),
            ]
        ),
    }
    assert missing == 1
    # Pillow computes in float32.
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 3) for value in found.values()}) == 4


def test_only_background():
    attention = np.ones((3, 4, 4))
    found, _ = score_picture(attention, [("sky", [1])], {"sky": regions((HUGE, box_pixels(*HUGE)))})
    assert found["global_box"] == found["global_mask"] == 0 and found["local_box"] > 0.9
    assert score_picture(attention, [("sky", [1])], {}) == ({"global_box": 0.0, "global_mask": 0.0}, 0)


def test_a_score_of_extremes():
    a = np.random.default_rng(0).random((6, 6))
    assert region_score(a, np.ones((50, 40), dtype=bool)) == pytest.approx(1)
    assert region_score(a, np.zeros((50, 40), dtype=bool)) == 0
    assert region_score(torch.tensor(a), np.ones((3, 2), dtype=bool)) == pytest.approx(1)
    assert math.isnan(region_score(0 * a, np.ones((3, 2), dtype=bool)))
    half = np.zeros((60, 60), dtype=bool)
    half[:, :30] = True
    assert region_score(np.ones((6, 6)), half) == pytest.approx(0.5, abs=1e-2)


def test_words_are_without_full_stops_and_commas():
    caption = "A dog, a spanner. No!"
    ids = TOKENIZER([caption], 50)[0][0].tolist()
    words = caption_words(TOKENIZER, ids)
    assert [word for word, _ in words] == ["A", "dog", "a", "spanner", "No!"]
    used = [position for _, positions in words for position in positions]
    dropped = set(range(1, len(ids) - 1)) - set(used)
    assert sorted(TOKENIZER.decode([ids[position]]).strip() for position in dropped) == [",", "."]


@pytest.fixture
def tree(tmp_path):
    return look_alikes.align_bench(tmp_path / "set", count=5)


def test_what_is_read_is_what_was_annotated(tree, tmp_path):
    convert("align-bench", tree.root, tmp_path / "data", Options(), workers=1)
    bench = AlignBench(tmp_path / "data")
    assert len(bench) == 5
    for number, picture in enumerate(bench):
        content = pickle.loads((tree.root / "pkls" / f"{number}.pkl").read_bytes())
        assert picture.caption == content["caption"] and picture.image.size == (80, 64)
        assert list(picture.regions) == list(content["annotation"])
        for word, regions in content["annotation"].items():
            for place, region in enumerate(regions):
                assert picture.regions[word].boxes[place].tolist() == region["bbox_mask"]
                assert np.array_equal(picture.regions[word].masks[place], region["pixel_mask"])


def test_the_scores_of_a_model(tree, tmp_path, make_model):
    """Beside the attention that the model returns, gathered here in another way."""
    convert("align-bench", tree.root, tmp_path / "data", Options(), workers=1)
    bench, transform = AlignBench(tmp_path / "data"), build_transform("clip_test", 32)
    sizes = {"width": 128, "max_text_len": 32, "text_positions": 34}
    model = make_model(vocab_size=2048, mask_id=2047, dtype=torch.float32, **sizes).train()
    called = []
    result = evaluate_align_bench(model, bench, TOKENIZER, transform, between_pictures=lambda: called.append(1))
    assert model.training and len(called) == 5
    model.eval()
    totals = {name: [] for name in ("global_box", "global_mask", "local_box", "local_mask")}
    for picture in bench:
        ids, mask = TOKENIZER([picture.caption], 32)
        with torch.no_grad():
            image = model.encode_image(transform(picture.image)[None])
            fused = model.run_fusion(model.encode_text(ids, mask), mask, image, return_attention=True)
        a = fused.attentions[-1].text_to_image[0].double().numpy().max(0)[:, 1:].reshape(-1, 4, 4)
        words = picture.caption.split()
        # Words of a single token or several, each beginning with a space.
        starts = [place for place in range(1, ids.shape[1] - 1)
                  if place == 1 or TOKENIZER.decode([ids[0, place]]).startswith(" ")]  # fmt: skip
        ends = [*starts[1:], ids.shape[1] - 1]
        tokens = [[t for t in range(start, end) if TOKENIZER.decode([ids[0, t]]) != ","]
                  for start, end in zip(starts, ends, strict=True)]  # fmt: skip
        height, width = 64, 80
        local = {"box": [], "mask": []}
        union = {"box": set(), "mask": set()}
        for word, (boxes, masks) in picture.regions.items():
            place = words.index(word)
            x1, y1, x2, y2 = boxes[0]
            pixels = {
                "box": {(r, c) for r in range(height) for c in range(width) if y1 <= r < y2 and x1 <= c < x2},
                "mask": {(int(r), int(c)) for r, c in zip(*masks[0].nonzero(), strict=True)},
            }
            for form, inside in pixels.items():
                local[form].append(score(a[tokens[place]].sum(0), (inside, height, width)))
                union[form] |= inside
        for form in ("box", "mask"):
            totals[f"global_{form}"].append(score(a[0], (union[form], height, width)))
            totals[f"local_{form}"].append(np.mean(local[form]))
    scores = {name: value for name, value in result.scores.items() if not name.startswith("chance")}
    assert scores == pytest.approx({name: np.mean(values) for name, values in totals.items()}, rel=1e-5)
    assert result.scores["chance_global_box"] == pytest.approx((16 * 32 + 1 * 32) / (64 * 80), rel=0.2)
    assert (result.pictures, result.not_found, result.cut) == (5, 0, 0)


def test_what_cannot_be_used(tree, tmp_path, make_model):
    with pytest.raises(
        UserError, match=r"align_bench.arrow: no such table; sclkern data convert align-bench writes it"
    ):
        AlignBench(tmp_path)
    convert("align-bench", tree.root, tmp_path / "data", Options(), workers=1)
    model = make_model(vocab_size=2048, mask_id=2047, fusion_layers=0)
    with pytest.raises(UserError, match="has no fusion layer"):
        evaluate_align_bench(model, AlignBench(tmp_path / "data"), TOKENIZER, build_transform("clip_test", 32))
    Image.new("RGB", (64, 80)).save(tree.root / "images" / "0.jpg")  # lies on its side
    convert("align-bench", tree.root, tmp_path / "other", Options(), workers=1)
    with pytest.raises(UserError, match="row 0: a mask is 80 x 64, expected the size of the picture, 64 x 80; convert"):
        AlignBench(tmp_path / "other")[0]


def test_a_cut_caption_and_a_missing_word_are_counted(tree, tmp_path, make_model):
    for number in range(5):
        file = tree.root / "pkls" / f"{number}.pkl"
        content = pickle.loads(file.read_bytes())
        content["caption"] = "zebra " * (30 if number == 0 else 1)
        file.write_bytes(pickle.dumps(content))
    convert("align-bench", tree.root, tmp_path / "data", Options(), workers=1)
    model = make_model(vocab_size=2048, mask_id=2047)
    bench = AlignBench(tmp_path / "data")
    result = evaluate_align_bench(model, bench, TOKENIZER, build_transform("clip_test", 32))
    assert result.cut == 1 and result.words == result.not_found == sum(len(picture.regions) for picture in bench)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_processes_gives_the_same(tree, tmp_path, make_model, monkeypatch, ranks):
    convert("align-bench", tree.root, tmp_path / "data", Options(), workers=1)
    model = make_model(vocab_size=2048, mask_id=2047)
    arguments = model, AlignBench(tmp_path / "data"), TOKENIZER, build_transform("clip_test", 32)
    alone = evaluate_align_bench(*arguments)
    found = {}

    def of_all(entries):
        found.update(entries)
        return found

    monkeypatch.setattr(align_bench, "world_size", lambda: ranks)
    monkeypatch.setattr(align_bench, "merge", of_all)
    # The last of the ranks to come has the entries of all, in another order than one process.
    for rank in reversed(range(ranks)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        result = evaluate_align_bench(*arguments, distributed=True)
    assert result == alone and alone.pictures == 5


def test_the_command(tree, tmp_path, make_model, capsys):
    convert("align-bench", tree.root, tmp_path / "data", Options(), workers=1)
    export(make_model, tmp_path / "model", heads=())
    arguments = ["evaluate", "align-bench", "--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    assert main([*arguments, "--output", str(tmp_path / "out"), "run.device=cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = open_model(tmp_path / "model")
    expected = evaluate_align_bench(model, AlignBench(tmp_path / "data"), tokenizer, build_transform("clip_test", 32))
    counts = {"pictures": 5, "words": expected.words, "not_found": expected.not_found, "cut": expected.cut}
    assert printed == {**expected.scores, **counts}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    about = {"task": "align-bench", "recipe": "zero-shot", "tables": ["align_bench"]}
    assert {**written, **about, "values": expected.scores, **counts} == written
    assert {"model", "digest", "device", "commit"} <= set(written)
    for extra, problem in (
        (["--annotations", "x.json"], "--annotations: got x.json, but align-bench is scored by its table"),
        (["--split", "train"], "--split: got 'train', but align-bench has one table"),
        (["run.precision=bfloat16"], "run.precision: align-bench reads only run.device"),
        (["--output", str(tmp_path / "out" / "results.json")], "results.json is a file, expected a folder"),
    ):
        assert main([*arguments, *extra]) == 2
        assert problem in capsys.readouterr().err
