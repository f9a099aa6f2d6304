"""Arithmetic of a step by its plan: what is computed for one sample, part by part.

A multiply and an add are two FLOPs. Matrix products alone are counted, as ``torch.utils.flop_counter`` does; the
backward of a product is two products. W width, H heads, F frames, P patches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sclkern.errors import UserError
from sclkern.models.attention import absorbed_form
from sclkern.models.config import SCLConfig
from sclkern.models.execution import Absorb
from sclkern.objectives.config import ObjectiveConfig
from sclkern.reference.cross_attention import relative_costs
from sclkern.step.config import StepConfig
from sclkern.step.masks import token_capacity
from sclkern.step.memory import kept_bytes
from sclkern.step.plan import EncodedImage, ImageEncoding, Plan, PlannedView, TextEncoding, make_plan


@dataclass(frozen=True)
class Part:
    """One line of the plan, for one sample.

    Attributes:
        name: "image complete", "text mlm", "fusion itm", "heads".
        tokens: that go through the layers.
        flops: of the forward.
        backward: FLOPs of the backward.
    """

    name: str
    tokens: float
    flops: float
    backward: float

    @property
    def total(self) -> float:
        """FLOPs of the forward and the backward."""
        return self.flops + self.backward


@dataclass(frozen=True)
class Length:
    """Tokens of a sequence.

    Attributes:
        count: without padding.
        padded: with the padding that an absorbed cross-attention works on.
    """

    count: int
    padded: int


@dataclass(frozen=True)
class Stream:
    """One stream of one view in the fusion encoder.

    Attributes:
        tokens: its tokens.
        context: the tokens of the other stream.
        read: how many of its tokens the losses read.
        is_text: whether it is the text stream.
    """

    tokens: Length
    context: Length
    read: int
    is_text: bool


class Counter:
    """FLOPs of one sample of a model.

    Args:
        config: sizes of the network.
        objectives: the recipe and its ratios.
        plan: what is computed.
        caption_tokens: of a caption, with its ``<s>`` and ``</s>``.
        padded_tokens: of the longest caption of the batch, to which all are padded where the plan does not pack.
        num_frames: F.
        device: type of the device that trains, by which cross-attention chooses its form; None is "cuda" where torch
            sees a GPU, otherwise "cpu".
        backend: of the model, likewise.
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
        device: str | None = None,
        backend: str = "auto",
    ) -> None:
        self.backend = backend
        with FakeTensorMode():
            # Without memory, so that no such device is needed.
            self.token = torch.empty(config.width, device=device or default_device())
        self.config, self.objectives, self.plan, self.frames = config, objectives, plan, num_frames
        self.caption = Length(caption_tokens if plan.step.pack else padded_tokens, padded_tokens)
        self.capacity = token_capacity(config, objectives, padded_tokens)
        self.square = 2 * config.width**2

    def parts(self) -> list[Part]:
        """Count every part of the plan.

        Returns:
            The encodings of images, those of texts, the views, and last the heads of all objectives.
        """
        images = [self._image(image) for image in self.plan.images]
        texts = [self._text(text) for text in self.plan.texts]
        return [*images, *texts, *(self._view(view) for view in self.plan.views), self._heads()]

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _patches(self, variant: EncodedImage) -> int:
        kept = max(1, int(self.config.num_patches * (1 - self.objectives.image_mask_ratio)))
        return kept if variant == "dropped" else self.config.num_patches

    def _image_tokens(self, variant: EncodedImage) -> int:
        return self.frames * (1 + self._patches(variant))

    def _read_texts(self, view: PlannedView) -> int:
        return sum(self.capacity[kind] for kind in view.text_outputs)

    def _read_images(self, view: PlannedView) -> int:
        return self.frames * sum(self.capacity[kind] for kind in view.image_outputs)

    # -- layers --------------------------------------------------------------------------------------------------------

    def _self_attention(self, tokens: int, frames: int = 1) -> float:
        # A CLS attends to every token, a patch to those of its frame.
        pairs = tokens**2 if frames == 1 else frames * tokens + (tokens - frames) * tokens / frames
        return 4 * self.square * tokens + 4 * pairs * self.config.width

    def _feed_forward(self, tokens: float) -> float:
        return 2 * self.config.mlp_ratio * self.square * tokens

    def _plain(self, queries: int, keys: int) -> float:
        return 2 * self.square * (queries + keys) + 4 * queries * keys * self.config.width

    def _cost_ratio(self, queries: int, keys: int, absorb: Absorb) -> float:
        """Cost of the form that training takes on the device over that of the plain one; 1 where it absorbs nothing."""
        width, dropout = self.config.width, self.config.dropout
        form = absorbed_form(queries, keys, self.token, dropout_p=dropout, absorb=absorb, backend=self.backend)
        return relative_costs(queries, keys, width, self.config.num_heads, keys)[form]

    def _attend(self, queries: Length, keys: Length, longest: tuple[int, int], *, text_keys: bool) -> float:
        """FLOPs of attention whose queries and keys have separate projections.

        Args:
            queries: of this view.
            keys: of this view.
            longest: most queries and keys of any view, which decide for all.
            text_keys: whether the keys are text.

        Returns:
            FLOPs.
        """
        if not longest[0]:
            # No view reads this stream: its last layer is not run.
            return 0.0
        if self._cost_ratio(*longest, self.plan.step.absorb if self.plan.step.pack else "never") == 1:
            # Packed text keys are projected together with those of the other views, read or not.
            projected = queries.count or (self.plan.step.pack and text_keys)
            return self._plain(queries.count, keys.count if projected else 0)
        # An absorbed sub-layer works on padded captions, and each call chooses for itself.
        ratio = self._cost_ratio(queries.padded, keys.padded, "all")
        return ratio * self._plain(queries.padded, keys.padded) if queries.count else 0.0

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _image(self, image: ImageEncoding) -> Part:
        config, tokens = self.config, self._image_tokens(image.variant)
        layer = self._self_attention(tokens, frames=self.frames) + self._feed_forward(tokens)
        deep = config.vision_layers * layer + self.square * tokens
        embedding = 2 * self.frames * self._patches(image.variant) * 3 * config.patch_size**2 * config.width
        # The pixels need no gradient. Half of the rows have a negative image.
        share = 0.5 if image.variant == "negative" else 1.0
        return Part(f"image {image.name}", share * tokens, share * (deep + embedding), share * (2 * deep + embedding))

    def _text(self, text: TextEncoding) -> Part:
        tokens = self.caption.count
        layer = self._self_attention(tokens) + self._feed_forward(tokens)
        flops = self.config.text_layers * layer + self.square * tokens
        return Part(f"text {text.name}", tokens, flops, 2 * flops)

    def _streams(self, view: PlannedView) -> tuple[Stream, Stream]:
        tokens = self._image_tokens(view.image.variant)
        image = Length(tokens, tokens)
        return (
            Stream(self.caption, image, self._read_texts(view), is_text=True),
            Stream(image, self.caption, self._read_images(view), is_text=False),
        )

    def _view(self, view: PlannedView) -> Part:
        streams, every = self._streams(view), [self._streams(other) for other in self.plan.views]
        whole, last, learned = [], [], []
        for number, stream in enumerate(streams):
            same = [pair[number] for pair in every]
            longest = max(s.tokens.padded for s in same), max(s.context.padded for s in same)
            in_full = (
                self._self_attention(stream.tokens.count)
                + self._attend(stream.tokens, stream.context, longest, text_keys=not stream.is_text)
                + self._feed_forward(stream.tokens.count)
            )
            whole.append(in_full)
            if self.plan.step.prune_last_layer:
                last.append(self._pruned(stream, same))
                learned.append(last[-1])
            else:
                last.append(in_full)
                # A stream that no loss reads, in its call of the encoder, has no backward.
                if stream.read or (self.plan.step.pack and any(s.read for s in same)):
                    learned.append(in_full)
        before = (self.config.fusion_layers - 1) * sum(whole)
        if not self.config.fusion_layers:
            before, last, learned = 0, [], []
        tokens = self.caption.count + streams[0].context.count
        return Part(f"fusion {view.name}", tokens, before + sum(last), 2 * (before + sum(learned)))

    def _pruned(self, stream: Stream, same: list[Stream]) -> float:
        """The last layer on one stream of a view; ``same`` is this stream in every view."""
        queries, most = Length(stream.read, stream.read), max(s.read for s in same)
        # Image tokens are those of the views of which the stream is read; text tokens those of all.
        read = [s for s in same if s.read]
        tokens = max((s.tokens.padded for s in (same if stream.is_text else read)), default=0)
        context = max((s.context.padded for s in (read if stream.is_text else same)), default=0)
        return (
            self._attend(queries, stream.tokens, (most, tokens), text_keys=stream.is_text)
            + self._attend(queries, stream.context, (most, context), text_keys=not stream.is_text)
            + self._feed_forward(stream.read)
        )

    def _heads(self) -> Part:
        heads = [
            objective.flops(self.config, self.capacity) for objective in self.objectives.selected if objective.flops
        ]
        read = any("mlm" in view.text_outputs for view in self.plan.views)
        flops = sum(heads)
        return Part("heads", self.capacity["mlm"] if read else 0, flops, 2 * flops)


