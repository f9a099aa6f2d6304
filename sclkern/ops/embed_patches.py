"""``embed_patches``: patches to tokens with position, CLS, mask token and LayerNorm, fused around a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sclkern import reference
from sclkern.ops import _checks
from sclkern.ops._registration import choose, kernels, public_op, register
from sclkern.ops.dispatch import KERNEL_DTYPES, Choice, autocast, is_autocast, may_read, no_autocast, select_backend

# The kernels hold whole rows in registers; see sclkern.kernels.embed_patches.
MAX_COLUMNS, MAX_ELEMENTS = 4096, 8192


@public_op
def embed_patches(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    cls: Tensor,
    *,
    temporal: Tensor | None = None,
    keep: Tensor | None = None,
    replace: Tensor | None = None,
    mask_token: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Embed the kept patches of each frame, add positions, put a CLS token before each frame, and normalise.

    Dropped patches are never read, nor are the pixels of replaced ones. Tokens are the product of the unfolded patches
    and the weight in the weight's dtype; all that follows is float32 in one pass, written once. The backward unfolds
    the patches again, which costs no memory as long as the caller keeps the images; it keeps the tokens, and only for
    the normalisation. Every gradient is the same to the bit from run to run.

    Args:
        images: (B, F, C, S, S) floating, any strides. If they require a gradient, the eager path is taken.
        weight: (D, C, p, p), the convolution whose stride is its size; p divides S. Under autocast it is cast as
            torch's own matrix product casts it.
        position: (1 + P, D), row 0 for the CLS.
        cls: (D,).
        temporal: (frames at most, D), added to every token of its frame, CLS included.
        keep: (B, K) int64, distinct patches of each sample, the same in every frame (``select_patches``). Checked on a
            CPU (but not in code that is being compiled), and on a GPU under ``SCLKERN_DEBUG=1``.
        replace: (B, P) bool, patches whose embedding is ``mask_token``, in every frame (``select_tokens``).
        mask_token: (D,), required with ``replace`` and unused without it.
        norm_weight: (D,), of a LayerNorm over each token (CLIP's ``ln_pre``); None for no normalisation.
        norm_bias: (D,), given together with ``norm_weight``.
        eps: added to the variance.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        (B, F * (1 + K), D), frame by frame, in the widest dtype of the token's addends; normalised under autocast,
        float32.

    Raises:
        TypeError: a tensor or eps has the wrong type. ValueError: wrong shape, device or range, one argument without
            the other it needs, or unknown backend. RuntimeError: second derivatives of the kernel;
            ``backend="eager"`` has them.
    """
    learned, masks = (images, weight, position, cls, temporal), (keep, replace, mask_token)
    path = choose("embed_patches", check, plan, *learned, *masks, norm_weight, norm_bias, eps, backend)
    # A model hands over the mask token that it has, whether or not a step replaces anything.
    mask_token = None if replace is None else mask_token
    under_autocast, weight = is_autocast(weight) and weight.dtype in KERNEL_DTYPES, autocast(weight)
    optional: dict[str, Tensor | None] = {"temporal": temporal, "keep": keep, "replace": replace}
    optional |= {"mask_token": mask_token, "norm_weight": norm_weight, "norm_bias": norm_bias}
    if path == "eager":
        return reference.embed_patches(images, weight, position, cls, **optional, eps=eps)
    dtype = weight.dtype
    for tensor in (position, cls, temporal):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    # Under autocast a norm is float32, as torch's own is.
    dtype = torch.float32 if under_autocast and norm_weight is not None else dtype
    tensors = (None if t is None else t.contiguous() for t in (weight, position, cls, *optional.values()))
    return _op(images, *tensors, float(eps), dtype)[0]


