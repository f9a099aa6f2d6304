"""``fuse``: replaces what it can in one model, and records what is needed to undo it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from sclkern.errors import UserError
from sclkern.integrations.fuse.modules import Fused, Swap
from sclkern.integrations.fuse.rules import RULES
from sclkern.integrations.huggingface.fusing import configure, dispatches, obstacle


class Replaced(NamedTuple):
    """A module that was replaced.

    Attributes:
        path: its path within the model.
        module: name of its class.
        by: what computes it now.
    """

    path: str
    module: str
    by: str


class Left(NamedTuple):
    """A module that was left as it was.

    Attributes:
        path: its path within the model.
        module: name of its class.
        why: the reason.
    """

    path: str
    module: str
    why: str


@dataclass
class FuseReport:
    """What ``fuse`` did; prints as a table. As a context manager, it restores the model on exit.

    Attributes:
        replaced: modules that compute with fused ops now.
        left: modules of a known kind that could not be replaced.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    # Steps that restore the model, in the order in which they were made.
    _undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Restore the model that was fused; copies of it stay fused. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> FuseReport:
        return self

    def __exit__(self, *error: object) -> None:
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
    """Make ``model`` compute with the fused ops, in place: this instance only, no class and no other model.

    Modules are matched by structure (names and classes of their children), and each is tried on a small input; one that
    computes something else is left. Parameters, ``state_dict``, hooks, modes and optimizers stay as they are. Only the
    class of a module changes, to a subclass of its original class. The rules:

    - "attention": ``torch.nn.MultiheadAttention``; modules {query, key, value, dropout} (METER's and SCL's
      ``BertCrossLayer``, BERT, BLIP's text model, ViLT) and {qkv, projection, dropout} (BLIP's vision model); modules
      that use Hugging Face's ``AttentionInterface`` (BERT, RoBERTa, BridgeTower, CLIP), through copies of the model's
      configurations that say "sclkern".
    - "dropout_add_layer_norm": {dense, LayerNorm, dropout}.
    - "linear_gelu": {dense, intermediate_act_fn}, {fc1, activation_fn, fc2}, CLIP's block as OpenAI writes it.
    - "transformer_encoder": ``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder``.
    - "completion_loss": the contrastive loss of ``transformers.CLIPModel`` and ``BlipModel``.

    At run time, the original forward of a module computes the calls that the ops cannot: attention maps
    (``output_attentions=True``), causal and other masks that differ between queries, caches, head masks. One warning
    names each. On a CPU, GELU and LayerNorm also stay the model's own: only attention gains there. Outputs agree to
    rounding, with these exceptions: attention maps that were not requested are None; a query whose keys are all
    padding gets zeros; dropout with the same seed drops other elements. Masks are read as ``register_attention`` reads
    them. A fused model can be copied, pickled, compiled, and fused again with more rules; modules that are fused
    already are left.

    Args:
        model: any module.
        only: names of the rules to apply; None applies all of them.
        strict: whether to raise if nothing could be replaced.

    Returns:
        What was replaced, what was left and why; its ``revert`` restores the model.

    Raises:
        TypeError: model is not a module. UserError: an unknown rule, or with ``strict`` nothing could be replaced; the
            message gives the reasons, and the model is as it was.
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
    dispatching: list[tuple[str, nn.Module]] = []
    attentions: list[nn.Module] = []
    for path, module in list(model.named_modules()):
        original = type(module)
        for name in names:
            if isinstance(module, Fused):
                if name == names[0]:
                    report.left.append(Left(path, original.__name__, "fused already"))
                continue
            if name == "attention" and dispatches(module):
                dispatching.append((path, module))
                continue
            verdict = RULES[name](module)
            if isinstance(verdict, str):
                report.left.append(Left(path, original.__name__, verdict))
            elif verdict is not None:
                _apply(module, verdict, report)
                report.replaced.append(Replaced(path, original.__name__, verdict.by))
                if name == "attention" and original is not nn.MultiheadAttention:
                    attentions.append(module)
    for path, module in dispatching:
        if reason := obstacle(module):
            report.left.append(Left(path, type(module).__name__, reason))
        else:
            report.replaced.append(Replaced(path, type(module).__name__, "ops.attention, by Hugging Face's interface"))
            attentions.append(module)
    if attentions and "transformers" in sys.modules:
        configure(model, attentions, report._undo)


def _apply(module: nn.Module, swap: Swap, report: FuseReport) -> None:
    report._undo.append(functools.partial(setattr, module, "__class__", type(module)))
    for name, value in swap.attributes.items():
        object.__setattr__(module, name, value)
        report._undo.append(functools.partial(module.__dict__.pop, name, None))
    module.__class__ = swap.cls
    for child, child_swap in swap.children:
        _apply(child, child_swap, report)
