"""``sigmoid_loss``: SigLIP's loss of two sets of features, fused, without the N x N logits in memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sclkern import reference
from sclkern.distributed import compare, stack, world_size
from sclkern.distributed import gather as gather_rows
from sclkern.kernels import sigmoid_loss_cpu as tiled
from sclkern.ops import _checks
from sclkern.ops._registration import choose, interpretable, kernels, public_op, register, second_derivative_error
from sclkern.ops.completion_loss import GATHERS, MAX_EAGER_ROWS
from sclkern.ops.dispatch import Choice, no_autocast, select_backend, takes_cpu_form


@public_op
def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    group: dist.ProcessGroup | None = None,
    gather: Literal["exact", "published"] | None = "exact",
    backend: str = "auto",
) -> Tensor:
    r"""SigLIP's loss (Zhai et al., arXiv 2303.15343): of each image and each text, whether they match.

    The formula is that of ``sclkern.reference.sigmoid_loss``: the mean over images of the sum over texts of
    -log sigmoid(z (scale image . text + bias)), with z = 1 for an image and its own text and -1 for all others.

    Memory is O(N D) with the kernels, beside at most 128 MiB of slopes in half precision, and on a CPU under "auto"
    when N is above 3072. At most 3072 rows of one process on a CPU, and ``backend="eager"`` by name, take the eager
    definition, which holds N x N and alone supports double backward.

    With W ranks each computes its own images against all texts, and the gradients of its own rows: 1/W of the work.
    Features and three numbers are exchanged in the forward, nothing in the backward. Every rank has the loss of all
    rows, the same to the bit. Only the eager definition computes everything on every rank.

    Args:
        image: (N, D); float16, bfloat16 or float32 (any floating dtype on the eager path), any strides; taken as it is:
            callers normalise.
        text: (N, D); row i belongs to row i of image. If the dtypes differ, both are promoted.
        scale: factor of the dot products: float, or 0-d tensor (learnable) on the device of the features. Of a
            learnable log scale s, ``s.exp()``.
        bias: added to them, likewise.
        group: process group whose rows are negatives too, if torch.distributed is initialised.
        gather: gradient of the features of this rank: "exact" is W times that of the loss of all rows, so that DDP's
            mean over ranks is the gradient of one big batch; "published" leaves the W out. Those of scale and bias are
            whole on every rank in both. None computes within the process.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        Scalar; float32, or float64 for float64 features. 0 with zero gradient without rows.

    Raises:
        TypeError: features, scale or bias not floating. ValueError: wrong shape, device or value; on every rank, if
            ranks differ in shape or dtype (see ``sclkern.distributed.compare``). RuntimeError: second derivatives
            other than by ``backend="eager"``.
    """
    path = choose("sigmoid_loss", check, plan, image, text, scale, bias, group, gather, backend)
    dtype = torch.promote_types(image.dtype, text.dtype)
    precise = torch.promote_types(dtype, torch.float32)
    image, text = image.to(dtype), text.to(dtype)
    world = 1 if gather is None else world_size(group)
    if world > 1:
        compare("image", image, group)
    if path == "eager":
        image, text = (gather_rows(x, group, gather) for x in (image, text))
        return reference.sigmoid_loss(image.to(precise), text.to(precise), scale=scale, bias=bias)
    numbers = [
        (x if isinstance(x, Tensor) else torch.full((), x, dtype=precise, device=image.device)).to(precise)
        for x in (scale, bias)
    ]
    image, text = image.contiguous(), text.contiguous()
    if world > 1:
        factor = world if gather == "exact" else 1
        return _AcrossRanks.apply(image, text, *numbers, group, factor)
    return _op(image, text, *numbers, 0, image.shape[0])[0]


def plan(
    image: Tensor | None, text: Tensor | None, *, group: dist.ProcessGroup | None = None, gather: str | None = "exact",
    backend: str = "auto", **_: Any,
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    if image is not None and text is not None and image.dtype != text.dtype:
        dtype = torch.promote_types(image.dtype, text.dtype)
        image, text = image.to(dtype), text.to(dtype)
    choice = select_backend(image, text, backend=backend)
    if image is None or not takes_cpu_form(choice, backend, image):
        return choice
    if gather is not None and world_size(group) > 1:
        return choice.via("tiled", "across ranks a CPU computes this rank's tiles alone")
    if image.shape[0] > MAX_EAGER_ROWS:
        return choice.via("tiled", f"above {MAX_EAGER_ROWS} rows a CPU works in tiles")
    return choice.via("eager", f"up to {MAX_EAGER_ROWS} rows a CPU takes the definition")


def check(
    image: Tensor, text: Tensor, scale: float | Tensor, bias: float | Tensor, group: dist.ProcessGroup | None,
    gather: str | None,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.floating(image=image, text=text)
    _checks.rank("(N, D)", (2,), image=image)
    _checks.shape("(N, D)", image.shape, text=text)
    for name, value in (("scale", scale), ("bias", bias)):
        if isinstance(value, Tensor):
            _checks.floating(**{name: value})
            _checks.shape("()", (), **{name: value})
        else:
            _checks.number(name, value)
    _checks.same_device("image", image, text=text, scale=scale, bias=bias)
    _checks.choice("gather", gather, GATHERS)


class _AcrossRanks(torch.autograd.Function):
    """The loss of the rows of all ranks, from this rank's (rows, D)."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup | None, factor: int
    ) -> Tensor:
        window = dist.get_rank(group) * image.shape[0], image.shape[0]
        images, texts = stack(torch.stack([image, text]), group).transpose(0, 1).flatten(1, 2).unbind()
        saved = images, texts, scale, bias
        sums = stack(torch.stack(torch.ops.sclkern.sigmoid_loss(*saved, *window)), group).sum(0)
        loss, *slopes = (x.clone() for x in sums.unbind())
        ctx.save_for_backward(*saved, *slopes)
        ctx.window, ctx.factor = window, factor
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise second_derivative_error("sigmoid_loss")
        needs = ctx.needs_input_grad[:4]
        gradients = torch.ops.sclkern.sigmoid_loss_backward(grad, *ctx.saved_tensors, *ctx.window, *needs[:2])
        factors = ctx.factor, ctx.factor, 1, 1
        scaled = (g * factor if need else None for g, factor, need in zip(gradients, factors, needs, strict=True))
        return *scaled, None, None


