"""The caption tokenizer, and the training of a small one.

``python -m sclkern.data.tokenizer ROOT TABLE OUT --vocab-size N`` trains one on the captions of a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sclkern.data.roots import demo_root
from sclkern.data.source import open_pairs
from sclkern.data.text import one_line
from sclkern.errors import UserError
from sclkern.weights.encoders import HUB_NAME
from sclkern.weights.files import read_json
from sclkern.weights.pretrained import CONFIG, MODEL_TYPE

_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


class CaptionTokenizer:
    """A Hugging Face tokenizer of RoBERTa's style: a caption becomes ``<s> tokens </s>``.

    A caption is data: text in it that spells a special token, such as ``<mask>``, is tokenized as text.

    Args:
        tokenizer: A fast tokenizer that puts bos and eos around a caption.

    Attributes:
        tokenizer: The tokenizer it was made from.
        vocab_size: Number of ids, added tokens included.
        pad_id: Id of the padding token.
        bos_id: Id of the token before a caption.
        eos_id: Id of the token after a caption.
        mask_id: Id of the mask token.

    Raises:
        UserError: ``tokenizer`` lacks a mask, pad, bos or eos token, has no backend of the ``tokenizers``
            library, or does not put bos and eos around a caption.
    """

    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or "the tokenizer"
        missing = [kind for kind in ("mask", "pad", "bos", "eos") if getattr(tokenizer, f"{kind}_token_id") is None]
        if missing:
            raise UserError(f"{name}: no {', '.join(missing)} token, expected mask, pad, bos and eos; add the missing")
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(f"{name}: no tokenizer.json, expected one; convert it to a fast tokenizer")
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.pad_id = tokenizer.pad_token_id
        self.bos_id = tokenizer.bos_token_id
        self.eos_id = tokenizer.eos_token_id
        self.mask_id = tokenizer.mask_token_id
        ids = self._backend().encode("a").ids
        if len(ids) < 3 or ids[0] != self.bos_id or ids[-1] != self.eos_id:
            raise UserError(
                f"{name}: 'a' becomes the ids {ids}, expected {self.bos_id} (bos), tokens, "
                f"{self.eos_id} (eos); set RoBERTa's post-processor in its tokenizer.json"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> CaptionTokenizer:
        """Load a tokenizer.

        Args:
            path: A tokenizer directory, or ``"demo"`` for the shipped one. A string that is no directory and does not
                look like a path is looked for on the Hugging Face hub.

        Returns:
            The tokenizer.

        Raises:
            UserError: The directory is missing or holds no tokenizer that transformers can load.
        """
        local = demo_root() / "tokenizer" if path == "demo" else Path(path).expanduser()
        if not local.is_dir() and (isinstance(path, Path) or not HUB_NAME.fullmatch(path)):
            raise UserError(f"{local}: no such directory, expected a Hugging Face tokenizer; 'demo' is the shipped one")
        try:
            if not local.is_dir():
                return cls(AutoTokenizer.from_pretrained(path))
            tokenizer = AutoTokenizer.from_pretrained(str(local), local_files_only=True, **_of_our_model(local))
        except UserError:
            raise
        except Exception as error:  # transformers lets through whatever its parsers raise
            reason = str(error).strip().partition("\n")[0]
            if not local.is_dir():
                raise UserError(
                    f"{path}: not a local directory, and the Hugging Face hub gives no tokenizer ({reason}); a local "
                    "tokenizer directory works without a network"
                ) from error
            raise UserError(
                f"{local}: cannot be loaded as a tokenizer ({reason}), expected tokenizer.json and "
                "tokenizer_config.json as save_pretrained writes them"
            ) from error
        return cls(tokenizer)

    def __call__(
        self, captions: Sequence[str], max_length: int, pad_to: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize a batch of B captions, padded on the right.

        Args:
            captions: B texts.
            max_length: Longest row, ``<s>`` and ``</s>`` included; a longer caption is cut before ``</s>``.
            pad_to: L, at least ``max_length``; by default the longest row of the batch.

        Returns:
            ids (B, L) int64 and mask (B, L) bool, true on tokens, false on padding.

        Raises:
            UserError: A caption gives no token or is not text, or ``max_length`` leaves no room for one.
            ValueError: ``pad_to`` is less than ``max_length``.
        """
        if max_length < 3:
            raise UserError(f"max_length is {max_length}, expected 3 or more: <s>, a token, </s>")
        if pad_to is not None and pad_to < max_length:
            raise ValueError(f"pad_to is {pad_to}, expected max_length ({max_length}) or more")
        backend = self._backend()
        rows: list[list[int]] = []
        # One by one: encode_batch starts threads, which a forked worker must not inherit.
        for caption in captions:
            try:
                row = backend.encode(caption).ids
            except (TypeError, UnicodeError) as error:  # half a surrogate pair, or no str
                shown = one_line(str(caption), 60)
                raise UserError(
                    f"caption {shown!r} of type {type(caption).__name__} cannot be encoded, expected text; remove it "
                    "from the data"
                ) from error
            if len(row) < 3:
                raise UserError(
                    f"caption {one_line(caption, 60)!r} gives no token, expected text; remove it from the data"
                )
            rows.append(row if len(row) <= max_length else row[: max_length - 1] + row[-1:])
        width = pad_to if pad_to is not None else max(map(len, rows), default=0)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = True
        return ids, mask

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Text of one row of ids, special tokens left out; starts with a space if the tokenizer adds one."""
        return self._backend().decode([int(token) for token in ids], skip_special_tokens=True)

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Words of a caption: a token that begins with white space begins a word.

        Args:
            ids: of one caption, ``<s>`` and ``</s>`` included, without padding.

        Returns:
            Each word with the positions of its tokens in ``ids``; those of ``<s>`` and ``</s>`` are in none.
        """
        words: list[list[int]] = []
        for position in range(1, len(ids) - 1):
            if words and not self.decode([ids[position]])[:1].isspace():
                words[-1].append(position)
            else:
                words.append([position])
        # Decoded as a whole: a letter beyond ASCII may be spread over tokens.
        return [(self.decode([ids[position] for position in word]).strip(), word) for word in words]

    def save_pretrained(self, path: str | Path) -> None:
        """Write the directory that ``from_pretrained`` loads."""
        self._backend()
        self.tokenizer.save_pretrained(str(path))

    def _backend(self) -> Tokenizer:
        # Set at each use: a direct call of the transformers tokenizer, or pickling it, resets this state.
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend


def _of_our_model(folder: Path) -> dict[str, Any]:
    """Options for a tokenizer beside a model of ours: transformers would warn of its type."""
    try:
        ours = read_json(folder / CONFIG).get("model_type") == MODEL_TYPE
    except UserError:
        ours = False
    return {"config": PreTrainedConfig()} if ours else {}


def train_tokenizer(captions: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Train a byte-level BPE tokenizer and write it to the directory ``path``.

    The special tokens are RoBERTa's: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, and ``<mask>`` the last
    id.

    Args:
        captions: Texts to train on.
        vocab_size: Number of ids; there are fewer if the captions give fewer merges.
        path: Directory to write.

    Raises:
        UserError: ``vocab_size`` has no room for the 256 bytes and the 5 special tokens.
    """
    if vocab_size < 261:
        raise UserError(f"vocab_size is {vocab_size}, expected 261 or more: 256 bytes and 5 special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_SPECIAL,
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a tokenizer from the command line."""
    parser = argparse.ArgumentParser(prog="python -m sclkern.data.tokenizer", description=main.__doc__)
    parser.add_argument("root", help="folder of the data, or 'demo'")
    parser.add_argument("table", help="name of the file to train on, without its suffix")
    parser.add_argument("out", help="directory to write")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--split", default="train", help="rows to train on (default: train)")
    options = parser.parse_args(arguments)
    try:
        source = open_pairs(options.root, [options.table], options.split)
        captions = (source.caption(pair) for pair in range(source.num_pairs))
        train_tokenizer(captions, options.vocab_size, options.out)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
