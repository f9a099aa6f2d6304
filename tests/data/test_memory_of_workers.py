"""Workers share what they read, and do not grow."""

from __future__ import annotations

import multiprocessing
import pickle
import re
from pathlib import Path

import pytest

from sclkern.data import index_captions, open_pairs
from sclkern.data.dataset import PairDataset
from sclkern.data.loader import PairLoader
from sclkern.data.packed import PackedTexts
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform

TOKENIZER = CaptionTokenizer.from_pretrained("demo")


def private_bytes(process: int) -> int:
    """Memory that a process shares with no other."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(1024 * int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell")
def test_a_worker_does_not_grow_over_ten_thousand_samples() -> None:
    transform = build_transform("clip", 8, normalize=False)
    dataset = PairDataset(open_pairs("demo", ["pairs"]), TOKENIZER, transform, max_text_len=20, min_size=8, seed=0)
    batches = PairLoader(dataset, batch_size=50, shuffle=True, seed=0, num_workers=1).steps()
    sizes, others = [], set(multiprocessing.active_children())
    for number in range(220):
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - others
        if number % 20 == 19:
            sizes.append(private_bytes(worker.pid))
    batches.close()
    # Before, a worker also gets copies of its own of what it shared with its parent.
    assert sizes[-1] - sizes[len(sizes) // 2] < 2 << 20, sizes


def test_captions_are_sent_to_no_worker(tmp_path: Path) -> None:
    texts = [f"caption {number} of a picture" for number in range(2000)]
    write_pairs(tmp_path / "t.arrow", ({"image": b"1", "caption": [text]} for text in texts))
    source = open_pairs(tmp_path, ["t"])
    sent = pickle.dumps(source)
    assert b"of a picture" not in sent and pickle.loads(sent).caption(1999) == texts[1999]


def test_packed_texts_are_a_sequence_of_texts() -> None:
    texts = ["a cat", "", "ein Bär", "🦊", "half \ud83e"]
    packed = PackedTexts(texts)
    assert list(packed) == texts and len(packed) == 5 and packed[-2] == "🦊" and packed[1:3] == texts[1:3]
    assert not any(isinstance(value, list) for value in vars(packed).values())
    copy = pickle.loads(pickle.dumps(packed))
    assert list(copy) == texts
    with pytest.raises(IndexError):
        packed[5]
    assert list(PackedTexts([])) == []
    assert isinstance(index_captions([["a"]])[0], PackedTexts)
