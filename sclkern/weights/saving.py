"""The weights of a network as they are saved, whatever wraps the network."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sclkern.errors import UserError
from sclkern.models import SCLNetwork
from sclkern.weights.loading import listing
from sclkern.weights.names import reference_names
from sclkern.weights.prefixes import WRAPPERS, rename

logger = logging.getLogger("sclkern.weights")


def unwrapped(network: nn.Module) -> SCLNetwork:
    """The network within what torch.compile, DDP and DataParallel made of it.

    Args:
        network: an ``SCLNetwork``, wrapped or not.

    Returns:
        The network itself.

    Raises:
        UserError: there is no ``SCLNetwork`` in it.
    """
    inner = network
    while not isinstance(inner, SCLNetwork):
        if isinstance(inner, DistributedDataParallel | DataParallel):
            inner = inner.module
        elif isinstance(inner, nn.Module) and "_orig_mod" in inner._modules:
            inner = cast(nn.Module, inner._orig_mod)
        else:
            raise UserError(
                f"network: got {type(network).__name__}, expected an SCLNetwork or SCLModel, or one in torch.compile, "
                "DistributedDataParallel or DataParallel"
            )
    return inner


def saved_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network under the names with which they can be loaded.

    Args:
        network: an ``SCLNetwork``; it, or modules in it, may be wrapped.

    Returns:
        Contiguous tensors by name; no two share memory. Which were tied is logged (logger "sclkern.weights"): loaded,
        they are tensors of their own.

    Raises:
        UserError: no ``SCLNetwork``, one that lacks weights of its configuration, weights on the meta device, or
            weights of which each rank has a part.
    """
    inner = unwrapped(network)
    state = inner.state_dict()
    tensors = rename({name: WRAPPERS.sub("", name) for name in state}, state, "network")
    if missing := [name for name in reference_names(inner.config) if name not in tensors]:
        raise UserError(
            f"network: {len(missing)} weights of its config are not there under their names: {listing(missing)}; "
            "take off parametrisations and adapters before saving (remove_parametrizations, merge_and_unload)"
        )
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UserError(f"network: {name} is on the meta device and has no values; load its weights before saving")
        if hasattr(tensor, "full_tensor"):
            raise UserError(
                f"network: {name} is spread over ranks (DTensor); gather the weights with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict (full_state_dict=True), load them into "
                "an SCLNetwork of one rank, and save that"
            )
    written: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        owner = first.setdefault(storage.data_ptr(), name)
        alone = owner == name and storage.nbytes() == tensor.numel() * tensor.element_size()
        written[name] = tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
        if owner != name and tensor.data_ptr() == tensors[owner].data_ptr():
            logger.warning("%s is tied to %s: both are saved, and a loaded network has them apart", name, owner)
    return written
