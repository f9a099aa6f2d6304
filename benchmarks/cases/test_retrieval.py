"""Pairs that the fusion encoder scores a second: ours beside the structure of the published loop, in turns.

The published loop (compute_irtr_recall) takes one image and 64 texts at a time. It runs both encoders and the whole
fusion encoder for every pair, with captions padded to 50 tokens and eager attention. Ours encodes each image and each
text once. Images have 384 pixels, as in the published fine-tuning, and captions the lengths of COCO's. A case is timed
only after the scores of both agreed. On a CPU the model has the depth of the base model and 256 channels, and time is
the processor's, of one thread.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sclkern import SCLConfig, SCLModel
from sclkern.data import open_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.evaluation.cost import plan_retrieval
from sclkern.evaluation.gallery import Batches, EncodedImages
from sclkern.evaluation.matching import EncodedTexts
from sclkern.evaluation.reranking import Pairs, Reranking, score_pairs
from sclkern.evaluation.retrieval import evaluate_retrieval
from sclkern.evaluation.room import Room
from sclkern.tools.specs import captions

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRECISION = torch.bfloat16 if GPU else None
IMAGES, TEXTS, ROUNDS = (16, 512, 5) if GPU else (2, 64, 2)
# Texts that the published loop takes at a time.
AT_ONCE = 64


class Gallery:
    """Images and captions of a model, and both ways to score their pairs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.config = SCLConfig().replace(width=768 if GPU else 256, image_size=384)
        self.model = SCLModel(self.config).to(DEVICE).eval()
        self.pixels = torch.randn(IMAGES, 3, 384, 384, device=DEVICE)
        self.lengths = np.array(captions(TEXTS))
        column = torch.arange(self.config.max_text_len, device=DEVICE)
        self.mask = column < torch.from_numpy(self.lengths).to(DEVICE)[:, None]
        ids = torch.randint(5, 50000, self.mask.shape, device=DEVICE)
        self.ids = ids.masked_fill(~self.mask, self.config.pad_id)

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, PRECISION, enabled=PRECISION is not None)

    @torch.no_grad()
    def ours(self) -> Tensor:
        """(images, texts) scores; encoding counts."""
        with self.autocast():
            image = self.model.encode_image(self.pixels)
            text = self.model.encode_text(self.ids, self.mask)
            texts = EncodedTexts(text[self.mask], np.cumsum(self.lengths) - self.lengths, self.lengths)
            images = EncodedImages(
                np.arange(IMAGES), {0: (0, IMAGES)}, None, 1, image.tokens, {0: slice(0, IMAGES)}
            )  # fmt: skip
            pairs = Pairs(TEXTS, None)
            scores = score_pairs(self.model, images, texts, pairs, "logit", None, Batches(lambda: None))
        return scores.view(IMAGES, TEXTS)

    @torch.no_grad()
    def published(self, images: int = 1) -> Tensor:
        """Scores of the first images with the first 64 texts."""
        self.model.set_backend("eager")
        rows = []
        with self.autocast():
            for image in self.pixels[:images]:
                encoded = self.model.encode_image(image.expand(AT_ONCE, -1, -1, -1))
                text = self.model.encode_text(self.ids[:AT_ONCE], self.mask[:AT_ONCE])
                pooled = self.model.pool(*self.model.run_fusion(text, self.mask[:AT_ONCE], encoded).cls)
                rows.append(self.model.itm_head(pooled)[:, 1].float().cpu())
        self.model.set_backend("auto")
        return torch.stack(rows)


def seconds_of(call) -> float:
    if not GPU:
        begin = time.thread_time()
        call()
        return time.thread_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_pairs_a_second(record):
    gallery = Gallery()
    tolerance = 5e-2 if GPU else 1e-4
    torch.testing.assert_close(gallery.ours()[:1, :AT_ONCE], gallery.published(), rtol=tolerance, atol=tolerance)
    ours, published = [], []
    for _ in range(ROUNDS):
        ours.append(IMAGES * TEXTS / seconds_of(gallery.ours))
        published.append(AT_ONCE / seconds_of(gallery.published))
    plan = plan_retrieval(gallery.config, IMAGES, TEXTS, Reranking(None), text_tokens=round(gallery.lengths.mean()))
    record(
        f"retrieval/{gallery.config.width}",
        dtype=str(PRECISION or torch.float32).removeprefix("torch."),
        images=IMAGES,
        texts=TEXTS,
        pairs_a_second=sorted(ours),
        published_pairs_a_second=sorted(published),
        ratio=statistics.median(ours) / statistics.median(published),
        gflops_a_pair=plan.flops_a_pair / 1e9,
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("candidates", [None, 16])
def test_a_whole_retrieval(record, candidates):
    """The embedded pictures with their captions, by the demo's model with random weights."""
    torch.manual_seed(0)
    source = open_pairs("demo", ["pairs"], "val")
    model = SCLModel(SCLConfig.preset("demo")).to(DEVICE)
    arguments = model, source, CaptionTokenizer.from_pretrained("demo"), build_transform("clip_test", 64)
    results = []
    seconds = seconds_of(lambda: results.append(evaluate_retrieval(*arguments, rerank=Reranking(candidates))))
    (result,) = results
    pairs = result.images * result.captions
    record(
        f"whole_retrieval/demo/{candidates or 'all'}",
        dtype="float32", images=result.images, texts=result.captions, pairs=pairs, seconds=seconds,
    )  # fmt: skip


class Noise:
    """A source of 500 pictures of noise with five captions each, of COCO's lengths: a tenth of its test set."""

    num_images, num_pairs = 500, 2500
    pair_image, pair_group = np.arange(2500) // 5, np.arange(2500)

    def __init__(self) -> None:
        words = [word for pair in range(200) for word in open_pairs("demo", ["pairs"]).caption(pair).split()]
        draw = np.random.default_rng(0)
        self.captions = [" ".join(draw.choice(words, max(1, length - 4))) for length in captions(2500)]

    def caption(self, pair: int) -> str:
        return self.captions[pair]

    def image(self, image: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(image).integers(0, 256, (32, 32, 3), dtype=np.uint8))

    def image_name(self, image: int) -> str:
        return str(image)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("candidates", [None, 128])
def test_a_tenth_of_coco(record, candidates):
    """All of a retrieval, its features in files, by the tiny model with random weights."""
    torch.manual_seed(0)
    config = SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047)
    model, source, room = SCLModel(config).to(DEVICE), Noise(), Room(DEVICE, memory=0)
    arguments = model, source, CaptionTokenizer.from_pretrained("demo"), build_transform("clip_test", 32)
    results = []
    options = {"rerank": Reranking(candidates, "logit"), "distinct_captions": False, "room": room}
    seconds = seconds_of(lambda: results.append(evaluate_retrieval(*arguments, **options)))
    plan = plan_retrieval(config, 500, 2500, Reranking(candidates))
    (result,) = results
    record(
        f"whole_retrieval/a_tenth_of_coco/{candidates or 'all'}",
        dtype="float32", images=result.images, texts=result.captions, seconds=seconds, planned_pairs=plan.pairs,
        planned_flops=plan.flops, bytes_in_files=room.taken["file"],
        recall={key: value for key, value in result.recalls.items() if key.endswith("_r1")},
    )  # fmt: skip
