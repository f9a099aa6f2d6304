"""The loss of Hugging Face's models for masked language modelling, without the logits of all tokens.

A model is taken where the text of its forward, and of each module down to the linear layer over the vocabulary, is one
that was examined (section "forwards" of ``known.json``): the model's logits are the result of that layer, and its loss
is the mean cross-entropy of all tokens that have a label. Called without labels, the model then returns whatever that
layer returned as logits: for the time of such a call, in its thread, the layer returns the loss.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.integrations.fuse.contrast import returns_tuple
from sclkern.integrations.fuse.modules import Fused, Swap, Verdict, bind, forced_backend, fused_class
from sclkern.integrations.fuse.structure import is_plain
from sclkern.integrations.fuse.vit import known_form

MASKED_LM = "ops.linear_cross_entropy"
# Which child's result a forward returns as logits, by the form of the forward.
MODELS = {
    f"masked language model with {child}": child
    for child in ("cls", "generator_lm_head", "lm_head", "mlm_score", "predictions", "vocab_projector")
}
HEADS = {"head with predictions": "predictions", "head with decoder": "decoder"}
# A head whose linear layer has no bias, because the head adds its own to the result.
BIASED_HEAD = "head with transform, decoder and bias"
_IGNORED = -100


class FusedLogits(Fused):
    """The module that makes the logits. ``_sclkern`` holds, by thread, the call with labels that is under way."""

    _sclkern: dict[int, list[Tensor]]

    def forward(self, x):
        """Compute the logits, or the loss of a call with labels."""
        pending = _pending(self._sclkern)
        if not pending:
            return super().forward(x)
        hidden, weight, bias = self._operands(x)
        pending.append(_loss(hidden, weight, bias, pending[0]))
        return pending[-1]

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        raise NotImplementedError


class FusedDecoder(FusedLogits):
    """The linear layer over the vocabulary."""

    weight: Tensor
    bias: Tensor | None

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return x, self.weight, self.bias


class FusedBiasedHead(FusedLogits):
    """A head that adds its bias to the result of its linear layer (BridgeTower)."""

    transform: nn.Module
    decoder: nn.Linear
    bias: Tensor

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.transform(x), self.decoder.weight, self.bias


class MaskedLM(NamedTuple):
    """Settings of ``FusedMaskedLM``.

    Attributes:
        names: arguments of the original forward that may be given by position, in order.
        path: names of the modules that lead to the one that makes the logits, that one last.
        kinds: their classes, before they were fused.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    kinds: tuple[type[nn.Module], ...]


class FusedMaskedLM(Fused):
    """A model for masked language modelling that leaves its logits out in training with labels."""

    config: Any
    _sclkern: MaskedLM

    def forward(self, *args, **options):
        """Compute the model without its logits, with ``ops.linear_cross_entropy`` for its loss."""
        arguments = bind(self._sclkern.names, args, options)
        labels = arguments.get("labels")
        logits, thread = self._find(), _thread()
        outer = None if logits is None else logits._sclkern.get(thread)
        computes = self.training and isinstance(labels, Tensor) and not returns_tuple(self, arguments)
        if logits is None or not (computes or outer):
            return super().forward(*args, **options)
        pending: list[Any] = [labels] if computes else []
        # A call within another one, of a hook, has its own.
        logits._sclkern[thread] = pending
        try:
            if not computes:
                return super().forward(*args, **options)
            out: Any = super().forward(**{**arguments, "labels": None})
        finally:
            if outer is None:
                logits._sclkern.pop(thread, None)
            else:
                logits._sclkern[thread] = outer
        if len(pending) != 2 or not (torch.compiler.is_compiling() or out["logits"] is pending[1]):
            raise RuntimeError(
                f"{type(self).__name__}: its {'.'.join(self._sclkern.path)} was called {len(pending) - 1} times in a "
                "call with labels, expected once, whose result is returned: with skip_logits it computes the loss. "
                "Leave the head alone in hooks, or call revert"
            )
        return type(out)(**{**out, "loss": out["logits"], "logits": None})

    def _find(self) -> Any:
        """The module that makes the logits; None where it, or another on the way to it, was changed."""
        module: Any = self
        _, path, kinds = self._sclkern
        for name, kind in zip(path, kinds, strict=True):
            if not _as_examined(module):
                return None
            module = module._modules.get(name)
            if module is None or not is_plain(module, type(module)):
                return None
            if getattr(type(module), "_original", type(module)) is not kind:
                return None
        fused = isinstance(module, FusedLogits) and type(module) is fused_class(kinds[-1], type(module).__mro__[1])
        return module if fused and obstacle(self, module) is None else None


# The forwards that classes had when they were examined.
_forwards: dict[type, Any] = {}


def _as_examined(module: nn.Module) -> bool:
    """Whether a class has the forward that it had when it was examined."""
    kind: Any = getattr(type(module), "_original", type(module))
    return torch.compiler.is_compiling() or _forwards.setdefault(kind, kind.forward) is kind.forward


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _pending(calls: dict[int, list[Tensor]]) -> list[Tensor] | None:
    """The call that is under way in this thread, of which either end may be compiled without the other."""
    if torch.compiler.is_compiling() and len(calls) == 1:
        return next(iter(calls.values()))
    return calls.get(_thread()) or calls.get(0)


