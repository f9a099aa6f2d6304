"""Pre-norm blocks: the sum of the stream and the attention, and the LayerNorm of that sum, in one kernel.

A block is taken where its class, and the text of its forward, are ones that were examined (section "forwards" of
``known.json``). Its children, such as attention, layer scale, stochastic depth and MLP, are called as the block itself
calls them.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.integrations.fuse.modules import Fused, Swap, Verdict, bind, forced_backend, fused_class, kernels_run
from sclkern.integrations.fuse.structure import is_plain
from sclkern.integrations.fuse.vit import known_form
from sclkern.integrations.source import known, source_digest


class Form(NamedTuple):
    """What the forward of a block does with its children.

    Attributes:
        norm: name of the first norm.
        attention: name of the attention.
        positional: how many arguments the attention gets by position; the others by name.
        branch: children or parameters between the attention and the first sum, in order; a parameter is a factor.
        second: name of the second norm.
        rest: what follows it, as ``branch``.
        output: name of the child that gets the result of ``rest`` and the stream, and adds them; None: the block does.
        maps: whether the block returns a tuple with what the attention returns after its first result.
    """

    norm: str
    attention: str
    positional: int
    branch: tuple[str, ...]
    second: str
    rest: tuple[str, ...]
    output: str | None = None
    maps: bool = False


_VIT = ("layernorm_before", "attention")
FORMS = {
    "clip block": Form("layer_norm1", "self_attn", 0, (), "layer_norm2", ("mlp",)),
    "vit block": Form(*_VIT, 2, ("dropout",), "layernorm_after", ("mlp", "dropout")),
    "vit block with output": Form(*_VIT, 1, (), "layernorm_after", ("intermediate",), "output"),
    "vilt block": Form(*_VIT, 2, (), "layernorm_after", ("intermediate",), "output", maps=True),
    "dino block": Form(
        "norm1", "attention", 1, ("layer_scale1", "drop_path"), "norm2", ("mlp", "layer_scale2", "drop_path")
    ),
    "timm block": Form("norm1", "attn", 1, ("ls1", "drop_path1"), "norm2", ("mlp", "ls2", "drop_path2")),
    "eva block": Form("norm1", "attn", 1, ("gamma_1", "drop_path1"), "norm2", ("mlp", "gamma_2", "drop_path2")),
}


class Block(NamedTuple):
    """Settings of ``FusedBlock``.

    Attributes:
        form: what the original forward does.
        names: its arguments, in order.
        defaults: those of its arguments that have one.
        kind: class of the second norm.
    """

    form: Form
    names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    kind: type[nn.LayerNorm]


class FusedBlock(Fused):
    """A pre-norm block."""

    _sclkern: Block

    def forward(self, *args, **options):
        """Compute the first sum and the second norm in one kernel."""
        form, names, defaults, kind = self._sclkern
        arguments = {**dict(defaults), **bind(names, args, options)}
        norm: Any = self._modules.get(form.second)
        stream = arguments.get(names[0])
        complete = all(name in arguments for name in names) and len(args) <= len(names)
        if not complete or not isinstance(stream, Tensor) or not _norm_holds(norm, kind):
            return super().forward(*args, **options)
        if not kernels_run(stream, norm.weight):
            return super().forward(*args, **options)
        del arguments[names[0]]
        attention, normed = getattr(self, form.attention), getattr(self, form.norm)(stream)
        if form.positional == 0:
            arguments[names[0]] = normed
        first = [] if form.positional == 0 else [normed, *(arguments.pop(name) for name in names[1 : form.positional])]
        out = attention(*first, **arguments)
        branch, *maps = out if isinstance(out, tuple) else (out,)
        branch, stream = self._sum_and_norm(self._follow(form.branch, branch), stream, norm)
        branch = self._follow(form.rest, branch)
        out = branch + stream if form.output is None else getattr(self, form.output)(branch, stream)
        return (out, *maps) if form.maps else out

    def _sum_and_norm(self, branch: Tensor, stream: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        autocast = torch.is_autocast_enabled(stream.device.type)
        # The op takes no broadcast sum; and of two dtypes it writes the norm in that of the branch, which is what the
        # product that reads it would make of it, but only under autocast.
        alike = branch.shape == stream.shape and (branch.dtype == stream.dtype or autocast)
        if not alike or not kernels_run(branch, stream, norm.weight):
            stream = branch + stream
            return norm(stream), stream
        out: Any = ops.dropout_add_layer_norm(
            branch, stream, norm.weight, norm.bias, eps=norm.eps, return_sum=True, backend=forced_backend()
        )
        return out

    def _follow(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            child: Any = getattr(self, name)
            if isinstance(child, Tensor):
                x = child * x
            elif child is not None:
                x = child(x)
        return x


def pre_norm_block(module: Any) -> Verdict:
    """A block of ViT, DeiT, DINO, ViLT, BLIP, CLIP, SigLIP or timm: x + attention(norm(x)), then x + mlp(norm(x))."""
    form = FORMS.get(known_form(module, named=True) or "")
    if form is None or any(name not in module._modules for name in (form.norm, form.attention, form.second)):
        return None
    norm = module._modules[form.second]
    if not isinstance(norm, nn.LayerNorm):
        return None
    if type(norm) is not nn.LayerNorm and source_digest(type(norm)) not in known("norms"):
        return f"its {form.second} is {type(norm).__name__}, which is not known"
    if not _norm_holds(norm, type(norm)):
        return f"its {form.second} has no bias, carries hooks, or is not torch's LayerNorm over the last dimension"
    parameters = inspect.signature(module.forward).parameters.values()
    named = [one for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    defaults = tuple((one.name, one.default) for one in named if one.default is not one.empty)
    settings = Block(form, tuple(one.name for one in named), defaults, type(norm))
    calls = f"the first sum and {form.second}, where kernels run; elsewhere the module's own forward"
    cls = fused_class(type(module), FusedBlock)
    return Swap("ops.dropout_add_layer_norm", cls, {"_sclkern": settings}, calls=calls, device="cuda")


def _norm_holds(norm: Any, kind: type[nn.LayerNorm]) -> bool:
    """Whether a norm is a LayerNorm that the op can stand for."""
    if not is_plain(norm, kind) or getattr(norm, "_fast_norm", False):
        return False
    return norm.weight is not None and norm.bias is not None and norm.weight.ndim == 1
