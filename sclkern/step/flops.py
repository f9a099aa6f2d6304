"""Arithmetic of a step by its plan: what is computed for one sample, part by part.

A multiply and an add are two FLOPs. Matrix products alone are counted, as ``torch.utils.flop_counter`` does; the
backward of a product is two products. W width, H heads, F frames, P patches, n and m tokens of two streams.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sclkern.errors import UserError
from sclkern.ops.cross_attention import WORTHWHILE, relative_costs
from sclkern.step.config import StepConfig
from sclkern.step.memory import kept_bytes
from sclkern.step.plan import Plan, View, make_plan

if TYPE_CHECKING:
    from sclkern.models.config import SCLConfig
    from sclkern.objectives.config import ObjectiveConfig


@dataclass(frozen=True)
class Part:
    """One line of the plan, for one sample.

    Attributes:
        name: "image complete", "text mlm", "fusion itm", "heads".
        tokens: that go through the layers. flops: of the forward.
        backward: of the backward.
    """

    name: str
    tokens: float
    flops: float
    backward: float

    @property
    def total(self) -> float:
        return self.flops + self.backward


class Counter:
    """FLOPs of one sample of a model.

    Args:
        caption_tokens: of a caption, with its ``<s>`` and ``</s>``. padded_tokens: of the longest of the batch, which
            all are padded to where the plan does not pack.
        num_frames: F.
    """

    def __init__(
        self,
        config: SCLConfig,
        objectives: ObjectiveConfig,
        plan: Plan,
        *,
        caption_tokens: int,
        padded_tokens: int,
        num_frames: int = 1,
    ) -> None:
        self.config, self.objectives, self.plan, self.frames = config, objectives, plan, num_frames
        self.words = caption_tokens if plan.step.pack else padded_tokens
        self.padded_words = padded_tokens
        self.square = 2 * config.width**2

    def parts(self) -> list[Part]:
        images = [self._image(each.name, each.variant) for each in self.plan.images]
        texts = [self._text(each.name) for each in self.plan.texts]
        return [*images, *texts, *(self._view(view) for view in self.plan.views), self._heads()]

    # Tokens --------------------------------------------------------------------------------------------------------

    def _patches(self, variant: str) -> int:
        kept = max(1, int(self.config.num_patches * (1 - self.objectives.image_mask_ratio)))
        return kept if variant == "dropped" else self.config.num_patches

    def _image_tokens(self, variant: str) -> int:
        return self.frames * (1 + self._patches(variant))

    def _read_texts(self, view: View) -> int:
        width = self.padded_words
        sizes = {
            "cls": 1,
            "mlm": min(width, int(width * self.objectives.mlm_ratio) + 1),
            "completion": min(width, int(max(width - 2, 0) * self.objectives.text_mask_ratio) + 1),
        }
        return sum(sizes[read] for read in view.text_reads)

    def _read_images(self, view: View) -> int:
        replaced = int(self.config.num_patches * self.objectives.patch_token_ratio)
        return self.frames * sum({"cls": 1, "replaced": replaced}[read] for read in view.image_reads)

    # Layers --------------------------------------------------------------------------------------------------------

    def _self_attention(self, tokens: int, frames: int = 1) -> float:
        # A CLS meets every token, a patch those of its frame.
        pairs = tokens**2 if frames == 1 else frames * tokens + (tokens - frames) * tokens / frames
        return 4 * self.square * tokens + 4 * pairs * self.config.width

    def _unread_words(self, image: int) -> float:
        """Packed words are projected to keys and values with those of the other views, unless they are absorbed."""
        plain = not self._absorbed(1, image) if self.plan.step.absorb == "auto" else True
        return 2 * self.square * self.words if self.plan.step.pack and plain else 0.0

    def _feed_forward(self, tokens: float) -> float:
        return 2 * self.config.mlp_ratio * self.square * tokens

    def _plain(self, rows: int, context: int) -> float:
        return 2 * self.square * (rows + context) + 4 * rows * context * self.config.width

    def _share(self, rows: int, context: int) -> float:
        """Of the plain sub-layer, what the cheapest absorbed form computes; 1 where none is taken."""
        share = min(relative_costs(rows, context, self.config.width, self.config.num_heads, context).values())
        return share if share <= WORTHWHILE else 1.0

    def _attend(self, rows: int, context: int, longest: tuple[int, int]) -> float:
        """Attention of ``rows`` tokens to ``context`` others. ``longest``: of any view, which decide for all."""
        if self.plan.step.absorb == "never" or not self.plan.step.pack or self._share(*longest) == 1:
            # Packed words that nobody asks are projected all the same, with those of the other views.
            unread = not rows and self.plan.step.pack and context == self.words
            return self._plain(rows, context if rows or unread else 0)
        # An absorbed sub-layer works on padded captions.
        rows, context = (self.padded_words if tokens == self.words else tokens for tokens in (rows, context))
        return self._share(rows, context) * self._plain(rows, context) if rows else 0.0

    def _image(self, name: str, variant: str) -> Part:
        config, tokens = self.config, self._image_tokens(variant)
        layer = self._self_attention(tokens, frames=self.frames) + self._feed_forward(tokens)
        deep = config.vision_layers * layer + self.square * tokens
        embedding = 2 * self.frames * self._patches(variant) * 3 * config.patch_size**2 * config.width
        # The pictures need no gradient. Half of the false pictures stand in for a true one.
        share = 0.5 if variant == "false" else 1.0
        return Part(f"image {name}", share * tokens, share * (deep + embedding), share * (2 * deep + embedding))

    def _text(self, name: str) -> Part:
        tokens = self.words
        layer = self._self_attention(tokens) + self._feed_forward(tokens)
        flops = self.config.text_layers * layer + self.square * tokens
        return Part(f"text {name}", tokens, flops, 2 * flops)

    def _view(self, view: View) -> Part:
        text, image = self.words, self._image_tokens(view.image.partition("/")[0])
        # The tokens of a stream, those of the other, those read, and the most of each in any view.
        images = max(self._image_tokens(each.image.partition("/")[0]) for each in self.plan.views)
        reads = [max(read(each) for each in self.plan.views) for read in (self._read_texts, self._read_images)]
        streams = (
            (text, image, self._read_texts(view), (self.padded_words, images, reads[0])),
            (image, text, self._read_images(view), (images, self.padded_words, reads[1])),
        )
        whole = [
            self._self_attention(own) + self._attend(own, other, most[:2]) + self._feed_forward(own)
            for own, other, _, most in streams
        ]
        last = learned = whole
        if self.plan.step.prune_last_layer:
            last = learned = [
                self._attend(rows, own, (most[2], most[0]))
                + self._attend(rows, other, (most[2], most[1]))
                + self._feed_forward(rows)
                for own, other, rows, most in streams
            ]
        elif not self.plan.step.pack:
            # In a pass of its own, a stream that no loss reads has no backward.
            learned = [flops for flops, (_, _, rows, _) in zip(whole, streams, strict=True) if rows]
        before = (self.config.fusion_layers - 1) * sum(whole)
        if not self.config.fusion_layers:
            before, last, learned = 0, [], []
        return Part(f"fusion {view.name}", text + image, before + sum(last), 2 * (before + sum(learned)))

    def _heads(self) -> Part:
        config = self.config
        words = min(self.padded_words, int(self.padded_words * self.objectives.mlm_ratio) + 1)
        mlm = self.square * words + 2 * words * config.width * config.vocab_size
        pooled = 2 * self.square + 8 * config.width
        projected = 2 * (self.square + 2 * config.width * config.projection_dim)
        flops = mlm + pooled + projected
        return Part("heads", words, flops, 2 * flops)


def describe_plan(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    caption_tokens: int = 13,
    num_frames: int = 1,
) -> dict[str, Any]:
    """The plan of a step with its arithmetic beside that of separate padded passes, as plain data.

    Args:
        caption_tokens: of every caption; separate passes pad them to ``max_text_len``, as the published code does.

    Returns:
        ``views``, ``parts`` and ``flops`` of the plan for one sample, ``separate_flops`` of the separate passes, and
        ``flops_ratio``, the one over the other; likewise ``kept_bytes`` (``sclkern.step.memory``),
        ``separate_kept_bytes`` and ``kept_ratio``.

    Raises:
        UserError: fewer than 3 or more than ``max_text_len`` tokens, no frame, or more than the model has room for.
    """
    if not 3 <= caption_tokens <= config.max_text_len:
        raise UserError(f"caption_tokens: got {caption_tokens}, expected 3 to max_text_len {config.max_text_len}")
    if not 1 <= num_frames <= max(1, config.max_frames):
        raise UserError(f"num_frames: got {num_frames}, expected 1 to max_frames {max(1, config.max_frames)}")
    plan = make_plan(objectives, step)
    sizes = {"caption_tokens": caption_tokens, "num_frames": num_frames}
    padded = caption_tokens if step.pack else config.max_text_len
    parts = Counter(config, objectives, plan, padded_tokens=padded, **sizes).parts()
    apart = make_plan(objectives, StepConfig.reference())
    separate = Counter(config, objectives, apart, padded_tokens=config.max_text_len, **sizes).parts()
    total, whole = (sum(part.total for part in every) for every in (parts, separate))
    kept = kept_bytes(config, objectives, step, padded_tokens=padded, **sizes)
    separate_kept = kept_bytes(config, objectives, StepConfig.reference(), padded_tokens=config.max_text_len, **sizes)
    return {
        "recipe": objectives.recipe,
        "itm_negatives": objectives.itm_negatives,
        **sizes,
        "views": [asdict(view) for view in plan.views],
        "parts": [asdict(part) for part in parts],
        "flops": total,
        "separate_flops": whole,
        "flops_ratio": total / whole,
        "kept_bytes": kept,
        "separate_kept_bytes": separate_kept,
        "kept_ratio": kept / separate_kept,
    }


def format_plan(described: dict[str, Any]) -> str:
    """``describe_plan``'s data as a table for people."""
    lines = [f"{'view':14} {'image':22} {'text':22} {'read of text':18} read of image"]
    for view in described["views"]:
        image = view["image"] + {"none": "", "rows": " (other rows)", "merged": " + false"}[view["negatives"]]
        reads = ", ".join(view["text_reads"]) or "-", ", ".join(view["image_reads"]) or "-"
        lines.append(f"{view['name']:14} {image:22} {view['text']:22} {reads[0]:18} {reads[1]}")
    lines += ["", f"{'part':28} {'tokens':>8} {'forward GFLOP':>14} {'backward GFLOP':>15}"]
    for part in described["parts"]:
        forward, backward = part["flops"] / 1e9, part["backward"] / 1e9
        lines.append(f"{part['name']:28} {part['tokens']:8g} {forward:14.2f} {backward:15.2f}")
    lines += [
        "",
        f"a sample: {described['flops'] / 1e9:.1f} GFLOP, in separate padded passes "
        f"{described['separate_flops'] / 1e9:.1f} GFLOP, ratio {described['flops_ratio']:.3f}",
        f"kept for its backward, in float32: {described['kept_bytes'] / 1e6:.0f} MB, in separate padded passes "
        f"{described['separate_kept_bytes'] / 1e6:.0f} MB, ratio {described['kept_ratio']:.3f}",
    ]
    return "\n".join(lines)
