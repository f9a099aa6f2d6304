"""Other libraries, each by an adapter of a few lines; what is not installed, or cannot, is skipped with its reason."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ways import DTYPES, UnableError, Way

HALF = DTYPES[:2]


def load(package: str, module: str, name: str, *arguments: str) -> Callable:
    """The function ``name`` of ``module``, which takes these arguments by keyword.

    Raises:
        UnableError: the library is not installed, does not import here, or has another interface.
    """
    try:
        importlib.import_module(module.split(".")[0])
    except ImportError as error:
        lacks = "" if error.name == module.split(".")[0] else f", its import fails: {error}"
        raise UnableError(f"{package}: {'does not import' if lacks else 'not installed'}{lacks}") from None
    # The package index's "apex" is an unrelated web toolkit.
    if package == "apex" and importlib.util.find_spec("apex.normalization") is None:
        raise UnableError("apex: a library of this name is installed, but not NVIDIA's")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UnableError(f"{package}: {module}.{name} cannot be had: {error}") from None
    known = inspect.signature(function).parameters
    lacking = [argument for argument in arguments if argument not in known]
    if lacking:
        raise UnableError(f"{package}: {name} has no argument {', '.join(lacking)} in the installed version")
    return function


_VARLEN = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
# Name, module, whether its attention has dropout.
_FLASH = (
    ("flash-attn 2", "flash_attn", True),
    ("flash-attn 3", "flash_attn_interface", False),
    ("flash-attn 4", "flash_attn.cute", False),
)


def _flash(package: str, module: str, has_dropout: bool) -> Callable:
    def run(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
        options = {"dropout_p": dropout_p} if has_dropout else {}
        tensors = [inputs[name] for name in ("query", "key", "value")]
        if "cu_seqlens_q" in inputs:
            function = load(package, module, "flash_attn_varlen_func", *_VARLEN, *options)
            options |= {name: inputs[name] for name in _VARLEN}
        else:
            function = load(package, module, "flash_attn_func", *options)
            if inputs["key_padding_mask"] is not None:
                raise UnableError(f"{package}: no key padding mask; see packed_attention")
        out = function(*tensors, **options)
        # Versions 3 and 4 return the log-sum-exp as well.
        return out[0] if isinstance(out, tuple) else out

    return run


def _inf_cl(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    loss = load("inf-cl", "inf_cl", "cal_inf_loss", "scale", "head_dim")
    recovered, complete = (F.normalize(inputs[name].float(), dim=-1) for name in ("recovered", "complete"))
    scale = torch.full((), 1 / inputs["temperature"], device=recovered.device)
    return loss(recovered, complete, scale=scale) + loss(complete, recovered, scale=scale)


def _liger_cross_entropy(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    module, name = "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    function = load("liger-kernel", module, name, "input", "weight", "target", "bias")
    return function(inputs["hidden"], inputs["weight"], inputs["labels"], inputs["bias"])


def _cce(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    function = load("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", "filter_eps", "impl")
    return function(inputs["hidden"], inputs["weight"], inputs["labels"], filter_eps=None, impl="cce")


def _total(inputs: dict, dropout_p: float) -> Tensor:
    """What the layer norm of ``dropout_add_layer_norm`` normalises, for libraries that fuse the norm alone."""
    x = inputs["x"] + inputs["x_bias"].to(inputs["x"].dtype)
    return inputs["residual"] + F.dropout(x, dropout_p)


def _liger_layer_norm(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    function = load("liger-kernel", "liger_kernel.transformers.functional", "liger_layer_norm", "X", "W", "B", "eps")
    return function(_total(inputs, dropout_p), inputs["weight"], inputs["bias"], 1e-5)


def _apex_layer_norm(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    module, name = "apex.normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine"
    function = load("apex", module, name, "normalized_shape", "eps")
    total = _total(inputs, dropout_p)
    # In the dtype of its parameters.
    weight, bias = (inputs[name].to(total.dtype) for name in ("weight", "bias"))
    return function(total, weight, bias, (total.shape[-1],), eps=1e-5)


def _quack_layer_norm(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    function = load("quack", "quack.rmsnorm", "layernorm_fwd", "x", "weight", "bias", "eps")
    return function(_total(inputs, dropout_p), inputs["weight"], inputs["bias"], eps=1e-5)


def _peer(package: str, run: Callable, **options) -> Way:
    return Way(package.replace(" ", "-"), run, package=package, **options)


_FLASH_WAYS = tuple(
    _peer(package, _flash(package, module, dropout), dropout=dropout, dtypes=HALF)
    for package, module, dropout in _FLASH
)
PEERS: dict[str, tuple[Way, ...]] = {
    "attention": _FLASH_WAYS,
    "packed_attention": _FLASH_WAYS,
    # Its products are TF32 whatever comes.
    "completion_loss": (_peer("inf-cl", _inf_cl, dtypes=HALF),),
    "linear_cross_entropy": (
        _peer("liger-kernel", _liger_cross_entropy),
        _peer("cut-cross-entropy", _cce, without=("bias",), dtypes=HALF),
    ),
    "dropout_add_layer_norm": (
        _peer("liger-kernel", _liger_layer_norm),
        _peer("apex", _apex_layer_norm),
        _peer("quack", _quack_layer_norm, backward=False),
    ),
}
