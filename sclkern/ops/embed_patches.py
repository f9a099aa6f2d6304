"""``embed_patches``: patches to tokens with position, CLS, mask token and LayerNorm, fused around a matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.ops import embed_patches_eager
from sclkern.ops.dispatch import KERNEL_DTYPES, choose, interpreted, may_read

# The kernels hold whole rows in registers; see sclkern.kernels.embed_patches.
MAX_COLUMNS, MAX_ELEMENTS = 4096, 8192
# Of the op, after images and weight; and those that have a gradient.
PARAMETERS = ("position", "cls", "temporal", "keep", "replace", "mask_token", "norm_weight", "norm_bias")
LEARNED = tuple(name for name in PARAMETERS if name not in ("keep", "replace"))


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
    the patches again, which costs no memory as long as the caller keeps the images; what it keeps are the tokens, and
    these only for the normalisation. Every gradient is the same to the bit from run to run.

    Args:
        images: (B, F, C, S, S) floating, any strides. Where they require a gradient, the eager path is taken.
        weight: (D, C, p, p), the convolution whose stride is its size; p divides S. Under autocast it is cast as
            torch's own matrix product casts it.
        position: (1 + P, D), row 0 for the CLS. cls: (D,).
        temporal: (frames at most, D), added to every token of its frame, CLS included.
        keep: (B, K) int64, distinct patches of each sample, the same in every frame (``select_patches``). Checked on a
            CPU (but not in code that is being compiled), and on a GPU under ``SCLKERN_DEBUG=1``.
        replace: (B, P) bool, patches whose embedding is ``mask_token`` (D,), in every frame (``select_tokens``).
        norm_weight, norm_bias: (D,), of a LayerNorm over each token (CLIP's ``ln_pre``); None for no normalisation.
        eps: added to the variance.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``).

    Returns:
        (B, F * (1 + K), D), frame by frame, in the widest dtype of the token's addends; normalised under autocast,
        float32.

    Raises:
        TypeError: a tensor or eps has the wrong type. ValueError: wrong shape, device or range, one argument without
            the other it needs, or unknown backend. RuntimeError: second derivatives of the kernel;
            ``backend="eager"`` has them.
    """
    check(images, weight, position, cls, temporal, keep, replace, mask_token, norm_weight, norm_bias, eps)
    # A model hands over the mask token that it has, whether or not a step replaces anything.
    mask_token = None if replace is None else mask_token
    kind = images.device.type
    autocast = weight.dtype in KERNEL_DTYPES and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    weight = weight.to(torch.get_autocast_dtype(kind)) if autocast else weight
    parameters = (position, cls, temporal, mask_token, norm_weight, norm_bias)
    floating = [tensor for tensor in (images, weight, *parameters) if tensor is not None]
    if choose(*floating, backend=backend, unsupported=unsupported(images, weight)).backend == "eager":
        return reference.embed_patches(
            images,
            weight,
            position,
            cls,
            temporal=temporal,
            keep=keep,
            replace=replace,
            mask_token=mask_token,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
        )
    dtype = weight.dtype
    for tensor in (position, cls, temporal):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    dtype = torch.float32 if autocast and norm_weight is not None else dtype
    contiguous = (None if t is None else t.contiguous() for t in (weight, position, cls, temporal, keep, replace))
    last = (None if t is None else t.contiguous() for t in (mask_token, norm_weight, norm_bias))
    return torch.ops.sclkern.embed_patches(images, *contiguous, *last, eps=float(eps), dtype=dtype)[0]


def unsupported(images: Tensor, weight: Tensor | None = None) -> str | None:
    """Why the kernels cannot take these, or None."""
    if images.requires_grad and torch.is_grad_enabled():
        return "images require a gradient, which the kernels do not compute"
    columns, elements = (0, 0) if weight is None else (weight.shape[0], weight.shape[1:].numel())
    for count, limit, unit in ((columns, MAX_COLUMNS, "columns"), (elements, MAX_ELEMENTS, "pixels")):
        if count > limit:
            return f"rows of {count} {unit}, the kernel holds at most {limit} in registers"
    return None