def _in_tiles(features: Tensor) -> bool:
    return features.device.type == "cpu" and not interpretable(features)


def _forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its derivatives by scale and bias, of ``rows`` images from offset on."""
    launch = tiled.forward if _in_tiles(image) else kernels.sigmoid_loss.sigmoid_loss_forward
    return launch(image, text, scale, bias, offset, rows)


def _backward(
    grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, by_scale: Tensor, by_bias: Tensor,
    offset: int, rows: int, needs_image: bool, needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    launch = tiled.gradient if _in_tiles(image) else kernels.sigmoid_loss.sigmoid_loss_gradient
    factor = grad_loss * scale / max(image.shape[0], 1)
    # Backward may be called under autocast, which would round the product of float32 features.
    with no_autocast(image):
        sides = ((needs_image, image, text), (needs_text, text, image))
        gradients = [
            launch(x, y, scale, bias, factor, offset, rows) if needed else x.new_empty(0) for needed, x, y in sides
        ]
    return gradients[0], gradients[1], grad_loss * by_scale, grad_loss * by_bias


def _fake(scale: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return scale.new_empty(()), scale.new_empty(()), scale.new_empty(())


def _fake_backward(
    image: Tensor, text: Tensor, scale: Tensor, rows: int, needs_image: bool, needs_text: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = rows, image.shape[1]
    sides = [x.new_empty(shape if needed else 0) for x, needed in ((image, needs_image), (text, needs_text))]
    return sides[0], sides[1], scale.new_empty(()), scale.new_empty(())


_op = register(
    "sigmoid_loss", _forward, _fake, _backward, _fake_backward,
    outputs="loss by_scale by_bias", gradients="image text scale bias", cpu=_forward, cpu_backward=_backward,
)  # fmt: skip
