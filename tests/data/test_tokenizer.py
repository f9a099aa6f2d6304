from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from sclkern.data import demo_root, open_pairs
from sclkern.data.tokenizer import CaptionTokenizer, main, train_tokenizer
from sclkern.errors import UserError

DEMO = CaptionTokenizer.from_pretrained("demo")


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def edited_demo(path: Path, **changes: object) -> Path:
    shutil.copytree(demo_root() / "tokenizer", path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.update(changes)
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


def test_demo_special_ids() -> None:
    assert (DEMO.vocab_size, DEMO.bos_id, DEMO.pad_id, DEMO.eos_id, DEMO.mask_id) == (2048, 0, 1, 2, 2047)


def test_batch_layout() -> None:
    ids, mask = DEMO(["a cat", "hammer and wrench, spanner, tool"], 50)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.shape == mask.shape and mask[1].all() and not mask[0].all()
    assert (ids[:, 0] == DEMO.bos_id).all()
    assert (ids[~mask] == DEMO.pad_id).all() and not (ids[mask] == DEMO.pad_id).any()
    for row, on in zip(ids, mask, strict=True):
        assert row[on][-1] == DEMO.eos_id
    padded, padded_mask = DEMO(["a cat", "hammer and wrench, spanner, tool"], 50, pad_to=50)
    assert padded.shape == (2, 50)
    assert torch.equal(padded[:, : ids.shape[1]], ids) and torch.equal(padded_mask.sum(1), mask.sum(1))
    assert (padded[:, ids.shape[1] :] == DEMO.pad_id).all()


@given(st.text(min_size=1), st.integers(3, 8))
def test_truncation_keeps_the_end(caption: str, max_length: int) -> None:
    whole = DEMO([caption], 10_000)[0][0].tolist()
    cut = DEMO([caption], max_length)[0][0].tolist()
    assert cut == (whole if len(whole) <= max_length else [*whole[: max_length - 1], DEMO.eos_id])


@settings(max_examples=300)
@given(st.text(min_size=1) | st.text("🤖👩‍🔬é <>maskpd/s\t ", min_size=1))
def test_tokens_decode_to_the_caption(caption: str) -> None:
    text = DEMO.decode(DEMO([caption], 10_000)[0][0])
    assert text in (caption, f" {caption}")


@pytest.mark.parametrize("literal", ["<mask>", "<pad>", "<s>", "</s>", "<unk>"])
def test_special_tokens_in_captions_are_text(literal: str) -> None:
    for tokenizer in (DEMO, pickle.loads(pickle.dumps(DEMO))):
        DEMO.tokenizer("a direct call resets the backend")
        caption = f"a {literal} in{literal} text"
        ids = tokenizer([caption], 100)[0][0]
        assert not torch.isin(ids[1:-1], torch.tensor([0, 1, 2, 3, 2047])).any()
        assert tokenizer.decode(ids) == f" {caption}"


def test_caption_without_tokens() -> None:
    with pytest.raises(UserError, match="caption '' gives no token") as error:
        DEMO(["a cat", ""], 10)
    one_line(error)


@pytest.mark.parametrize("caption", ["half \ud800", None, b"a\n"])
def test_captions_that_are_no_text(caption: Any) -> None:
    with pytest.raises(UserError, match="cannot be encoded, expected text") as error:
        DEMO(["a cat", caption], 10)
    one_line(error)
    assert type(caption).__name__ in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize("caption", ["\0", "\x1b[2J", "🤖", "שלום", "a" * 10_000, "\u200b", "$$", "%s"])
def test_captions_of_any_characters_give_tokens(caption: str) -> None:
    assert DEMO([caption], 10)[1].sum() >= 3


def test_lengths_are_checked() -> None:
    with pytest.raises(UserError, match="max_length is 2"):
        DEMO(["a cat"], 2)
    with pytest.raises(ValueError, match="pad_to is 9"):
        DEMO(["a cat"], 10, pad_to=9)


def test_stored_padding_and_truncation_do_not_count(tmp_path: Path) -> None:
    path = edited_demo(tmp_path / "t")
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.enable_padding(length=128, pad_id=1, pad_token="<pad>")
    backend.enable_truncation(4)
    backend.save(str(path / "tokenizer.json"))
    caption = "hammer and wrench, spanner, tool"
    assert torch.equal(CaptionTokenizer.from_pretrained(path)([caption], 50)[0], DEMO([caption], 50)[0])


def test_save_and_load(tmp_path: Path) -> None:
    DEMO(["a"], 5)
    DEMO.save_pretrained(tmp_path / "t")
    again = CaptionTokenizer.from_pretrained(tmp_path / "t")
    captions = ["a cat", "UP! button, mark, up, up!", "🤖 <mask>"]
    assert torch.equal(again(captions, 30)[0], DEMO(captions, 30)[0])
    assert (again.vocab_size, again.mask_id) == (2048, 2047)
    assert AutoTokenizer.from_pretrained(tmp_path / "t")("a <mask>").input_ids[-2] == 2047


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory") as error:
        CaptionTokenizer.from_pretrained(tmp_path / "none")
    assert "none" in one_line(error)


def test_a_name_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def from_pretrained(name: str, **options: object) -> object:
        calls.append((name, options))
        if name == "no-such-name":
            raise OSError("We couldn't connect\nto anything")
        return DEMO.tokenizer

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    assert CaptionTokenizer.from_pretrained("organisation/name").vocab_size == 2048
    assert calls == [("organisation/name", {})]
    with pytest.raises(
        UserError, match=r"no-such-name: not a local directory.*We couldn't connect\); a local"
    ) as error:
        CaptionTokenizer.from_pretrained("no-such-name")
    assert one_line(error)


@pytest.mark.parametrize("content", [None, "{broken"])
def test_directory_without_a_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot be loaded as a tokenizer") as error:
        CaptionTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("kinds", [["mask"], ["pad", "bos"], ["eos"]])
def test_missing_special_tokens(tmp_path: Path, kinds: list[str]) -> None:
    path = edited_demo(tmp_path / "t", **{f"{kind}_token": None for kind in kinds})
    with pytest.raises(UserError, match=f"no {', '.join(kinds)} token") as error:
        CaptionTokenizer.from_pretrained(path)
    one_line(error)


def test_no_bos_and_eos_around(tmp_path: Path) -> None:
    path = edited_demo(tmp_path / "t")
    content = json.loads((path / "tokenizer.json").read_text())
    content["post_processor"] = None
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="'a' becomes the ids") as error:
        CaptionTokenizer.from_pretrained(path)
    one_line(error)


