"""What wrappers put before and into the names of weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from sclkern.errors import UserError

T = TypeVar("T")

# Components that torch.compile, FSDP and activation checkpointing put anywhere in a name, and nothing else does.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Before all names: DDP's, and that of a module whose attribute the network is.
OUTERMOST = ("module.", "model.")
# How a name begins that only a published checkpoint has, and one that only our network has.
PUBLISHED = r"(?:text_transformer|vision_transformer|vit_model|cross_modal_\w+)\."
OURS = r"(?:text\.(?:word|blocks)|vision\.(?:patch_embed|blocks)|fusion\.(?:text|image)_layers)\."


def without_wrappers(tensors: Mapping[str, T], where: str) -> dict[str, T]:
    """Take off what torch.compile, FSDP and activation checkpointing put into names, and what stands before all names.

    Args:
        tensors: by name.
        where: the source, for messages.

    Returns:
        The same under shorter names.

    Raises:
        UserError: two names become one.
    """
    renamed = rename({name: WRAPPERS.sub("", name) for name in tensors}, tensors, where)
    while prefix := next((p for p in OUTERMOST if renamed and all(name.startswith(p) for name in renamed)), None):
        renamed = {name.removeprefix(prefix): tensor for name, tensor in renamed.items()}
    return renamed


def without_prefix(tensors: Mapping[str, T], known: str, where: str) -> tuple[dict[str, T], str]:
    """Take off the prefix under which the weights of a network stand.

    Args:
        tensors: by name; those of other parts, and metrics, may stand beside the weights.
        known: a pattern, how some names of the network begin.
        where: the source, for messages.

    Returns:
        The same, under shorter names where they have the prefix, and the source; with the prefix, if some have it not.

    Raises:
        UserError: there are several prefixes, or two names become one.
    """
    tensors = without_wrappers(tensors, where)
    pattern = re.compile(rf"((?:[^.]+\.)*?){known}")
    found = Counter(match[1] for match in map(pattern.match, tensors) if match)
    if not found or "" in found:
        return tensors, where
    if len(found) > 1:
        listed = ", ".join(f"{prefix!r} ({count} weights)" for prefix, count in found.items())
        one = repr(next(iter(found)))
        raise UserError(
            f"{where}: weights stand under several prefixes, {listed}, expected one; give those of one as a mapping: "
            f"{{k.removeprefix({one}): v for k, v in state_dict.items() if k.startswith({one})}}"
        )
    prefix = next(iter(found))
    if not all(name.startswith(prefix) for name in tensors):
        where = f"{where} (prefix {prefix!r} taken off the names that have it)"
    return rename({name: name.removeprefix(prefix) for name in tensors}, tensors, where), where


def rename(new: Mapping[str, str], tensors: Mapping[str, T], where: str) -> dict[str, T]:
    """Give tensors shorter names.

    Args:
        new: the shorter name of each.
        tensors: by their names.
        where: the source, for messages.

    Returns:
        Tensors by shorter name.

    Raises:
        UserError: two names become one.
    """
    renamed: dict[str, T] = {}
    for name, shorter in new.items():
        if shorter in renamed:
            both = [old for old, other in new.items() if other == shorter]
            raise UserError(
                f"{where}: {' and '.join(both)} are both {shorter} without their prefixes; keep one of them"
            )
        renamed[shorter] = tensors[name]
    return renamed
