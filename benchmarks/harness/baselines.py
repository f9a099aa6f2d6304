"""Other libraries, each behind an adapter of a few lines; cases that one cannot compute are skipped with the reason."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.implementations import DTYPES, Implementation, UnsupportedError

HALF = DTYPES[:2]


def load(package: str, module: str, name: str, *arguments: str) -> Callable:
    """Find the function of a library that may not be installed.

    Args:
        package: name of the library in messages.
        module: the module that holds the function.
        name: the function.
        *arguments: arguments that the function must take by keyword.

    Returns:
        The function.

    Raises:
        UnsupportedError: the library is not installed, does not import here, or has another interface.
    """
    try:
        importlib.import_module(module.split(".")[0])
    except ImportError as error:
        absent = error.name == module.split(".")[0]
        reason = "not installed" if absent else f"does not import, its import fails: {error}"
        raise UnsupportedError(f"{package}: {reason}") from None
    # The package index's "apex" is an unrelated web toolkit.
    if package == "apex" and importlib.util.find_spec("apex.normalization") is None:
        raise UnsupportedError("apex: a library of this name is installed, but not NVIDIA's")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UnsupportedError(f"{package}: {module}.{name} is missing: {error}") from None
    parameters = inspect.signature(function).parameters
    missing = [argument for argument in arguments if argument not in parameters]
    if missing:
        raise UnsupportedError(f"{package}: {name} has no argument {', '.join(missing)} in the installed version")
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
                raise UnsupportedError(f"{package}: no key padding mask; see packed_attention")
            if "bias" in inputs:
                raise UnsupportedError(f"{package}: no bias of the scores")
        out = function(*tensors, **options)
        # Versions 3 and 4 return the log-sum-exp as well.
        return out[0] if isinstance(out, tuple) else out

    return run


def _inf_cl(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    if len(inputs["recovered"]) != len(inputs["complete"]):
        raise UnsupportedError("inf-cl: as many columns as rows only, in both directions")
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


def _residual_sum(inputs: dict, dropout_p: float) -> Tensor:
    """What ``dropout_add_layer_norm`` normalises, for libraries that fuse the LayerNorm only."""
    x = inputs["x"] + inputs["x_bias"].to(inputs["x"].dtype)
    return inputs["residual"] + F.dropout(x, dropout_p)


def _liger_layer_norm(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    function = load("liger-kernel", "liger_kernel.transformers.functional", "liger_layer_norm", "X", "W", "B", "eps")
    return function(_residual_sum(inputs, dropout_p), inputs["weight"], inputs["bias"], 1e-5)


def _apex_layer_norm(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    module, name = "apex.normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine"
    function = load("apex", module, name, "normalized_shape", "eps")
    total = _residual_sum(inputs, dropout_p)
    # The output has the dtype of the parameters.
    weight, bias = (inputs[name].to(total.dtype) for name in ("weight", "bias"))
    return function(total, weight, bias, (total.shape[-1],), eps=1e-5)


def _quack_layer_norm(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    function = load("quack", "quack.rmsnorm", "layernorm_fwd", "x", "weight", "bias", "eps")
    total = _residual_sum(inputs, dropout_p)
    # It takes rows, and parameters in float32 alone.
    weight, bias = (inputs[name].float() for name in ("weight", "bias"))
    return function(total.flatten(0, -2), weight, bias, eps=1e-5).view_as(total)


def _baseline(package: str, run: Callable, **options) -> Implementation:
    return Implementation(package.replace(" ", "-"), run, package=package, **options)


_FLASH_BASELINES = tuple(
    _baseline(package, _flash(package, module, dropout), dropout=dropout, dtypes=HALF)
    for package, module, dropout in _FLASH
)
BASELINES: dict[str, tuple[Implementation, ...]] = {
    "attention": _FLASH_BASELINES,
    "packed_attention": _FLASH_BASELINES,
    # Its products are TF32 for every dtype.
    "completion_loss": (_baseline("inf-cl", _inf_cl, dtypes=HALF),),
    "linear_cross_entropy": (
        # Both count or look for the rows that have a label, on the host.
        _baseline("liger-kernel", _liger_cross_entropy, reads_back=True),
        _baseline("cut-cross-entropy", _cce, without=("bias",), dtypes=HALF, reads_back=True),
    ),
    "dropout_add_layer_norm": (
        _baseline("liger-kernel", _liger_layer_norm),
        _baseline("apex", _apex_layer_norm),
        _baseline("quack", _quack_layer_norm, backward=False),
    ),
}
