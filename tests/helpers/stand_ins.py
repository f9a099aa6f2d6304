"""Stand-ins of flash-attn and apex: their signatures, argument for argument, and what they compute, by torch on a CPU.

Like the libraries, they refuse other dtypes, layouts and strides, leave what they would not write uninitialised (here
NaN) and cast as they would. Their signatures are those of

- flash_attn/flash_attn_interface.py of flash-attn 2.8.3.post2, whose csrc/flash_attn/flash_api.cpp has the checks
- apex/normalization/fused_layer_norm.py of apex at commit 014f30f
- apex/optimizers/fused_adam.py of apex at commit 004da4e
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from sclkern.libraries import apex, flash

FOUND = (flash.FUNCTION, flash.VARLEN_FUNCTION, apex.FUSED_LAYER_NORM, apex.FUSED_ADAM)
# What the functions of flash-attn were called with: (name, dropout_p, deterministic).
calls: list[tuple[str, float, bool]] = []


class _Attention(torch.autograd.Function):
    """Attention of sequences (start, end) of packed tokens; what belongs to none stays unwritten."""

    @staticmethod
    def forward(ctx, q, k, v, spans, dropout_p, softmax_scale):
        keeps = [torch.rand(q.shape[1], b - a, d - c) >= dropout_p for (a, b), (c, d) in spans]
        ctx.save_for_backward(q, k, v)
        ctx.call = spans, keeps, dropout_p, softmax_scale
        return _attend(q, k, v, *ctx.call)

    @staticmethod
    def backward(ctx, grad_out):
        spans = ctx.call[0]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            written = torch.cat([torch.arange(a, b) for (a, b), _ in spans])
            out = _attend(*leaves, *ctx.call)[written]
        grads = torch.autograd.grad(out, leaves, grad_out[written])
        filled = []
        for grad, side in zip(grads, (0, 1, 1), strict=True):
            known = torch.zeros(len(grad), dtype=torch.bool)
            for span in spans:
                known[slice(*span[side])] = True
            filled.append(grad.masked_fill(~known[:, None, None], torch.nan))
        return *filled, None, None, None


def _attend(q, k, v, spans, keeps, dropout_p, softmax_scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.full_like(q, torch.nan)
    for ((a, b), (c, d)), keep in zip(spans, keeps, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b].to(wide), k[c:d].to(wide)) * softmax_scale
        p = scores.softmax(-1) * keep / (1 - dropout_p) if d > c else scores
        out[a:b] = torch.einsum("hqk,khd->qhd", p, v[c:d].to(wide)).to(q.dtype)
    return out


def _check(q, k, v, dropout_p, causal, window_size, softcap, alibi_slopes):
    assert q.dtype == k.dtype == v.dtype and q.dtype in flash.DTYPES, (q.dtype, k.dtype, v.dtype)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[-2:] == k.shape[-2:] and k.shape == v.shape and q.shape[-1] <= 256 and 0 <= dropout_p < 1
    assert (causal, window_size, softcap, alibi_slopes) == (False, (-1, -1), 0.0, None)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """q (batch_size, seqlen, nheads, headdim)."""
    _check(q, k, v, dropout_p, causal, window_size, softcap, alibi_slopes)
    assert q.ndim == k.ndim == 4 and q.shape[0] == k.shape[0] > 0 and q.shape[1] and k.shape[1]
    assert not return_attn_probs
    calls.append(("flash_attn_func", dropout_p, deterministic))
    (batch, lq), lk = q.shape[:2], k.shape[1]
    spans = [((i * lq, i * lq + lq), (i * lk, i * lk + lk)) for i in range(batch)]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
    return _Attention.apply(*flat, spans, dropout_p, scale).unflatten(0, (batch, lq))


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """q (total_q, nheads, headdim)."""
    _check(q, k, v, dropout_p, causal, window_size, softcap, alibi_slopes)
    assert q.ndim == k.ndim == 3 and not return_attn_probs and block_table is None
    for ends, longest, tokens in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.shape == cu_seqlens_q.shape
        assert len(ends) > 1 and isinstance(longest, int) and longest > 0
        assert ends[0] == 0 and ends.diff().min() >= 0 and ends.diff().max() <= longest and ends[-1] <= len(tokens)
    calls.append(("flash_attn_varlen_func", dropout_p, deterministic))
    sides = (list(zip(ends.tolist(), ends.tolist()[1:], strict=False)) for ends in (cu_seqlens_q, cu_seqlens_k))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Attention.apply(q, k, v, list(zip(*sides, strict=True)), dropout_p, scale)


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    """In the dtype of all three, which autocast makes that of products."""
    if torch.is_autocast_enabled("cpu"):
        input, weight, bias = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (input, weight, bias))
    assert input.dtype == weight.dtype == bias.dtype
    with torch.autocast("cpu", enabled=False):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)


class FusedAdam(torch.optim.Optimizer):
    """Adam that counts its steps in the groups, and whose ``zero_grad`` takes no argument."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        use_master=False,
    ):
        assert not (amsgrad or capturable or use_master)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self.adam_w_mode, self.set_grad_none = adam_w_mode, set_grad_none

    def zero_grad(self):
        super().zero_grad(set_to_none=self.set_grad_none)

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        assert (closure, grads, output_params, scale, grad_norms, grad_scaler) == (None,) * 6
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), decay, lr = group["betas"], group["weight_decay"], group["lr"]
            corrections = [1 - beta ** group["step"] if group["bias_correction"] else 1 for beta in (beta1, beta2)]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                gradient = p.grad if self.adam_w_mode else p.grad + decay * p
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].lerp_(gradient * gradient, 1 - beta2)
                denominator = (state["exp_avg_sq"] / corrections[1]).sqrt() + group["eps"]
                update = state["exp_avg"] / corrections[0] / denominator
                p.sub_(lr * (update + decay * p if self.adam_w_mode else update))


def _module(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    return module


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in the place of the libraries, on a CPU and for every floating dtype."""
    flash_attn = _module(
        "flash_attn",
        __version__="2.8.3.post2",
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    fused = _module("apex.normalization.fused_layer_norm", fused_layer_norm_affine=fused_layer_norm_affine)
    modules = (
        flash_attn, _module("apex"), _module("apex.normalization"), fused,
        _module("apex.optimizers", FusedAdam=FusedAdam), _module("fused_layer_norm_cuda"), _module("amp_C"),
    )  # fmt: skip
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(flash, "DTYPES", {*flash.DTYPES, torch.float32, torch.float64})
    for library in (flash, apex):
        monkeypatch.setattr(library, "DEVICE_TYPES", {*library.DEVICE_TYPES, "cpu"})
    look_again(monkeypatch)
    calls.clear()


def look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the libraries at their next use, and not remember what a test found."""
    for found in FOUND:
        monkeypatch.setattr(found, "call", None)
        monkeypatch.setattr(found, "_problem", None)
