"""``fuse``: replaces what it can in one model, and records what is needed to undo it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from torch import nn

from sclkern.errors import UserError
from sclkern.integrations.fuse.attention import owner_obstacle
from sclkern.integrations.fuse.contrast import CONTRAST, gathering
from sclkern.integrations.fuse.masked_lm import MASKED_LM
from sclkern.integrations.fuse.modules import Fused, Swap, Verdict
from sclkern.integrations.fuse.rules import LOSS_OF_LOGITS, RULES
from sclkern.integrations.fuse.trial import remembered
from sclkern.integrations.huggingface.fusing import around, computed, configure, dispatches, obstacle
from sclkern.ops.completion_loss import GATHERS
from sclkern.ops.dispatch import select_backend


class Replaced(NamedTuple):
    """A module that was replaced.

    Attributes:
        path: its path within the model.
        module: name of its class.
        by: what computes it now.
        calls: which calls that computes, and what computes the others.
        device: where it runs: "any", or "cuda" (elsewhere the module's own forward).
    """

    path: str
    module: str
    by: str
    calls: str
    device: Literal["any", "cuda"]


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
        replaced: modules whose class has a fused forward now.
        left: modules of a known kind that could not be replaced.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    # The modules of ``replaced``.
    _modules: list[nn.Module] = field(default_factory=list, repr=False)
    # Modules whose class was changed, with their own class and that of the fused form.
    _swapped: list[tuple[nn.Module, tuple[type, type]]] = field(default_factory=list, repr=False)
    # Steps that restore the model, in the order in which they were made.
    _undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    @property
    def active(self) -> list[Replaced]:
        """The replaced modules whose op runs where their parameters are now; it changes as the model is moved."""
        return [
            entry
            for entry, module in zip(self.replaced, self._modules, strict=True)
            if entry.device == "any" or not _against_kernels(module)
        ]

    def revert(self) -> None:
        """Restore the model that was fused; copies of it stay fused. A second call does nothing.

        Raises:
            UserError: a module was given another class since, which would be lost; nothing is restored then.
        """
        for module, classes in self._swapped if self._undo else ():
            if type(module) not in classes:
                raise UserError(
                    f"revert: a {classes[0].__name__} was made a {type(module).__name__} after fuse (FSDP does that); "
                    "undo that first, or call revert before it"
                )
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> FuseReport:
        return self

    def __exit__(self, *error: object) -> None:
        self.revert()

    def __str__(self) -> str:
        count, active = len(self.replaced), len(self.active)
        lines = [f"{count} module{'s' * (count != 1)} replaced, {len(self.left)} left"]
        if active < count:
            lines[0] += f"; the ops of {active} run on the model's device, those of {count - active} on a GPU only"
        for entry, paths in _grouped(self.replaced):
            lines.append(f"  {entry.module}: {entry.by}{' (on a GPU)' * (entry.device == 'cuda')}  [{paths}]")
            lines.append(f"      {entry.calls}")
        lines += [f"  left: {entry.module}: {entry.why}  [{paths}]" for entry, paths in _grouped(self.left)]
        return "\n".join(lines)


_Entry = TypeVar("_Entry", Replaced, Left)


def _grouped(entries: list[_Entry]) -> list[tuple[_Entry, str]]:
    """One entry for all that differ in nothing but their paths, and those paths."""
    groups: dict[tuple[str, ...], list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry[1:], []).append(entry)
    more = [f" and {len(group) - 1} more" if len(group) > 1 else "" for group in groups.values()]
    return [
        (group[0], f"{group[0].path or '(the model)'}{others}")
        for group, others in zip(groups.values(), more, strict=True)
    ]


def _against_kernels(module: nn.Module) -> tuple[str, ...]:
    """The reasons why no kernel runs for a module where its parameters are."""
    parameter = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if parameter is None:
        return ("it has no parameters",)
    choice = select_backend(parameter)
    return () if choice.backend == "triton" else choice.reasons


def fuse(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    strict: bool = True,
    gather: Literal["exact", "published"] | None = None,
    skip_logits: bool = False,
) -> FuseReport:
    """Make ``model`` compute with the fused ops, in place: this instance only, no class and no other model.

    Only what is known is replaced: classes of torch, classes whose source was examined (``known.json``), and modules
    that have a declared structure and nothing beyond it, and that compute the same as the ops in a trial: random
    weights, up to 1,100 tokens, masks of every kind, training with dropout. Code that decides by sizes, values or
    dtypes, draws random numbers, or reads variables outside the module is not believed, whatever a trial shows. All
    else is left, and the report says why.
    Parameters, ``state_dict``, hooks, modes and optimizers stay as they are. Only the class of a module changes, to a
    subclass of its original class. The rules:

    - "attention": ``torch.nn.MultiheadAttention``; modules {query, key, value, dropout} (METER's and SCL's
      ``BertCrossLayer``, BERT, BLIP's text model, ViLT), {qkv, projection, dropout} (BLIP's vision model) and {qkv,
      attn_drop, proj, proj_drop} with a forward of timm (ViT, DeiT, EVA, BEiT: norms, gates, rotations and relative
      position biases included); modules that use Hugging Face's ``AttentionInterface`` (BERT, RoBERTa, BridgeTower,
      CLIP; with a position bias, LayoutLMv3 and T5's encoder) with a known eager attention, through views of the
      model's configurations that say "sclkern"; those of packed sequences (Qwen-VL) with a known forward, all sequences
      at once, through views that say "sclkern_flash".
    - "dropout_add_layer_norm": {dense, LayerNorm, dropout}; the first sum and the second norm of pre-norm blocks whose
      class was examined (ViT, DeiT, DINOv2, DINOv3, ViLT, CLIP, SigLIP, BLIP's vision model, timm's ViT, EVA and BEiT).
    - "linear_gelu": {dense, intermediate_act_fn}, {fc1, activation_fn, fc2}, {fc1, act, fc2} with dropout (timm), a
      ``torch.nn.Sequential`` with a linear layer and a GELU (the MLP of OpenAI's CLIP and of open_clip), and longer
      forwards whose code applies a GELU to the result of a linear layer (DistilBERT, ALBERT, BART, Whisper, Wav2Vec2,
      heads for masked language modelling), whose dropout stays.
    - "transformer_encoder": ``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder``.
    - "completion_loss": the contrastive loss of ``transformers.CLIPModel`` and ``BlipModel``.
    - "linear_cross_entropy", with ``skip_logits``: the loss of transformers' models for masked language modelling whose
      forward and head were examined (BERT, RoBERTa, DistilBERT, ALBERT, ELECTRA, MPNet, LayoutLM, ViLT, BridgeTower).

    At run time, the original forward of a module computes the calls that the ops cannot: attention maps
    (``output_attentions=True``), causal and other masks that differ between queries, caches, head masks; and all calls
    after one of the module's own attributes was changed. One warning names each. On a CPU, GELU and LayerNorm also stay
    the model's own: only attention gains there (``report.active``). Outputs agree to rounding, with these exceptions:
    attention maps that were not requested are None; a query whose keys are all padding gets zeros; padded rows of
    ``torch.nn.TransformerEncoder`` are undefined; dropout with the same seed drops other elements. Masks are read as
    ``register_attention`` reads them. A fused model can be copied, pickled, compiled, and fused again with more rules;
    modules that are fused already are left. Second derivatives and forward-mode derivatives exist where torch's
    attention has them, which is not so on a CPU.

    Args:
        model: any module.
        only: names of the rules to apply; None applies all of them.
        strict: whether to raise if no op would run on the device where the model is.
        gather: of "completion_loss", under torch.distributed: None contrasts within each process, as these models do;
            "exact" contrasts with the features of all ranks, so that DDP's mean is the gradient of one big batch;
            "published" leaves the gradient of other ranks' features out, see ``ops.completion_loss``. Every rank must
            have as many rows.
        skip_logits: of "linear_cross_entropy": in training, calls with labels compute their loss from the tokens that
            have a label alone, and return None as logits. Where these are counted first, a GPU is waited for.

    Returns:
        What was replaced, what was left and why; its ``revert`` restores the model.

    Raises:
        TypeError: model is not a module, skip_logits no bool. UserError: an unknown rule or ``gather``, a ``gather`` or
            ``skip_logits`` where no such loss was replaced, or with ``strict`` no op would run; the message gives the
            reasons, and the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(skip_logits, bool):
        raise TypeError(f"skip_logits: got {type(skip_logits).__name__}, expected a bool")
    names = tuple(RULES) if only is None else (only,) if isinstance(only, str) else tuple(only)
    for name in names:
        if name not in RULES:
            raise UserError(f"only: got {name!r}, expected any of {', '.join(RULES)}")
    if not skip_logits and LOSS_OF_LOGITS in names:
        if only is not None:
            raise UserError(
                f"only: got {LOSS_OF_LOGITS!r}, expected skip_logits=True with it: in training the logits are None then"
            )
        names = tuple(name for name in names if name != LOSS_OF_LOGITS)
    if gather not in GATHERS:
        raise UserError(f"gather: got {gather!r}, expected 'exact', 'published' or None")
    report = FuseReport()
    try:
        with remembered():
            _fuse(model, names, report, gather)
        for option, value, loss, kind in (
            ("gather", gather, CONTRAST, "contrastive loss"),
            ("skip_logits", skip_logits or None, MASKED_LM, "loss of masked language modelling"),
        ):
            if value is not None and not any(entry.by == loss for entry in report.replaced):
                left = "; ".join(sorted({f"{left.module}: {left.why}" for left in report.left}))
                raise UserError(
                    f"{option}: got {value!r}, but this {type(model).__name__} has no {kind} that was replaced"
                    + (f" ({left})" if left else "")
                )
        if strict:
            _require_active(model, names, report)
    except BaseException:
        report.revert()
        raise
    return report


def _require_active(model: nn.Module, names: tuple[str, ...], report: FuseReport) -> None:
    """Raise if no op would run for the model."""
    if report.active:
        return
    name = type(model).__name__
    left = "; ".join(sorted({f"{left.module}: {left.why}" for left in report.left}))
    if report.replaced:
        ops = ", ".join(sorted({entry.by for entry in report.replaced}))
        reasons = "; ".join(sorted({reason for module in report._modules for reason in _against_kernels(module)}))
        raise UserError(
            f"model: {ops} could be put into this {name}, but would not run: {reasons}. Move the model to a GPU before "
            f"it is fused, or pass strict=False, so that they run once it is moved" + (f" ({left})" if left else "")
        )
    raise UserError(
        f"model: nothing in this {name} could be replaced"
        + (f" ({left})" if left else f", it has no module that {', '.join(names)} would match")
    )


def _fuse(model: nn.Module, names: tuple[str, ...], report: FuseReport, gather: str | None) -> None:
    dispatching: list[tuple[str, nn.Module]] = []
    attentions: list[nn.Module] = []
    for path, module in list(model.named_modules()):
        original = type(module)
        for name in names:
            if isinstance(module, Fused):
                if name == names[0] and not any(module is swapped for swapped, _ in report._swapped):
                    report.left.append(Left(path, original.__name__, "fused already"))
                continue
            try:
                if name == "attention" and dispatches(module):
                    dispatching.append((path, module))
                    continue
                verdict: Verdict = RULES[name](module)
                if name == "attention" and isinstance(verdict, Swap):
                    verdict = owner_obstacle(model, path) or verdict
                if name == "completion_loss" and isinstance(verdict, Swap):
                    verdict = gathering(verdict, gather)
            except Exception as error:
                # Whatever a module of somebody else raises while it is looked at.
                verdict = f"it cannot be tried: {type(error).__name__}: {error}"
            if isinstance(verdict, str):
                report.left.append(Left(path, original.__name__, verdict))
            elif verdict is not None:
                _apply(module, verdict, report)
                _note(report, path, module, original, verdict.by, verdict.calls, verdict.device)
                if name == "attention" and original is not nn.MultiheadAttention:
                    attentions.append(module)
    for path, module in dispatching:
        try:
            reason = obstacle(module, around(model, path))
        except Exception as error:
            reason = f"it cannot be tried: {type(error).__name__}: {error}"
        if reason:
            report.left.append(Left(path, type(module).__name__, reason))
        else:
            op, calls = computed(module)
            _note(report, path, module, type(module), f"ops.{op}, by Hugging Face's interface", calls, "any")
            attentions.append(module)
    if attentions and "transformers" in sys.modules:
        configure(model, attentions, report._undo)


def _note(
    report: FuseReport,
    path: str,
    module: nn.Module,
    original: type[nn.Module],
    by: str,
    calls: str,
    device: Literal["any", "cuda"],
) -> None:
    report.replaced.append(Replaced(path, original.__name__, by, calls, device))
    report._modules.append(module)


def _restore_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # transformers 5.0 keeps the forward that it found on each instance, after a call that collects attention maps.
    if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
    module.__class__ = cls


def _apply(module: nn.Module, swap: Swap, report: FuseReport) -> None:
    report._undo.append(functools.partial(_restore_class, module, type(module)))
    report._swapped.append((module, (type(module), swap.cls)))
    for name, value in swap.attributes.items():
        object.__setattr__(module, name, value)
        report._undo.append(functools.partial(module.__dict__.pop, name, None))
    module.__class__ = swap.cls
    for child, child_swap in swap.children:
        _apply(child, child_swap, report)
