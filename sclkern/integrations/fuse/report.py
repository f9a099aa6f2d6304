"""``fuse``: replaces what it can in one model, and keeps what is needed to undo it."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from sclkern.errors import UserError
from sclkern.integrations import huggingface
from sclkern.integrations.fuse.modules import Fused, Maps
from sclkern.integrations.fuse.rules import RULES, Swap, dispatches

IMPLEMENTATION = "sclkern"
# Attention of Hugging Face's that is torch's own, and may be exchanged for ours.
_EXCHANGEABLE = ("eager", "sdpa")


class Replaced(NamedTuple):
    """``path`` within the model, the ``module``'s class, and what stands ``by`` for it now."""

    path: str
    module: str
    by: str


class Left(NamedTuple):
    """``path`` within the model, the ``module``'s class, and ``why`` it is as it was."""

    path: str
    module: str
    why: str


@dataclass
class FuseReport:
    """What ``fuse`` has done; printed, a table. In a ``with`` statement the model is as it was at its end."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    _undo: list = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Undo everything, on the model that was fused (a copy of it stays fused). A second time it does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> FuseReport:
        return self

    def __exit__(self, *error) -> None:
        self.revert()

    def __str__(self) -> str:
        count = len(self.replaced)
        lines = [f"{count} module{'s' * (count != 1)} replaced, {len(self.left)} left"]
        for title, entries in (("", self.replaced), ("left: ", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for path, module, what in entries:
                groups.setdefault((module, what), []).append(path or "(the model)")
            for (module, what), paths in groups.items():
                more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
                lines.append(f"  {title}{module}: {what}  [{paths[0]}{more}]")
        return "\n".join(lines)


def fuse(model: nn.Module, *, only: str | Iterable[str] | None = None, strict: bool = True) -> FuseReport:
    """Let ``model`` compute with the fused ops, in place: this instance, no class and no other model.

    Modules are matched by structure (names and classes of children), and each is tried on a small input: one that
    computes something else is left. Parameters, ``state_dict``, hooks, modes and optimizers stay as they are; what
    changes is the class of the modules, to a subclass of their own. The rules:

    - "attention": ``torch.nn.MultiheadAttention``; modules {query, key, value, dropout} (METER's and SCL's
      ``BertCrossLayer``, BERT, BLIP's text model, ViLT) and {qkv, projection, dropout} (BLIP's vision model); whatever
      asks Hugging Face's ``AttentionInterface`` (BERT, RoBERTa, BridgeTower, CLIP), by copies of the model's
      configurations, which say "sclkern".
    - "dropout_add_layer_norm": {dense, LayerNorm, dropout}.
    - "linear_gelu": {dense, intermediate_act_fn}, {fc1, activation_fn, fc2}, CLIP's block as OpenAI writes it.
    - "transformer_encoder": ``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder``.
    - "completion_loss": the contrastive loss of ``transformers.CLIPModel`` and ``BlipModel``.

    At run time a module's own forward computes what the ops cannot: attention maps (``output_attentions=True``), causal
    and other masks that differ between queries, caches, head masks; one warning tells each. On a CPU, GELU and
    LayerNorm are the model's own too: only attention gains there. Outputs agree to rounding, with these exceptions:
    attention maps nobody asked for are None; a query whose keys are all padding gets zeros; from one seed other
    elements are dropped. Masks are read as ``register_attention`` reads them. A fused model can be copied, pickled,
    compiled and fused with more rules; what is fused already is left.

    Args:
        model: any module.
        only: names of the rules to apply; None is all of them.
        strict: raise where nothing could be replaced.

    Raises:
        TypeError: model is not a module. UserError: a rule that is not known, or with ``strict`` nothing replaced, and
            why; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    names = tuple(RULES) if only is None else (only,) if isinstance(only, str) else tuple(only)
    for name in names:
        if name not in RULES:
            raise UserError(f"only: got {name!r}, expected any of {', '.join(RULES)}")
    report = FuseReport()
    try:
        _fuse(model, names, report)
    except BaseException:
        report.revert()
        raise
    if strict and not report.replaced:
        reasons = "; ".join(sorted({f"{left.module}: {left.why}" for left in report.left}))
        raise UserError(
            f"model: nothing in this {type(model).__name__} could be replaced"
            + (f" ({reasons})" if reasons else f", it has no module that {', '.join(names)} would match")
        )
    return report


