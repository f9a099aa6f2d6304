"""What a retrieval takes: features in bytes, pairs, and arithmetic, from the sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from sclkern.evaluation.reranking import Reranking
from sclkern.models import SCLConfig
from sclkern.reference.cross_attention import relative_costs

# Of a caption of COCO on average, ``<s>`` and ``</s>`` included.
_TEXT_TOKENS = 13


@dataclass(frozen=True)
class RetrievalPlan:
    """The plan of a retrieval.

    Attributes:
        images: N.
        texts: C.
        pairs: that the fusion encoder scores, at most: of candidates of both directions some are the same.
        image_bytes: of image tokens, on each rank.
        text_bytes: of text tokens, on every rank.
        score_bytes: of similarities and scores, on every rank.
        encoding_flops: of both encoders, for all images and texts.
        flops_a_pair: of the fusion encoder.
        published_flops_a_pair: of the published loop, which runs all encoders for every pair and pads texts.
        world_size: ranks.
    """

    images: int
    texts: int
    pairs: int
    image_bytes: int
    text_bytes: int
    score_bytes: int
    encoding_flops: float
    flops_a_pair: float
    published_flops_a_pair: float
    world_size: int

    @property
    def flops(self) -> float:
        """Of everything, on all ranks."""
        return self.encoding_flops + self.pairs * self.flops_a_pair

    def seconds(self, rate: float) -> float:
        """Time of the matrix products.

        Args:
            rate: FLOP/s that one rank reaches.

        Returns:
            Seconds.
        """
        return self.flops / rate / self.world_size

    def describe(self, rate: float | None = None) -> str:
        """The plan in lines.

        Args:
            rate: FLOP/s that one rank reaches; None leaves time out.

        Returns:
            The text.
        """
        lines = [
            f"{self.images:,} images x {self.texts:,} texts: {self.pairs:,} pairs on {self.world_size} ranks",
            f"image tokens {self.image_bytes / 1e9:.2f} GB a rank, text tokens {self.text_bytes / 1e9:.2f} GB, "
            f"scores {self.score_bytes / 1e9:.2f} GB",
            f"{self.flops_a_pair / 1e9:.2f} GFLOP a pair ({self.published_flops_a_pair / self.flops_a_pair:.1f} times "
            f"that in the published loop), encoding {self.encoding_flops / 1e12:.1f} TFLOP, all "
            f"{self.flops / 1e15:.2f} PFLOP",
        ]
        if rate is not None:
            lines.append(
                f"{self.seconds(rate) / 3600:.2f} hours at {rate / 1e12:g} TFLOP/s a rank, matrix products alone"
            )
        return "\n".join(lines)


def plan_retrieval(
    config: SCLConfig,
    images: int,
    texts: int,
    reranking: Reranking | None = None,
    *,
    text_tokens: int = _TEXT_TOKENS,
    num_frames: int = 1,
    item_bytes: int = 4,
    world_size: int = 1,
) -> RetrievalPlan:
    """Plan a retrieval, such as COCO's of 5,000 images and 25,010 captions.

    Args:
        config: of the model.
        images: N.
        texts: C.
        reranking: which pairs are scored; None scores none.
        text_tokens: of a text on average.
        num_frames: F.
        item_bytes: of a number of the tokens: 2 under autocast.
        world_size: ranks.

    Returns:
        The plan. Two FLOPs are a multiply and an add; matrix products alone are counted.
    """
    length = num_frames * (1 + config.num_patches)
    pairs = 0
    if reranking is not None:
        k = reranking.candidates
        pairs = images * texts if k is None else min(images * min(k, texts) + texts * min(k, images), images * texts)
    counter = _Counter(config)
    vision = counter.vision(num_frames)
    return RetrievalPlan(
        images,
        texts,
        pairs,
        -(-images // world_size) * length * config.width * item_bytes if pairs else 0,
        texts * text_tokens * config.width * item_bytes,
        4 * images * texts + (4 if pairs == images * texts else 12) * pairs,
        images * vision + texts * counter.text(text_tokens),
        counter.pair(text_tokens, length, num_frames),
        vision + counter.text(config.max_text_len) + counter.plain_pair(config.max_text_len, length),
        world_size,
    )


class _Counter:
    """FLOPs of one sample of each part."""

    def __init__(self, config: SCLConfig) -> None:
        self.config, self.square = config, 2 * config.width**2

    def _attention(self, queries: int, keys: int) -> float:
        """With projections of both sides."""
        return 2 * self.square * (queries + keys) + 4 * queries * keys * self.config.width

    def _absorbed(self, queries: int, keys: int) -> float:
        """The cheapest form, where it is worth it."""
        costs = relative_costs(queries, keys, self.config.width, self.config.num_heads, keys)
        best = min(costs.values())
        return (best if best <= 0.8 else 1.0) * self._attention(queries, keys)

    def _feed_forward(self, tokens: int) -> float:
        return 2 * self.config.mlp_ratio * self.square * tokens

    def vision(self, frames: int) -> float:
        config = self.config
        patches = frames * config.num_patches
        tokens = frames + patches
        read = tokens**2 if frames == 1 else frames * tokens + patches * tokens / frames
        layer = 4 * self.square * tokens + 4 * read * config.width + self._feed_forward(tokens)
        embedding = 2 * patches * 3 * config.patch_size**2 * config.width
        return config.vision_layers * layer + self.square * tokens + embedding

    def text(self, tokens: int) -> float:
        layer = self._attention(tokens, tokens) + self._feed_forward(tokens)
        return self.config.text_layers * layer + self.square * tokens

    def plain_pair(self, text: int, image: int) -> float:
        """Both streams, all tokens of every layer."""
        layer = sum(
            self._attention(own, own) + self._attention(own, other) + self._feed_forward(own)
            for own, other in ((text, image), (image, text))
        )
        return self.config.fusion_layers * layer + 4 * self.config.width**2

    def pair(self, text: int, image: int, frames: int) -> float:
        """What ``ImageBatch.pooled`` computes."""
        layers, total = self.config.fusion_layers, 2.0 * self.square
        for number in range(layers):
            last = number == layers - 1
            for own, other, cls in ((text, image, 1), (image, text, frames)):
                read = cls if last else own
                total += self._absorbed(read, other) + self._feed_forward(read)
                # Self-attention of the first layer is that of the image alone.
                if number or own is text:
                    total += self._absorbed(cls, own) if last else self._attention(own, own)
        return total