def plan(
    images: Tensor | None, weight: Tensor | None, position: Tensor | None, cls: Tensor | None, *,
    temporal: Tensor | None = None, replace: Tensor | None = None, mask_token: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, backend: str = "auto", **_: Any,
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    unsupported: list[str] = []
    if images is not None and images.requires_grad and torch.is_grad_enabled():
        unsupported.append("images require a gradient, which the kernels do not compute")
    columns, elements = (0, 0) if weight is None else (weight.shape[0], weight.shape[1:].numel())
    for count, limit, unit in ((columns, MAX_COLUMNS, "columns"), (elements, MAX_ELEMENTS, "pixels")):
        if count > limit:
            unsupported.append(f"rows of {count} {unit}, the kernel holds at most {limit} in registers")
    weight = None if weight is None else autocast(weight)
    mask_token = None if replace is None else mask_token
    floating = images, weight, position, cls, temporal, mask_token, norm_weight, norm_bias
    return select_backend(*floating, backend=backend, unsupported=tuple(unsupported))


def check(
    images: Tensor, weight: Tensor, position: Tensor, cls: Tensor, temporal: Tensor | None, keep: Tensor | None,
    replace: Tensor | None, mask_token: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    optional = {"temporal": temporal, "mask_token": mask_token, "norm_weight": norm_weight, "norm_bias": norm_bias}
    floating = {"weight": weight, "position": position, "cls": cls, **_checks.given(**optional)}
    _checks.floating(images=images, **floating)
    _checks.dtype(torch.int64, **_checks.given(keep=keep))
    _checks.dtype(torch.bool, **_checks.given(replace=replace))
    _checks.number("eps", eps, 0)
    if images.ndim != 5 or 0 in images.shape[1:]:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, F, C, S, S), only B may be 0")
    batch, frames, channels, height, width = images.shape
    size = weight.shape[-1] if weight.ndim == 4 else 0
    if size == 0 or weight.shape[0] == 0 or weight.shape[1:] != (channels, size, size) or height % size or width % size:
        expected = f"(D, C, p, p) with p a divisor of S for images (B, F, C, S, S) = {tuple(images.shape)}"
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected {expected}")
    columns, patches = weight.shape[0], (height // size) * (width // size)
    _checks.shape("(D,)", (columns,), cls=cls, mask_token=mask_token, norm_weight=norm_weight, norm_bias=norm_bias)
    _checks.shape("(1 + P, D)", (1 + patches, columns), position=position)
    _checks.shape("(B, P)", (batch, patches), replace=replace)
    if temporal is not None and (temporal.ndim != 2 or temporal.shape[0] < frames or temporal.shape[1] != columns):
        expected = f"(F or more, D) with F = {frames}, D = {columns}"
        raise ValueError(f"temporal: got shape {tuple(temporal.shape)}, expected {expected}")
    if keep is not None and (keep.ndim != 2 or keep.shape[0] != batch or keep.shape[1] > patches):
        raise ValueError(f"keep: got shape {tuple(keep.shape)}, expected (B, K) with B = {batch}, K up to {patches}")
    if replace is not None and mask_token is None:
        raise ValueError("mask_token: got None, expected (D,) with replace")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight, norm_bias: got one of them, expected both or none")
    _checks.same_device("images", images, **floating, keep=keep, replace=replace)
    if keep is not None and may_read(keep) and keep.numel():
        lowest, highest = (int(bound) for bound in keep.aminmax())
        if lowest < 0 or highest >= patches:
            raise ValueError(f"keep: got patches {lowest} to {highest}, expected 0 to P - 1 = {patches - 1}")
        if bool((keep.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise ValueError("keep: got a patch twice in a sample, expected distinct patches")


def _forward(
    images: Tensor, weight: Tensor, position: Tensor, cls: Tensor, temporal: Tensor | None, keep: Tensor | None,
    replace: Tensor | None, mask_token: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    launchers = kernels.embed_patches
    parameters = position, cls, temporal, keep, replace, mask_token, norm_weight, norm_bias
    # Autocast would round the product of float32 patches; the dtypes are settled already.
    with no_autocast(images):
        patches = launchers.unfold_patches(images, weight.shape[-1], weight.dtype, keep, replace)
        tokens = patches @ weight.flatten(1).T
        out, mean, rstd = launchers.add_and_normalise(tokens, parameters, *images.shape[:2], eps, dtype)
    # What the backward needs: without normalisation no token.
    return out, tokens if mean.numel() else tokens.new_empty((0, tokens.shape[1])), mean, rstd


def _backward(
    grad_out: Tensor, images: Tensor, weight: Tensor, position: Tensor, cls: Tensor, temporal: Tensor | None,
    keep: Tensor | None, replace: Tensor | None, mask_token: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, tokens: Tensor, mean: Tensor, rstd: Tensor,
) -> list[Tensor]:  # fmt: skip
    parameters = position, cls, temporal, keep, replace, mask_token, norm_weight, norm_bias
    with no_autocast(images):
        launch = kernels.embed_patches_backward.add_and_normalise_backward
        inputs = grad_out.contiguous(), tokens, parameters, mean, rstd, images.shape[1]
        grad_tokens, grad_position, of_frames, sums = launch(*inputs)
        patches = kernels.embed_patches.unfold_patches(images, weight.shape[-1], weight.dtype, keep, replace)
        grad_weight = (grad_tokens.T @ patches).view(weight.shape)
    unused = 0 if temporal is None else temporal.shape[0] - images.shape[1]
    of_frames = torch.nn.functional.pad(of_frames, (0, 0, 0, unused)) if unused else of_frames
    return [tensor for tensor in (grad_weight, grad_position, of_frames, sums) if tensor is not None]


def _finish(results: Sequence[Tensor]) -> Sequence[Tensor]:
    # Autograd casts sums to the dtypes of the parameters. A copy of the row that is the gradient of cls: in place,
    # both could be scaled.
    grad_weight, grad_position, *of_frames, sums = results
    return [grad_weight, grad_position, grad_position[0].clone(), *of_frames, *sums.unbind()]


def _fake(
    images: Tensor, weight: Tensor, position: Tensor, keep: Tensor | None, norm_weight: Tensor | None,
    dtype: torch.dtype, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    samples, frames = images.shape[:2]
    columns, kept = weight.shape[0], position.shape[0] - 1 if keep is None else keep.shape[1]
    rows = 0 if norm_weight is None else samples * frames * (kept + 1)
    out = images.new_empty((samples, frames * (kept + 1), columns), dtype=dtype)
    tokens = weight.new_empty((0 if norm_weight is None else samples * frames * kept, columns))
    return out, tokens, *(images.new_empty((rows,), dtype=torch.float32) for _ in range(2))


def _fake_backward(weight: Tensor, position: Tensor, temporal: Tensor | None, **tensors: Any) -> list[Tensor]:
    sums = sum(tensors[name] is not None for name in GRADIENTS.split()[4:])
    shapes = position.shape, *([] if temporal is None else [temporal.shape]), (sums, position.shape[1])
    return [weight.new_empty(weight.shape), *(weight.new_empty(shape, dtype=torch.float32) for shape in shapes)]


GRADIENTS = "weight position cls temporal mask_token norm_weight norm_bias"
_op = register(
    "embed_patches", _forward, _fake, _backward, _fake_backward, outputs="out tokens mean rstd", gradients=GRADIENTS,
    finish=_finish,
)  # fmt: skip