def _loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The mean cross-entropy, as these models compute it from their logits."""
    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    dtype = torch.float32 if autocast else hidden.dtype
    as_rows = labels.dtype == torch.int64 and labels.device == hidden.device and labels.shape == hidden.shape[:-1]
    compiling = torch.compiler.is_compiling()
    if not compiling:
        # No batch of functorch has a number of rows that depends on values.
        as_rows &= not any(map(torch._C._functorch.is_functorch_wrapped_tensor, (hidden, labels)))
    values_known = not (compiling or torch.jit.is_tracing() or _captured(labels))
    if as_rows and values_known:
        # The op would compute the logits of every row, of which a model like BERT labels 15 %.
        rows = (labels.flatten() != _IGNORED).nonzero().squeeze(1)
        hidden, labels = hidden.flatten(0, -2).index_select(0, rows), labels.flatten().index_select(0, rows)
    if not as_rows or (values_known and not labels.numel()):
        # Whatever these models make of it: without any label, NaN.
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits.view(-1, weight.shape[0]), labels.to(hidden.device).view(-1))
    loss: Any = ops.linear_cross_entropy(hidden, weight, bias, labels, backend=forced_backend())
    if not values_known:
        loss = torch.where((labels != _IGNORED).any(), loss, torch.nan)
    return loss.to(dtype)


def _captured(tensor: Tensor) -> bool:
    """Whether work on this tensor is recorded into a CUDA graph, so that its values cannot be read."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def masked_lm(module: Any) -> Verdict:
    """A model of transformers for masked language modelling, down to its linear layer over the vocabulary."""
    first = MODELS.get(known_form(module) or "")
    if first is None or not hasattr(module, "config"):
        return None
    path, kinds, inner = [first], [], module._modules.get(first)
    while isinstance(inner, nn.Module) and (form := known_form(inner) or "") in HEADS:
        if not is_plain(inner, type(inner)):
            return f"its {'.'.join(path)} carries hooks"
        kinds.append(type(inner))
        path.append(HEADS[form])
        inner = inner._modules.get(HEADS[form])
    biased = isinstance(inner, nn.Module) and known_form(inner) == BIASED_HEAD
    if not biased and type(inner) is not nn.Linear:
        return f"its {'.'.join(path)} is {type(inner).__name__}, not torch's Linear or a head that was examined"
    if reason := obstacle(module, inner):
        return reason
    for one in (type(module), *kinds, type(inner)):
        _forwards[one] = one.forward
    parameters = inspect.signature(module.forward).parameters.values()
    names = tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)
    cls = fused_class(type(inner), FusedBiasedHead if biased else FusedDecoder)
    settings = MaskedLM(names, tuple(path), (*kinds, type(inner)))
    calls = "calls with labels in training that return no tuple, whose logits are None then; others: the model's own"
    swap = Swap(MASKED_LM, fused_class(type(module), FusedMaskedLM), {"_sclkern": settings}, calls=calls)
    return swap._replace(children=((inner, Swap(MASKED_LM, cls, {"_sclkern": {}})),))


def obstacle(model: Any, logits: Any) -> str | None:
    """The reason why a model's loss is not that of the linear layer over its vocabulary.

    Args:
        model: the model.
        logits: the module that makes its logits.

    Returns:
        The reason, or None.
    """
    if not isinstance(logits, nn.Module) or not is_plain(logits, type(logits)):
        return "the module that makes its logits carries hooks, or another forward"
    linear: Any = logits
    if not isinstance(logits, nn.Linear):
        linear = logits._modules.get("decoder")
        if type(linear) is not nn.Linear or not is_plain(linear, nn.Linear) or linear.bias is not None:
            return "the linear layer of its head is not torch's, carries hooks, or has a bias"
    if not linear.weight.is_floating_point():
        return f"its linear layer has weights of {str(linear.weight.dtype).removeprefix('torch.')}"
    size = getattr(model.config, "vocab_size", None) or getattr(model.config.get_text_config(), "vocab_size", None)
    # Not out_features, which transformers 5.0 leaves as it was when it makes the layer longer.
    if size != linear.weight.shape[0]:
        return f"its configuration has {size} tokens and its linear layer {linear.weight.shape[0]}"
    if not torch.compiler.is_compiling() and not _has_torchs_loss(type(model)):
        return "the CrossEntropyLoss of its file is not torch's"
    loss = getattr(model, "mlm_loss_fct", None)
    if loss is not None and not _is_mean_of_labels(loss):
        return "its mlm_loss_fct is not torch's CrossEntropyLoss() as it is without arguments"
    return None


def _has_torchs_loss(cls: Any) -> bool:
    """Whether the global name by which a forward makes its loss is what it was."""
    names = inspect.unwrap(getattr(cls, "_original", cls).forward).__globals__
    loss = names.get("CrossEntropyLoss", nn.CrossEntropyLoss)
    return loss is nn.CrossEntropyLoss and loss.__module__ == "torch.nn.modules.loss"


def _is_mean_of_labels(loss: Any) -> bool:
    settings = ("weight", None), ("ignore_index", _IGNORED), ("reduction", "mean"), ("label_smoothing", 0.0)
    return is_plain(loss, nn.CrossEntropyLoss) and all(getattr(loss, name) == value for name, value in settings)