def _fuse(model: nn.Module, names: tuple[str, ...], report: FuseReport) -> None:
    asking: list[tuple[str, nn.Module]] = []
    watched: list[nn.Module] = []
    for path, module in list(model.named_modules()):
        original = type(module)
        for name in names:
            if isinstance(module, Fused):
                if name == names[0]:
                    report.left.append(Left(path, original.__name__, "fused already"))
                continue
            if name == "attention" and dispatches(module):
                asking.append((path, module))
                continue
            verdict = RULES[name](module)
            if isinstance(verdict, str):
                report.left.append(Left(path, original.__name__, verdict))
            elif verdict is not None:
                _apply(module, verdict, report)
                report.replaced.append(Replaced(path, original.__name__, verdict.by))
                if name == "attention" and original is not nn.MultiheadAttention:
                    watched.append(module)
    if asking:
        watched += _exchange(asking, report)
    if watched and "transformers" in sys.modules:
        _configure(model, watched, report)


def _apply(module: nn.Module, swap: Swap, report: FuseReport) -> None:
    report._undo.append(functools.partial(setattr, module, "__class__", type(module)))
    for name, value in swap.attributes.items():
        object.__setattr__(module, name, value)
        report._undo.append(functools.partial(module.__dict__.pop, name, None))
    module.__class__ = swap.cls
    for child, inner in swap.also:
        _apply(child, inner, report)


def _exchange(asking: list[tuple[str, nn.Module]], report: FuseReport) -> list[nn.Module]:
    """Those of ``asking`` whose attention may be exchanged."""
    taken = []
    for path, module in asking:
        name, current = type(module).__name__, module.config._attn_implementation
        if current == IMPLEMENTATION:
            report.left.append(Left(path, name, "fused already"))
        elif current not in (*_EXCHANGEABLE, None):
            report.left.append(Left(path, name, f"its attention is {current!r} by choice"))
        else:
            report.replaced.append(Replaced(path, name, "ops.attention, by Hugging Face's interface"))
            taken.append(module)
    return taken


def _configure(model: nn.Module, watched: list[nn.Module], report: FuseReport) -> None:
    """Ask for our attention and masks in copies of the configurations that ``watched`` or their models have; and let
    ``watched`` know when their model is asked for attention maps."""
    from transformers import PreTrainedModel

    by_path = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    huggingface.register_attention(IMPLEMENTATION)
    maps = {path: Maps() for path in by_path}
    wanted: dict[int, Any] = {}
    chosen = {id(module) for module in watched}
    for path, module in model.named_modules():
        owners = [owner for owner in by_path if _within(path, owner)]
        if id(module) not in chosen:
            continue
        # The masks may be made by any model around: BridgeTower makes those of its text model itself.
        configs = [by_path[owner].config for owner in owners] + ([module.config] if dispatches(module) else [])
        wanted |= {id(config): config for config in configs if config._attn_implementation in _EXCHANGEABLE}
        if owners:
            module._sclkern_maps = maps[max(owners, key=len)]
            report._undo.append(functools.partial(module.__dict__.pop, "_sclkern_maps", None))
    for path, owner in by_path.items():
        inside = [found for other, found in maps.items() if _within(other, path)]
        handle = owner.register_forward_pre_hook(functools.partial(_note_maps, inside), with_kwargs=True)
        report._undo.append(handle.remove)
    copies: dict[int, Any] = {}
    for module in model.modules() if wanted else ():
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            report._undo.append(functools.partial(setattr, module, "config", config))
            module.config = copy.deepcopy(config, copies)
    for config in wanted.values():
        copies[id(config)]._attn_implementation_internal = IMPLEMENTATION


def _within(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(f"{owner}.")


def _note_maps(inside: list[Maps], module: nn.Module, args: tuple, options: dict) -> None:
    asked = options.get("output_attentions")
    asked = bool(getattr(module.config, "output_attentions", False) if asked is None else asked)
    for maps in inside:
        maps.wanted = asked
