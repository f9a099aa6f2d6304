"""Retrieval over two ranks is that of one process bit for bit, in every form of re-ranking.

``test_evaluation.py`` has three ranks."""

from __future__ import annotations

import torch
from ranks import be_rank, run_ranks

from sclkern import SCLConfig, SCLModel
from sclkern.data import open_pairs
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.evaluation.reranking import Reranking
from sclkern.evaluation.retrieval import evaluate_retrieval
from sclkern.evaluation.room import Room
from tiny_run import rows

FORMS = [Reranking(3), Reranking(4, "logit+similarity"), Reranking(None, "rank")]


def retrievals(folder, *, distributed):
    torch.manual_seed(3)
    config = SCLConfig.preset("tiny").replace(
        vocab_size=2048, mask_id=2047, heads=("itm", "itc", "rank"), init_std=0.3, dropout=0.0
    )
    model, source = SCLModel(config), open_pairs(folder, ["t"])
    arguments = model, source, CaptionTokenizer.from_pretrained("demo"), build_transform("clip_test", 32)
    # Files for what the first form keeps.
    rooms = [Room(memory=0), None, None]
    return [
        evaluate_retrieval(*arguments, batch_size=2, rerank=form, room=room, distributed=distributed)
        for form, room in zip(FORMS, rooms, strict=True)
    ]


def work(rank, world, folder):
    return retrievals(folder, distributed=True)


def test_recalls_and_ranks_are_those_of_one_process(tmp_path):
    # 13 images in batches of two: the ranks have other numbers of them. Groups of a caption lie on both.
    content = rows(13)
    for row, other in ((0, 5), (5, 11), (3, 4)):
        content[other]["caption"] = content[row]["caption"]
    content[8]["image"] = b""
    write_pairs(tmp_path / "t.arrow", content)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = retrievals(tmp_path, distributed=False)
    finally:
        torch.set_num_threads(threads)
    assert alone[0].images == 12 and alone[0].captions < 12
    assert run_ranks(__file__, 2, tmp_path) == [alone] * 2


if __name__ == "__main__":
    be_rank(work)
