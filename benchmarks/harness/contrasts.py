"""Contrastive losses of whole batches by sclkern and by other libraries, and what each computes in float64.

CLIP's loss is that of images and texts with a learnable scale; the ranking loss that of anchors against documents, of
which those after the positives are hard negatives. Every implementation takes the same unit features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.baselines import load
from benchmarks.harness.implementations import UnsupportedError
from benchmarks.harness.verification import DEVICE, GPU, SEED, WrongResultError, errors

WIDTH = 64
# CLIP's at its start, and sentence-transformers'.
SCALES = {"clip": 1 / 0.07, "ranking": 20.0}
# Columns of the documents beside the anchors.
COLUMNS = {"clip": 2, "ranking": 2, "ranking-hard": 3}
# Bytes that a case may take: of a GPU, and of a machine that others use too.
MOST_BYTES = 100 * 2**30 if GPU else 5 * 2**30
# Similarities in float64 that are in memory at once.
BLOCK = 2**24
# Root mean square error of a gradient over its largest value.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Contrast:
    """One way to compute a contrastive loss and the gradients of its features.

    Attributes:
        name: name in cases and records.
        loss: ``loss(features, scale)`` returns the loss, or None if it has run its backward itself.
        quadratic: about how many matrices of all similarities it holds.
        scaled: computes the gradient of the scale.
        gpu: needs a GPU.
        compiled: run under torch.compile.
        tolerance: factor of the allowed error.
        repeating: operators after which its memory has been seen: it goes through rows in equal rounds.
    """

    name: str
    loss: Callable[[list[Tensor], Tensor], Tensor | None]
    quadratic: int = 0
    scaled: bool = False
    gpu: bool = False
    compiled: bool = False
    tolerance: float = 1.0
    repeating: float = float("inf")


def plain_clip_loss(features: list[Tensor], scale: Tensor) -> Tensor:
    """CLIP's loss as its paper writes it: two cross-entropies of one matrix of logits."""
    logits, labels = scale * features[0] @ features[1].T, torch.arange(len(features[0]), device=features[0].device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _ours_clip(features: list[Tensor], scale: Tensor) -> Tensor:
    from sclkern.integrations.open_clip import ClipLoss

    return ClipLoss()(*features, scale)


def _open_clip(features: list[Tensor], scale: Tensor) -> Tensor:
    return load("open_clip", "open_clip", "ClipLoss", "local_loss")()(*features, scale)


def _inf_cl(features: list[Tensor], scale: Tensor) -> Tensor:
    loss = load("inf-cl", "inf_cl", "cal_inf_loss", "scale", "head_dim")
    # Without a process group its backward fails for a scale that is learnt.
    image, text, options = *features, {"scale": scale.detach(), "head_dim": WIDTH}
    return (loss(image, text, **options) + loss(text, image, **options)) / 2


def _ranking(module: str, name: str, features: list[Tensor], scale: Tensor) -> Tensor | None:
    # Both need the package; the model embeds texts, and features are embedded.
    load("sentence-transformers", "sentence_transformers", "SentenceTransformer")
    loss = load("sentence-transformers", module, name, "scale")(nn.ModuleList([nn.Identity()]), scale=SCALES["ranking"])
    if hasattr(loss, "calculate_loss"):
        loss.calculate_loss([[column] for column in features], with_backward=True)
        return None
    return loss.compute_loss_from_embeddings(features, None)


def _by_class(module: str, name: str) -> Callable[[list[Tensor], Tensor], Tensor | None]:
    return functools.partial(_ranking, module, name)


_OURS, _THEIRS = "sclkern.integrations.sentence_transformers", "sentence_transformers.sentence_transformer.losses"
_RANKING = (
    Contrast("sclkern", _by_class(_OURS, "MultipleNegativesRankingLoss")),
    Contrast("sentence-transformers", _by_class(_THEIRS, "MultipleNegativesRankingLoss"), quadratic=4, tolerance=6),
    Contrast(
        "sentence-transformers, cached", _by_class(_THEIRS, "CachedMultipleNegativesRankingLoss"), tolerance=6,
        repeating=1000,
    ),
)  # fmt: skip
CONTRASTS: dict[str, tuple[Contrast, ...]] = {
    "clip": (
        Contrast("sclkern", _ours_clip, scaled=True),
        Contrast("open_clip", _open_clip, quadratic=4, scaled=True, tolerance=6),
        Contrast("compile", plain_clip_loss, quadratic=3, scaled=True, compiled=True, tolerance=6),
        # Its products are TF32 for every dtype.
        Contrast("inf-cl", _inf_cl, gpu=True, tolerance=3e3),
    ),
    "ranking": _RANKING,
    "ranking-hard": _RANKING,
}


def make_features(kind: str, rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Unit features (N, D) of each column; positives are as close to their anchors as after some training.

    Args:
        kind: of ``CONTRASTS``.
        rows: N.
        dtype: of the features.
    """
    torch.manual_seed(SEED)
    columns = [torch.randn(rows, WIDTH, device=DEVICE) for _ in range(COLUMNS[kind])]
    columns[1] += columns[0]
    return [F.normalize(column, dim=-1).to(dtype) for column in columns]


def empty_features(kind: str, rows: int) -> list[Tensor]:
    """As ``make_features``, without values, for FakeTensorMode."""
    return [torch.empty(rows, WIDTH, device=DEVICE) for _ in range(COLUMNS[kind])]


def make_scale(kind: str) -> Tensor:
    """What a loss multiplies similarities with."""
    return torch.tensor(SCALES[kind.partition("-")[0]], device=DEVICE)


def prepared(contrast: Contrast) -> Contrast:
    """The implementation, compiled anew where it is to be.

    Raises:
        UnsupportedError: it needs a GPU, and there is none.
    """
    if contrast.gpu and not GPU:
        raise UnsupportedError(f"{contrast.name}: needs a GPU")
    if not contrast.compiled:
        return contrast
    torch.compiler.reset()
    return dataclasses.replace(contrast, loss=torch.compile(contrast.loss, dynamic=False))


def gradients(contrast: Contrast, features: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Forward and backward.

    Args:
        contrast: of ``prepared``.
        features: of ``make_features``.
        scale: of ``make_scale``.

    Returns:
        The gradient of each column, and that of the scale where the implementation has one.

    Raises:
        UnsupportedError: the library is not installed, or has another interface.
    """
    leaves = [column.detach().requires_grad_() for column in features]
    learnt = scale.detach().requires_grad_(contrast.scaled)
    # As training scripts call a loss; sclkern's rounds no similarity.
    with torch.autocast(DEVICE, torch.bfloat16, enabled=features[0].dtype == torch.bfloat16):
        loss = contrast.loss(leaves, learnt)
    if loss is not None:
        loss.backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None] + ([learnt.grad] if learnt.grad is not None else [])


def exact_gradients(kind: str, features: list[Tensor], scale: Tensor) -> list[Tensor]:
    """The gradients in float64, by the formula, some rows at a time.

    Args:
        kind: of ``CONTRASTS``.
        features: of ``make_features``.
        scale: of ``make_scale``.

    Returns:
        Those of every column and of the scale.
    """
    precise = [column.detach().double().requires_grad_() for column in features]
    # The ranking loss normalises, which for unit features leaves out the part along them.
    used = precise if kind == "clip" else [F.normalize(column, dim=-1) for column in precise]
    anchors, candidates, s = used[0].detach(), torch.cat(used[1:]).detach(), scale.double()
    rows, both = len(anchors), kind == "clip"
    blocks = [slice(i, i + max(1, BLOCK // len(candidates))) for i in range(0, rows, max(1, BLOCK // len(candidates)))]
    of_columns = anchors.new_full((len(candidates),), -torch.inf)
    for block in blocks if both else ():
        of_columns = torch.logaddexp(of_columns, (s * anchors[block] @ candidates.T).logsumexp(0))
    by_anchor, by_candidate, by_scale = torch.zeros_like(anchors), torch.zeros_like(candidates), s.new_zeros(())
    for block in blocks:
        cosine = anchors[block] @ candidates.T
        share = (s * cosine).softmax(1)
        share.diagonal(block.start).sub_(1.0)
        if both:
            share += (s * cosine - of_columns).exp()
            share.diagonal(block.start).sub_(1.0)
        share /= rows * (1 + both)
        by_anchor[block], by_scale = s * share @ candidates, by_scale + (share * cosine).sum()
        by_candidate += s * share.T @ anchors[block]
    return [*torch.autograd.grad(used, precise, [by_anchor, *by_candidate.split(rows)]), by_scale]


def check(kind: str, contrast: Contrast, found: list[Tensor], exact: list[Tensor]) -> float:
    """Compare gradients with those of float64.

    Args:
        kind: of ``CONTRASTS``, for the message.
        contrast: what has computed them.
        found: of ``gradients``.
        exact: of ``exact_gradients``.

    Returns:
        The largest root mean square error, in units of the largest value of the gradient.

    Raises:
        WrongResultError: a gradient is missing, not finite, or further off than ``TOLERANCES`` allow.
    """
    wanted = exact if contrast.scaled else exact[:-1]
    if len(found) != len(wanted):
        raise WrongResultError(f"{kind} by {contrast.name}: {len(found)} gradients, expected {len(wanted)}")
    worst = max(errors(value, truth)[1] for value, truth in zip(found, wanted, strict=True))
    allowed = min(contrast.tolerance * TOLERANCES[found[0].dtype], 0.1)
    if not worst <= allowed:
        raise WrongResultError(
            f"{kind} by {contrast.name}: a gradient is off by {worst:.2e} in root mean square, allowed {allowed:.2e}; "
            "not timed"
        )
    return worst


def fits(contrast: Contrast, kind: str, rows: int) -> bool:
    """Whether float32 features of so many rows fit into ``MOST_BYTES``."""
    columns = rows * (COLUMNS[kind] - 1)
    return contrast.quadratic * rows * columns * 4 * 1.1 < MOST_BYTES


def countable(contrast: Contrast) -> bool:
    """Whether all that it allocates on this machine is made by operators: not in a custom op or a compiled function."""
    return not (contrast.compiled or contrast.gpu or contrast.name == "sclkern" or GPU)