def default_device() -> str:
    """The type of the device that ``run.device=auto`` takes here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_plan(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    caption_tokens: int = 13,
    num_frames: int = 1,
    device: str | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """The plan of a step with its arithmetic beside that of separate padded passes, as plain data.

    Args:
        config: sizes of the network.
        objectives: the recipe and its ratios.
        step: how the step is executed.
        caption_tokens: of every caption; separate passes pad them to ``max_text_len``, as the published code does.
        num_frames: of every clip; 1 for images.
        device: "cpu" or "cuda", which trains, as in ``Counter``; the kept bytes are those of a GPU.
        backend: of the model.

    Returns:
        ``device``, ``views``, ``parts`` and ``flops`` of the plan for one sample, ``separate_flops`` of the separate
        passes, and ``flops_ratio``, the one over the other; likewise ``kept_bytes`` (``sclkern.step.memory``),
        ``separate_kept_bytes`` and ``kept_ratio``.

    Raises:
        UserError: fewer than 3 or more than ``max_text_len`` tokens, no frame, or more than the model has room for.
    """
    if not 3 <= caption_tokens <= config.max_text_len:
        raise UserError(f"caption_tokens: got {caption_tokens}, expected 3 to max_text_len {config.max_text_len}")
    if not 1 <= num_frames <= max(1, config.max_frames):
        raise UserError(f"num_frames: got {num_frames}, expected 1 to max_frames {max(1, config.max_frames)}")
    plan = make_plan(objectives, step)
    sizes: dict[str, Any] = {"caption_tokens": caption_tokens, "num_frames": num_frames}
    padded = caption_tokens if step.pack else config.max_text_len
    device = device or default_device()
    trained: dict[str, Any] = {**sizes, "device": device, "backend": backend}
    parts = Counter(config, objectives, plan, padded_tokens=padded, **trained).parts()
    separate_plan = make_plan(objectives, StepConfig.published())
    separate = Counter(config, objectives, separate_plan, padded_tokens=config.max_text_len, **sizes).parts()
    total, whole = (sum(part.total for part in every) for every in (parts, separate))
    kept = kept_bytes(config, objectives, step, padded_tokens=padded, **sizes)
    separate_kept = kept_bytes(config, objectives, StepConfig.published(), padded_tokens=config.max_text_len, **sizes)
    return {
        "recipe": objectives.recipe_name,
        "itm_negatives": objectives.itm_negatives,
        **sizes,
        "device": device,
        "views": [{**asdict(view), "image": view.image.name, "text": view.text.name} for view in plan.views],
        "parts": [asdict(part) for part in parts],
        "flops": total,
        "separate_flops": whole,
        "flops_ratio": total / whole,
        "kept_bytes": kept,
        "separate_kept_bytes": separate_kept,
        "kept_ratio": kept / separate_kept,
    }


def format_plan(described: dict[str, Any]) -> str:
    """Format the data of ``describe_plan`` as a table for people.

    Args:
        described: the data.

    Returns:
        Lines of text.
    """
    lines = [f"{'view':14} {'image':22} {'text':22} {'text outputs':18} image outputs"]
    for view in described["views"]:
        image = view["image"] + {"none": "", "rows": " (other rows)", "merged": " + negative"}[view["negatives"]]
        outputs = ", ".join(view["text_outputs"]) or "-", ", ".join(view["image_outputs"]) or "-"
        lines.append(f"{view['name']:14} {image:22} {view['text']:22} {outputs[0]:18} {outputs[1]}")
    lines += ["", f"{'part':28} {'tokens':>8} {'forward GFLOP':>14} {'backward GFLOP':>15}"]
    for part in described["parts"]:
        forward, backward = part["flops"] / 1e9, part["backward"] / 1e9
        lines.append(f"{part['name']:28} {part['tokens']:8g} {forward:14.2f} {backward:15.2f}")
    lines += [
        "",
        f"a sample on {described['device']}: {described['flops'] / 1e9:.1f} GFLOP, in separate padded passes "
        f"{described['separate_flops'] / 1e9:.1f} GFLOP, ratio {described['flops_ratio']:.3f}",
        f"kept for its backward, in float32: {described['kept_bytes'] / 1e6:.0f} MB, in separate padded passes "
        f"{described['separate_kept_bytes'] / 1e6:.0f} MB, ratio {described['kept_ratio']:.3f}",
    ]
    return "\n".join(lines)
