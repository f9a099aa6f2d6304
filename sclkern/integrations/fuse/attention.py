"""The rule "attention", for torch's module and those with a forward of their own; ``huggingface`` has the others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sclkern import nn as fused_nn
from sclkern.integrations.fuse import modules as fused
from sclkern.integrations.fuse import trial
from sclkern.integrations.fuse.doubts import doubt
from sclkern.integrations.fuse.modules import Attention, Swap, Verdict, fused_class
from sclkern.integrations.fuse.structure import attributes, beyond, child_obstacle
from sclkern.integrations.fuse.trial import Difference, Trial

# Arguments that change nothing in most modules; a trial finds out in which.
_PERHAPS_HARMLESS = (
    "cache_position", "num_items_in_batch", "output_hidden_states", "position_ids", "return_dict", "use_cache"
)  # fmt: skip
# Arguments that the original forward serves, and that ordinary calls leave out.
_SELDOM = ("head_mask", "past_key_value", "past_key_values", "cache", "layer_past", "output_attentions")


def attention(module: Any) -> Verdict:
    """``torch.nn.MultiheadAttention``, or {query, key, value, dropout}, or {qkv, projection, dropout}."""
    if type(module) is nn.MultiheadAttention:
        return _torch_attention(module)
    separate = _has(module, "query", "key", "value", "dropout")
    if not separate and not _has(module, "qkv", "projection", "dropout"):
        return None
    linears = ("query", "key", "value") if separate else ("qkv", "projection")
    if obstacle := child_obstacle(module, **dict.fromkeys(linears, nn.Linear), dropout=nn.Dropout):
        return obstacle
    if obstacle := beyond(module, *linears, "dropout"):
        return obstacle
    heads = getattr(module, "num_attention_heads", getattr(module, "num_heads", None))
    width = (module.query if separate else module.projection).out_features
    if not isinstance(heads, int) or heads < 1 or width % heads:
        return "it does not state its number of heads"
    names, defaults, rest = _signature(module)
    if names[:1] != ("hidden_states",):
        return "its forward does not begin with hidden_states"
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    needed = [p.name for p in required[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if needed:
        return f"its forward needs {', '.join(needed)} too"
    read = attributes(module, *linears, "dropout")
    # Where there is one mask, it is that of the context, if a context is given.
    context_mask = "encoder_attention_mask" if "encoder_attention_mask" in names else "attention_mask"
    settings = Attention(names, 0, heads, frozenset(), defaults, False, context_mask, read)
    mixin = fused.FusedSelfAttention if separate else fused.FusedPackedAttention
    tried = trial.once(module, mixin, lambda: _try_attention(module, mixin, settings, rest))
    if isinstance(tried, str):
        return tried
    if reason := doubt(type(module)):
        return reason
    known_names = (*fused.OPERANDS, *_SELDOM, *tried.harmless)
    if more := [name for name in names if name not in known_names]:
        return f"its {', '.join(more)} may change the result of any call, and the op does not have it"
    calls = "self- and cross-attention" if "encoder_hidden_states" in names and separate else "self-attention"
    calls += " with a padding mask or none; other masks, attention maps, caches: the module's own forward"
    return Swap("ops.attention", fused_class(type(module), mixin), {"_sclkern": tried}, calls=calls)


def _torch_attention(module: nn.MultiheadAttention) -> Verdict:
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv or add_zero_attn adds a key: torch's attention computes it"
    calls = "calls with need_weights=False and no attn_mask; others: torch's attention"
    return Swap("nn.MultiheadAttention", fused_nn.MultiheadAttention, {"backend": "auto"}, calls=calls)


def owner_obstacle(model: nn.Module, path: str) -> str | None:
    """The reason to leave an attention that would never run, because of the modules around it, or None.

    Args:
        model: the model that is fused.
        path: of the attention in it.

    Returns:
        The reason: OpenAI's and open_clip's text models give their ``attn_mask`` with every call, decoders a causal
        mask.
    """
    parts = path.split(".") if path else []
    owner, causal = model, False
    for index, part in enumerate(parts):
        mask = owner._buffers.get("attn_mask", owner.__dict__.get("attn_mask"))
        # CLIP's own mask is for its text model, "transformer"; that of a block is for the block's attention.
        if isinstance(mask, Tensor) and (part == "transformer" or index == len(parts) - 1):
            return "its owner gives it attn_mask in every call: torch's attention computes that"
        decodes = type(owner).__name__.endswith(("LMHeadModel", "ForCausalLM"))
        causal = causal or (decodes and getattr(owner.__dict__.get("config"), "is_decoder", False) is True)
        owner = getattr(owner, part)
    causal = causal or getattr(owner, "is_decoder", False) is True
    if causal and not any("cross" in part for part in parts):
        return "causal attention: its own forward computes that"
    return None


def _try_attention(module: Any, mixin: type[fused.Fused], settings: Attention, rest: bool) -> Attention | str:
    attempt = Trial(module, mixin, settings)
    with trial.quiet():
        try:
            attempt.train(False)
            attempt.settings = _outputs(attempt)
            for where, call in _short_calls(attempt):
                attempt.compare(where, call, gradients=True)
            attempt.settings = attempt.settings._replace(
                bool_mask=_reads_bool(attempt), harmless=_harmless(attempt, rest)
            )
            _try_wholly(attempt)
            attempt.unchanged()
            tried: Attention = attempt.settings
            attempt.on_kernels(next(iter(_short_calls(attempt)))[1])
        except Difference as difference:
            return str(difference)
    return tried


def _try_wholly(attempt: Trial) -> None:
    """What a module whose source nobody has read might do: windows, caps, chunks, dropout elsewhere."""
    for where, call in _masked_calls(attempt):
        attempt.compare(where, call)
    width = attempt.own.get_submodule("query" if hasattr(attempt.own, "query") else "qkv").in_features
    if attempt_self := _takes_self(attempt):
        for length, score in ((1, 3.0), (64, 30.0), (200, 120.0)):
            hidden = _scaled(attempt, trial.random_input(attempt.dtype, 2, length, int(width)), score)
            attempt.compare(f"with {length} tokens and scores up to {score:g}", {"hidden_states": hidden})
        hidden = _scaled(attempt, trial.random_input(attempt.dtype, 1, 1100, int(width)), 10.0)
        attempt.compare("with 1100 tokens", {"hidden_states": hidden})
    where, call = next(iter(_short_calls(attempt)))
    for p in (0.0, 1.0):
        attempt.train(True, p)
        attempt.compare(f"in training with dropout {p:g}", call, gradients=attempt_self)
    attempt.train(True, trial.Probe(0.5))
    heads, separate = attempt.settings.heads, hasattr(attempt.own, "query")
    attempt.equals(
        "in training, where its dropout has another place", call, lambda own: _by_parts(own, heads, separate, **call)
    )


def _outputs(attempt: Trial) -> Attention:
    """Settings with the number of results, after a look at those that the fused form does not return."""
    settings: Attention = attempt.settings
    call = next(iter(_short_calls(attempt)))[1]
    with torch.no_grad():
        out = attempt.own(**call)
    result = trial.first(out)
    if not isinstance(out, tuple):
        return settings
    shape = (result.shape[0], settings.heads, result.shape[1], call.get("encoder_hidden_states", result).shape[1])
    for other in out[1:]:
        # Attention maps that nobody requested.
        if other is not None and not (isinstance(other, Tensor) and other.shape == shape):
            raise Difference("it returns more than its attention")
    return settings._replace(outputs=len(out))


def _reads_bool(attempt: Trial) -> bool:
    """Whether masks of bool mean True = attend."""
    taken: Attention = attempt.settings._replace(bool_mask=True)
    before, attempt.settings = attempt.settings, taken
    try:
        calls = [call for where, call in _masked_calls(attempt) if where == "with a mask of bool"]
        for call in calls:
            attempt.compare("with a mask of bool", call)
        return bool(calls)
    except (Difference, RuntimeError, TypeError, ValueError):
        return False
    finally:
        attempt.settings = before


def _harmless(attempt: Trial, rest: bool) -> frozenset[str]:
    """Which arguments can be given without an effect.

    Args:
        attempt: the trial.
        rest: whether the forward takes any keyword.

    Returns:
        Their names.
    """
    settings: Attention = attempt.settings
    call = next(iter(_short_calls(attempt)))[1]
    batch, length = call["hidden_states"].shape[:2]
    values: dict[str, list[Any]] = {
        "cache_position": [torch.arange(3, length + 3)],
        "num_items_in_batch": [7, torch.tensor(7)],
        "position_ids": [torch.arange(3, length + 3).expand(batch, -1), torch.arange(3, length + 3)[None]],
    }
    harmless = set()
    with torch.no_grad():
        plain = trial.first(attempt.own(**call))
        for name in _PERHAPS_HARMLESS:
            if name not in settings.names and not rest:
                continue
            try:
                outs = [attempt.own(**call, **{name: value}) for value in values.get(name, [True, False])]
            except Exception:
                continue
            if all(trial.agree(trial.first(out), plain, 1e-6) for out in outs):
                harmless.add(name)
    return frozenset(harmless)


def _short_calls(attempt: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
    """Self-attention, a padding mask, cross-attention: what is surely asked of the module."""
    own, names, dtype = attempt.own, attempt.settings.names, attempt.dtype
    separate = hasattr(own, "query")
    width = (own.query if separate else own.qkv).in_features
    hidden = _scaled(attempt, trial.random_input(dtype, 2, 5, width), 3.0)
    if _takes_self(attempt):
        yield "on a small input", {"hidden_states": hidden}
        if "attention_mask" in names:
            yield "with a padding mask", {"hidden_states": hidden, "attention_mask": _padding(dtype, 5)}
    if separate and "encoder_hidden_states" in names:
        # Some modules take no context of another length than the hidden states.
        contexts = [trial.random_input(dtype, 2, keys, own.key.in_features) for keys in (9, 5)]
        calls = [{"hidden_states": hidden, "encoder_hidden_states": context} for context in contexts]
        call = calls[0] if _accepts(own, calls[0]) else calls[1]
        keys, name = call["encoder_hidden_states"].shape[1], attempt.settings.context_mask
        yield "in cross-attention", call
        if name in names:
            masks = {name: _padding(dtype, keys)}
            yield "in cross-attention with a padding mask", call | masks
            if name != "attention_mask" and "attention_mask" in names:
                yield "in cross-attention with both masks", call | masks | {"attention_mask": _padding(dtype, 5)}


def _masked_calls(attempt: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
    """Masks that a module may read in another way than the op; where it cannot take one, nobody gives it."""
    own, dtype = attempt.own, attempt.dtype
    for where, call in _short_calls(attempt):
        if where == "in cross-attention" and "attention_mask" in attempt.settings.names:
            other = {**call, "attention_mask": _padding(dtype, call["encoder_hidden_states"].shape[1])}
            if _accepts(own, other):
                yield "in cross-attention with the mask of self-attention", other
        name = attempt.settings.context_mask if "encoder_hidden_states" in call else "attention_mask"
        if where not in ("with a padding mask", "in cross-attention with a padding mask"):
            continue
        keys = call[name].shape[-1]
        attend = call[name] == 0
        causal = torch.full((5, keys), torch.finfo(dtype).min, dtype=dtype).triu(1)
        for what, mask in (
            ("a mask of bool", attend),
            ("a mask of bool", attend.flip(-1)),
            ("a mask of bool for each query", (causal == 0).expand(2, 1, 5, keys)),
            ("a causal mask", causal.expand(2, 1, 5, keys)),
            ("a mask of -10000", torch.where(attend, 0.0, -10000.0).to(dtype)),
            ("a soft mask", torch.linspace(-2, 0, keys, dtype=dtype).expand(2, 1, 1, keys)),
            ("a mask of integers", attend.long()),
        ):
            if _accepts(own, {**call, name: mask}):
                yield f"with {what}", {**call, name: mask}


def _accepts(module: nn.Module, call: dict[str, Any]) -> bool:
    """Whether the module computes such a call at all; where it does not, nobody makes one."""
    try:
        with torch.no_grad():
            module(**call)
    except Exception:
        return False
    return True


def _takes_self(attempt: Trial) -> bool:
    own = attempt.own
    return not hasattr(own, "key") or own.key.in_features == own.query.in_features


def _padding(dtype: torch.dtype, length: int) -> Tensor:
    mask = torch.zeros((2, 1, 1, length), dtype=dtype)
    mask[0, ..., length - 2 :] = torch.finfo(dtype).min
    return mask


def _scaled(attempt: Trial, hidden: Tensor, score: float) -> Tensor:
    """Hidden states whose largest score is about ``score``."""
    own, heads = attempt.own, attempt.settings.heads
    with torch.no_grad():
        if hasattr(own, "query"):
            query = own.query(hidden)
            context = hidden if _takes_self(attempt) else trial.random_input(hidden.dtype, 1, 9, own.key.in_features)
            key = own.key(context)
        else:
            query, key, _ = own.qkv(hidden).chunk(3, -1)
        width = query.shape[-1] // heads
        scores = query[0, :200, :width] @ key[0, :200, :width].T / width**0.5
        return hidden * (score / scores.abs().max().clamp_min(1e-3)).sqrt()


def _by_parts(
    own: Any,
    heads: int,
    separate: bool,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
) -> Tensor:
    """The eager definition, with ``Probe`` on the probabilities."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if separate:
        projected = own.query(hidden_states), own.key(context), own.value(context)
        query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in projected)
    else:
        query, key, value = own.qkv(hidden_states).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    maps = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    out: Tensor = ((maps * trial.keep(maps)) @ value).transpose(1, 2).flatten(-2)
    return out if separate else own.projection(out)


def _signature(module: nn.Module) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...], bool]:
    """Arguments of a forward; their defaults that are not None; whether it takes any keyword."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    defaults = [(p.name, p.default) for p in parameters if p.default is not p.empty and p.default is not None]
    return (
        tuple(parameter.name for parameter in named),
        tuple(defaults),
        any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters),
    )


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)
