"""Kernels for a CPU, for tests alone: an op computed by its eager definition, with everything around it as on a GPU.

sclkern has none: on a CPU its functions take other paths. Here the registration, the fake functions and the autograd of
an op run, and so do compiled code and modules on the path of the kernels, without Triton's interpreter.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from sclkern import reference
from sclkern.ops._registration import RUNNERS
from sclkern.ops.dispatch import interpreted
from sclkern.reference.attention import attention_dropout
from sclkern.reference.cross_attention import absorbed_attention, masked_softmax
from sclkern.tools.specs import SPECS

_LIBRARY = torch.library.Library("sclkern", "IMPL")


def _dropout_add_layer_norm(
    weight, bias, x_bias, seed, dropout_ids, dropout_p, x=None, residual=None, total=None, eps=1e-5, return_sum=False,
    return_copy=False, **_,
):  # fmt: skip
    options = {
        "dropout_ids": dropout_ids,
        "x_bias": x_bias,
        "dropout_p": dropout_p if seed is not None else 0.0,
        "seed": seed,
        "eps": eps,
        "return_sum": return_sum,
        "return_copy": return_copy,
    }
    return reference.dropout_add_layer_norm(x, residual, weight, bias, **options)


def _note_eps(arguments, statistics):
    """Put ``eps`` in place of rstd, from which the real backward has it."""
    statistics[-1].fill_(arguments["eps"])


def _inputs_of_the_sum(arguments):
    """``arguments`` of the backward with an x of zeros and the residual that makes the sum, where it saved the sum."""
    total, rstd = arguments["total"], arguments["rstd"]
    arguments = arguments | {"bias": torch.zeros_like(arguments["weight"]), "return_sum": total is not None}
    arguments |= {"eps": rstd.flatten()[0].item()} if rstd.numel() else {}
    if total is None:
        grad = arguments["grad_second"]
        return arguments | {"return_copy": grad is not None and grad.shape[0] == rstd.shape[0]}
    values = arguments | {"x": torch.zeros_like(total), "residual": torch.zeros_like(total)}
    shift = _dropout_add_layer_norm(**values)[1]
    dtypes = arguments["x_dtype"], arguments["residual_dtype"]
    return values | {"x": values["x"].to(dtypes[0]), "residual": (total - shift).to(dtypes[1])}


def _embed_patches(images, weight, position, cls, eps=1e-5, dtype=None, **others):
    out = reference.embed_patches(images, weight, position, cls, **others, eps=eps)
    return out if dtype is None else out.to(dtype)


def _select_patches(seed, num_patches, keep_ratio, batch, row_ids):
    return reference.select_patches(num_patches, keep_ratio, batch, seed=seed, row_ids=row_ids)


def _select_tokens(seed, num_patches, ratio, batch, row_ids):
    return reference.select_tokens(num_patches, ratio, batch, seed=seed, row_ids=row_ids)


def _mask_text(completion, **arguments):
    return reference.mask_text(**arguments, kind="completion" if completion else "mlm")


def _attention(
    query, key, value, mask, cu_seqlens_q, cu_seqlens_k, seed, dropout_ids, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, shared,
):  # fmt: skip
    options = {"seed": seed, "dropout_ids": dropout_ids, "dropout_p": dropout_p, "softmax_scale": softmax_scale}
    if cu_seqlens_q is None:
        return reference.attention(query, key, value, key_padding_mask=mask, **options)
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return reference.packed_attention(query, key, value, *packing, **options)


def _attention_with_bias(query, key, value, bias, mask, seed, dropout_ids, dropout_p, softmax_scale, shared=0):
    options = {"seed": seed, "dropout_ids": dropout_ids, "dropout_p": dropout_p, "softmax_scale": softmax_scale}
    return reference.attention(query, key, value, key_padding_mask=mask, bias=bias, **options)


def _cross_attention(x, score_weight, score_bias, value_weight, out_bias, mask, seed, dropout_ids, dropout_p):
    tensors = x, score_weight, score_bias, value_weight, out_bias, mask
    return absorbed_attention(*tensors, dropout_p=dropout_p, seed=seed, dropout_ids=dropout_ids)


def _cross_attention_softmax(scores, mask, seed, dropout_ids, dropout_p):
    p = masked_softmax(scores, None if mask is None else mask[:, None, None])
    p_dropped = attention_dropout(p, dropout_p, seed, dropout_ids)
    return p_dropped, p_dropped.sum(-1)


# By op, from its inputs (by the names of its schema) to its first outputs; the others are statistics. An op that is not
# here gives its inputs to its definition by name.
DEFINITIONS: dict[str, Callable[..., Any]] = {
    "attention": _attention,
    "attention_with_bias": _attention_with_bias,
    "cross_attention": _cross_attention,
    "cross_attention_softmax": _cross_attention_softmax,
    "dropout_add_layer_norm": _dropout_add_layer_norm,
    "embed_patches": _embed_patches,
    "mask_text": _mask_text,
    "select_patches": _select_patches,
    "select_tokens": _select_tokens,
}
# Statistics that stand for arguments which the backward does not get.
STATISTICS: dict[str, Callable[[dict, list], None]] = {"dropout_add_layer_norm": _note_eps}
# Where the backward does not get the inputs of the forward: arguments that lead to the same gradients.
INPUTS: dict[str, Callable[[dict], dict]] = {"dropout_add_layer_norm": _inputs_of_the_sum}


def _attention_results(gradients, arguments):
    """The last ``shared`` gradients in one tensor."""
    shared = arguments["shared"]
    joint = [torch.stack(gradients[3 - shared :], -3)] if shared else []
    return [*gradients[: 3 - shared], *joint, *(gradients[0].new_zeros((0,)) for _ in range(max(0, shared - 1)))]


def _attention_with_bias_results(gradients, arguments):
    """As those of attention; that of the bias only where it is needed."""
    *of_tokens, of_bias = gradients
    return [*_attention_results(of_tokens, arguments), of_bias if arguments["needs_bias"] else of_bias.new_empty((0,))]


def _embed_patches_results(gradients, arguments):
    """That of cls is a row of that of position; those of small parameters are in one tensor."""
    weight, position, _, *others = gradients
    frames, small = ([], others) if arguments["temporal"] is None else (others[:1], others[1:])
    return [weight, position, *frames, torch.stack(small) if small else position.new_empty((0, position.shape[1]))]


# Where the backward does not return the gradients of the inputs one by one.
RESULTS: dict[str, Callable[[list, dict], list]] = {
    "attention": _attention_results,
    "attention_with_bias": _attention_with_bias_results,
    "embed_patches": _embed_patches_results,
    "dropout_add_layer_norm": lambda gradients, _: [*gradients[:2], torch.stack([g.float() for g in gradients[2:]])],
}


@functools.cache
def install() -> None:
    """Register the kernels once, where Triton does not interpret its own."""
    if interpreted():
        return
    for name in dict.fromkeys([*SPECS, *DEFINITIONS]):
        op = hasattr(torch.ops.sclkern, name) and getattr(torch.ops.sclkern, name).default
        if not op or torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU"):
            # packed_attention has the op of attention; other ops run on a CPU by themselves.
            continue
        definition = DEFINITIONS.get(name) or SPECS[name].definition
        _install(name, _forward(op, definition, STATISTICS.get(name)))
        if hasattr(torch.ops.sclkern, f"{name}_backward"):
            backward = getattr(torch.ops.sclkern, f"{name}_backward").default
            _install(
                f"{name}_backward",
                _backward(
                    op, backward, definition, INPUTS.get(name, dict), RESULTS.get(name, lambda gradients, _: gradients)
                ),
            )


def _install(name, function):
    """For the dispatcher, and for calls that leave it out."""
    _LIBRARY.impl(name, function, "CPU")
    RUNNERS[name]["cpu"] = function


def _forward(op, definition, note=None):
    def forward(*inputs):
        arguments = dict(zip(_names(op), inputs, strict=True))
        computed = _tuple(definition(**arguments))
        results = _allocate(op, inputs)
        results[: len(computed)] = map(_like, computed, results)
        if note is not None:
            note(arguments, results[len(computed) :])
        return tuple(results) if len(results) > 1 else results[0]

    return forward


def _backward(op, backward, definition, prepare, collect):
    def run(*inputs):
        arguments = dict(zip(_names(backward), inputs, strict=True))
        gradients: list[torch.Tensor] = []
        # Autograd is off in a kernel; a new thread begins with it.
        thread = threading.Thread(target=lambda: gradients.extend(differentiate(arguments)))
        thread.start()
        thread.join()
        results = list(map(_like, collect(gradients, arguments), _allocate(backward, inputs)))
        return results if "[]" in str(backward._schema.returns[0].type) else tuple(results)

    def differentiate(arguments):
        grads = [value for name, value in arguments.items() if name.startswith("grad_")]
        values = {name: value for name, value in prepare(arguments).items() if name in _names(op)}
        leaves = [name for name, value in values.items() if torch.is_tensor(value) and value.is_floating_point()]
        # Images have no gradient.
        leaves = [name for name in leaves if name != "images"]
        leaves.sort(key=_names(op).index)
        values |= {name: values[name].detach().requires_grad_() for name in leaves}
        outputs = [
            (out, grad) for out, grad in zip(_tuple(definition(**values)), grads, strict=False) if grad is not None
        ]
        grads = [_like(grad, out) for out, grad in outputs]
        # Of one output alone some inputs may have none.
        inputs = [values[name] for name in leaves]
        return torch.autograd.grad([out for out, _ in outputs], inputs, grads, materialize_grads=True)

    return run


def _names(op) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def _tuple(out) -> tuple:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def _allocate(op, inputs) -> list[torch.Tensor]:
    """Zeros as the fake function of the op allocates its results."""
    fake = torch._library.simple_registry.singleton.find(op.name()).fake_impl.kernel
    return [torch.zeros_like(result) for result in _tuple(fake(*inputs))]


def _like(tensor, other):
    return torch.empty_like(other).copy_(tensor.reshape(other.shape)) if other.numel() else other