def check(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    cls: Tensor,
    temporal: Tensor | None,
    keep: Tensor | None,
    replace: Tensor | None,
    mask_token: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> None:
    floating = {"images": images, "weight": weight, "position": position, "cls": cls, "temporal": temporal}
    floating |= {"mask_token": mask_token, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor in floating.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")
    for name, tensor, dtype in (("keep", keep, torch.int64), ("replace", replace, torch.bool)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    if not isinstance(eps, int | float) or isinstance(eps, bool):
        raise TypeError(f"eps: got {type(eps).__name__}, expected a number")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps}, expected 0 or more, and finite")
    if images.ndim != 5 or 0 in images.shape[1:]:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, F, C, S, S) with none but B zero")
    batch, frames, channels, height, width = images.shape
    size = weight.shape[-1] if weight.ndim == 4 else 0
    if size == 0 or weight.shape[0] == 0 or weight.shape[1:] != (channels, size, size) or height % size or width % size:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (D, C, p, p) with p a divisor of S, for images of "
            f"shape (B, F, C, S, S) = {tuple(images.shape)}"
        )
    columns, patches = weight.shape[0], (height // size) * (width // size)
    vectors = {"cls": cls, "mask_token": mask_token, "norm_weight": norm_weight, "norm_bias": norm_bias}
    expected = {name: (tensor, "(D,)", (columns,)) for name, tensor in vectors.items()}
    expected["position"] = (position, "(1 + P, D)", (1 + patches, columns))
    expected["replace"] = (replace, "(B, P)", (batch, patches))
    for name, (tensor, form, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {form} = {shape}")
    if temporal is not None and (temporal.ndim != 2 or temporal.shape[0] < frames or temporal.shape[1] != columns):
        raise ValueError(
            f"temporal: got shape {tuple(temporal.shape)}, expected (F or more, D) with F = {frames}, D = {columns}"
        )
    if keep is not None and (keep.ndim != 2 or keep.shape[0] != batch or keep.shape[1] > patches):
        raise ValueError(f"keep: got shape {tuple(keep.shape)}, expected (B, K) with B = {batch}, K up to {patches}")
    if replace is not None and mask_token is None:
        raise ValueError("mask_token: got None, expected (D,) with replace")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight, norm_bias: got one of them, expected both or none")
    for name, tensor in (floating | {"keep": keep, "replace": replace}).items():
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of images, {images.device}")
    if keep is not None and may_read(keep) and keep.numel():
        lowest, highest = (int(bound) for bound in keep.aminmax())
        if lowest < 0 or highest >= patches:
            raise ValueError(f"keep: got patches {lowest} to {highest}, expected 0 to P - 1 = {patches - 1}")
        if bool((keep.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise ValueError("keep: got a patch twice in a sample, expected distinct patches")


def _stages(images: Tensor) -> tuple:
    """The modules with the stages of the forward and of the backward: of one interface, kernels or eager."""
    if images.device.type == "cpu" and not interpreted():
        return embed_patches_eager, embed_patches_eager
    from sclkern.kernels import embed_patches, embed_patches_backward  # here, because Triton is optional

    return embed_patches, embed_patches_backward


def _forward(images: Tensor, weight: Tensor, *tensors: Tensor | None, eps: float, dtype: torch.dtype):
    stages, _ = _stages(images)
    parameters = dict(zip(PARAMETERS, tensors, strict=True))
    # Triton launches on the current device, which may not be the tensor's; the dtypes are settled already.
    with torch.cuda.device_of(images), torch.autocast(images.device.type, enabled=False):
        patches = stages.unfold_patches(
            images, weight.shape[-1], weight.dtype, parameters["keep"], parameters["replace"]
        )  # fmt: skip
        tokens = patches @ weight.flatten(1).T
        out, mean, rstd = stages.add_and_normalise(tokens, parameters, *images.shape[:2], eps, dtype)
    # What the backward needs: without normalisation no token.
    return out, tokens if mean.numel() else tokens.new_empty((0, tokens.shape[1])), mean, rstd


def _backward(grad_out: Tensor, images: Tensor, weight: Tensor, *saved: Tensor | None):
    forward_stages, stages = _stages(images)
    *tensors, tokens, mean, rstd = saved
    parameters = dict(zip(PARAMETERS, tensors, strict=True))
    with torch.cuda.device_of(images), torch.autocast(images.device.type, enabled=False):
        sums = stages.add_and_normalise_backward(
            grad_out.contiguous(), tokens, parameters, mean, rstd, images.shape[1]
        )  # fmt: skip
        patches = forward_stages.unfold_patches(
            images, weight.shape[-1], weight.dtype, parameters["keep"], parameters["replace"]
        )  # fmt: skip
        grad_weight = (sums["tokens"].T @ patches).reshape(weight.shape)
    sums["cls"] = sums["position"][0]
    if sums["temporal"] is not None:
        unused = parameters["temporal"].shape[0] - images.shape[1]
        sums["temporal"] = torch.nn.functional.pad(sums["temporal"], (0, 0, 0, unused))
    # A copy of the row that is the gradient of cls: results of an op share no memory.
    return [grad_weight] + [
        sums[name].to(parameters[name].dtype, copy=name == "cls") for name in LEARNED if parameters[name] is not None
    ]


# Written out, because the functions take the optional tensors as one tuple.
_TENSORS = "Tensor images, Tensor weight, Tensor position, Tensor cls, " + ", ".join(
    f"Tensor? {name}" for name in PARAMETERS[2:]
)
_op = torch.library.custom_op(
    "sclkern::embed_patches",
    _forward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"({_TENSORS}, *, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)
_op_backward = torch.library.custom_op(
    "sclkern::embed_patches_backward",
    _backward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"(Tensor grad_out, {_TENSORS}, Tensor tokens, Tensor mean, Tensor rstd) -> Tensor[]",
)


@_op.register_fake
def _(images, weight, *tensors, eps, dtype):
    position, _, _, keep, _, _, norm_weight, _ = tensors
    samples, frames = images.shape[:2]
    columns, kept = weight.shape[0], position.shape[0] - 1 if keep is None else keep.shape[1]
    rows = 0 if norm_weight is None else samples * frames * (kept + 1)
    return (
        images.new_empty((samples, frames * (kept + 1), columns), dtype=dtype),
        weight.new_empty((0 if norm_weight is None else samples * frames * kept, columns)),
        images.new_empty((rows,), dtype=torch.float32),
        images.new_empty((rows,), dtype=torch.float32),
    )


@_op_backward.register_fake
def _(grad_out, images, weight, *saved):
    parameters = dict(zip(PARAMETERS, saved, strict=False))
    learned = [parameters[name] for name in LEARNED]
    return [tensor.new_empty(tensor.shape) for tensor in (weight, *learned) if tensor is not None]


def _setup(ctx, inputs, keyword_only_inputs, output) -> None:
    _, tokens, mean, rstd = output
    ctx.mark_non_differentiable(tokens, mean, rstd)
    ctx.given = [tensor is not None for tensor in inputs]
    ctx.save_for_backward(*inputs, tokens, mean, rstd)


def _gradient(ctx, grad_out: Tensor, *_):
    gradients = iter(torch.ops.sclkern.embed_patches_backward(grad_out, *ctx.saved_tensors))
    learned = [name in ("weight", *LEARNED) for name in ("images", "weight", *PARAMETERS)]
    return tuple(
        next(gradients) if wanted and given else None for wanted, given in zip(learned, ctx.given, strict=True)
    )


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('embed_patches: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
