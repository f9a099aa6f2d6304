"""open_clip's contrastive losses in memory O(N D), and its accumulation with exact gradients.

``ClipLoss`` and ``SigLipLoss`` take the arguments of open_clip's classes of these names (3.3), by position and by name,
and compute the same values and gradients. One line of a training script changes::

    from sclkern.integrations.open_clip import ClipLoss  # in place of: from open_clip import ClipLoss

open_clip itself is not imported.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sclkern.distributed import compare, stack, total, world_size
from sclkern.errors import UserError
from sclkern.integrations.cached_step import cached_step
from sclkern.ops import completion_loss, sigmoid_loss

__all__ = ["ClipLoss", "SigLipLoss", "cached_step"]

# Logits of the sigmoid loss that are in memory at once: 16 MiB.
MAX_SCORES = 2**22
EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """CLIP's loss: the mean of the cross-entropies of images over texts and of texts over images.

    Features are contrasted as they come: open_clip's models normalise them. Values and gradients are those of open_clip
    for each choice of the flags, before and after the mean of DDP over ranks. One differs before it: of a local loss,
    each rank has the gradient of ``logit_scale`` of all rows, which is the mean over ranks. A ``logit_scale`` of
    exactly 0 gets a gradient of NaN; the exponential of a parameter is above 0.

    By ``local_loss`` and ``gather_with_grad``, the value and the gradient after the mean over ranks:

    - False, False: of all rows; of features, 1/W of that of one big batch
    - False, True: of all rows; that of one big batch
    - True, True: of the rows of this rank; that of one big batch
    - True, False: of the rows of this rank; candidates are constants, this rank's own, too

    Args:
        local_loss: the loss of the rows of this rank, against those of all.
        gather_with_grad: the gradient reaches the features of all ranks.
        cache_labels: taken, and without effect: there are no labels.
        rank: of this process.
        world_size: number of processes, those of the default group; 1: each contrasts its own rows.
        use_horovod: not supported.

    Raises:
        UserError: ``use_horovod``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise UserError("use_horovod: got True, expected False; start the processes with torchrun")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Compute the loss.

        Args:
            image_features: (B, D), normalised by the model; float16, bfloat16 or float32.
            text_features: (B, D); row i belongs to image i.
            logit_scale: factor of the similarities (not its logarithm), one number, learnable if a tensor.
            logit_bias: one number; a softmax does not see it, so that its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            Scalar float32, or the dictionary.

        Raises:
            UserError: rank or world_size is not that of torch.distributed; logit_scale or logit_bias has several
                numbers. TypeError, ValueError: see ``sclkern.ops.completion_loss``.
        """
        _check_world(self.rank, self.world_size)
        temperature = 1.0 / _number("logit_scale", logit_scale)
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            loss = _against_constants(image_features, text_features, temperature)
            loss = (loss + _against_constants(text_features, image_features, temperature)) / 2
        else:
            gather: Literal["exact", "published"] | None = "exact" if self.gather_with_grad else "published"
            rows = completion_loss(
                image_features, text_features, temperature=temperature, reduction="none", normalize=False,
                gather=gather if self.world_size > 1 else None,
            )  # fmt: skip
            loss = _mean(rows, self.rank if self.world_size > 1 and self.local_loss else None, len(image_features)) / 2
        if isinstance(logit_bias, Tensor):
            # Used, with a gradient of 0: DDP waits for the gradient of every parameter.
            loss = loss + 0.0 * _number("logit_bias", logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's loss: every pair of an image and a text is a decision of its own, by a sigmoid.

    Over ranks the value is that of the images of this rank against all texts, and the mean of the gradients is that of
    one big batch, as in open_clip; there it is computed for some images at a time, in plain torch.

    Args:
        cache_labels: taken, and without effect: there are no labels.
        rank: of this process.
        world_size: number of processes, those of the default group; 1: each takes its own pairs.
        dist_impl: how open_clip exchanges texts: "bidir", "shift", "reduce" or "gather"; taken, and without effect,
            because all have the same value and gradients.

    Raises:
        UserError: a ``dist_impl`` that open_clip does not know.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in EXCHANGES:
            raise UserError(f"dist_impl: got {dist_impl!r}, expected None or one of {', '.join(EXCHANGES)}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Any:
        """Compute the loss.

        Args:
            image_features: (B, D), normalised by the model; float16, bfloat16 or float32.
            text_features: (B, D); row i belongs to image i.
            logit_scale: factor of the similarities (not its logarithm), one number, learnable if a tensor.
            logit_bias: added to each, one number, learnable if a tensor; None: 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            Scalar float32, or the dictionary.

        Raises:
            UserError: rank or world_size is not that of torch.distributed; logit_scale or logit_bias has several
                numbers; features that are not (B, D), floating and on one device. ValueError: ranks differ in shape or
                dtype.
        """
        _check_world(self.rank, self.world_size)
        scale = _number("logit_scale", logit_scale)
        bias = 0.0 if logit_bias is None else _number("logit_bias", logit_bias)
        _check_features(image_features, text_features)
        if self.world_size == 1:
            loss = sigmoid_loss(image_features, text_features, scale=scale, bias=bias, gather=None)
        else:
            loss = _over_ranks(image_features, text_features, scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss


def _over_ranks(images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """SigLIP's loss of this rank's images against the texts of all ranks: the op has the value of all images."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    images, texts = images.to(dtype), texts.to(dtype)
    compare("text_features", texts)
    all_texts, first = _AllRows.apply(texts), dist.get_rank() * len(images)
    at_once = max(1, MAX_SCORES // max(1, len(all_texts)))
    added = images.new_zeros(())
    for row in range(0, len(images), at_once):
        part = images[row : row + at_once], all_texts, first + row, scale, bias
        # Computed again in the backward.
        added = added + checkpoint(_sigmoid_loss, *part, use_reentrant=False, preserve_rng_state=False)
    return added / len(images)


class _AllRows(torch.autograd.Function):
    """The rows of all ranks, rank by rank; a row has the gradients that all ranks have for it, added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        return stack(rows.contiguous()).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.size
        return total(grad)[first : first + ctx.size]


def _sigmoid_loss(images: Tensor, texts: Tensor, first: int, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """The sum over some images and all texts; image i belongs to text first + i."""
    with torch.autocast(images.device.type, enabled=False):
        logits = scale * (images @ texts.mT) + bias
    row = torch.arange(len(images), device=images.device)
    sign = torch.ones_like(logits)
    sign[row, first + row] = -1.0
    return F.softplus(sign * logits).sum()


def _mean(rows: Tensor, rank: int | None, own: int) -> Tensor:
    """The mean over the rows of all ranks; with a rank, the value is that of its own rows, and the gradient stays.

    The mean over ranks of the gradients of such local losses, gathered with gradient, is that of the loss of all.
    """
    mean = rows.mean()
    return mean if rank is None else mean + (rows[rank * own : (rank + 1) * own].mean() - mean).detach()


def _against_constants(anchors: Tensor, candidates: Tensor, temperature: float | Tensor) -> Tensor:
    """The cross-entropy of this rank's anchors over the candidates of all ranks, which have no gradient."""
    of_ranks, rank = stack(candidates.contiguous()), dist.get_rank()
    # The candidates of the anchors stand first.
    ordered = torch.cat([of_ranks[rank], *of_ranks[:rank], *of_ranks[rank + 1 :]])
    return completion_loss(
        anchors, ordered, temperature=temperature, directions="recovered_to_complete", normalize=False, gather=None
    )


def _check_features(image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
        raise UserError(f"image_features, text_features: got {shapes}, expected (B, D) of both")
    if not (image.is_floating_point() and text.is_floating_point() and image.device == text.device):
        given = f"{image.dtype} on {image.device} and {text.dtype} on {text.device}"
        raise UserError(f"image_features, text_features: got {given}, expected floating numbers on one device")


def _check_world(rank: int, world: int) -> None:
    if world == 1:
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            f"world_size: got {world}, but torch.distributed has no process group; start with torchrun and call "
            "torch.distributed.init_process_group, or leave world_size at 1"
        )
    if (rank, world) != (dist.get_rank(), world_size()):
        raise UserError(
            f"rank, world_size: got {rank}, {world}, expected those of torch.distributed: {dist.get_rank()}, "
            f"{world_size()}"
        )


def _number(name: str, value: float | Tensor) -> Any:
    """One number, in float32 at least: its reciprocal in half precision would be wrong in the third digit."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise UserError(f"{name}: got shape {tuple(value.shape)}, expected one number")
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