def test_training_again_gives_the_shipped_one(tmp_path: Path) -> None:
    main(["demo", "pairs", str(tmp_path), "--vocab-size", "2048"])
    shipped = Tokenizer.from_file(str(demo_root() / "tokenizer" / "tokenizer.json")).to_str()
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == shipped
    config = (demo_root() / "tokenizer" / "tokenizer_config.json").read_text()
    assert (tmp_path / "tokenizer_config.json").read_text() == config


def test_training_sees_the_train_split_only(tmp_path: Path) -> None:
    source = open_pairs("demo", ["pairs"])
    train_tokenizer((source.caption(pair) for pair in range(source.num_pairs)), 2048, tmp_path)
    shipped = Tokenizer.from_file(str(demo_root() / "tokenizer" / "tokenizer.json")).get_vocab()
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab() != shipped


@pytest.mark.parametrize(("vocab_size", "ids"), [(261, 261), (262, 262), (1000, 263)])
def test_mask_is_the_last_id(tmp_path: Path, vocab_size: int, ids: int) -> None:
    train_tokenizer(["ab ab"], vocab_size, tmp_path)
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (ids, ids - 1)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (0, 1, 2)
    assert AutoTokenizer.from_pretrained(tmp_path).unk_token_id == 3


def test_vocabulary_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="vocab_size is 260"):
        train_tokenizer(["a"], 260, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "pairs", str(tmp_path), "--vocab-size", "260"])
    assert stopped.value.code == 2
    assert "vocab_size is 260" in capsys.readouterr().err
