"""``cached_step``: the gradient of one big contrastive batch, with the activations of one micro-batch in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from sclkern.errors import UserError

# What open_clip's models return once for a batch, and not for each row.
SHARED = ("logit_scale", "logit_bias")


def cached_step(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    loss: Callable[..., Mapping[str, Tensor]],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the loss of all micro-batches together to the parameters of a model.

    Each micro-batch is taken twice, as in GradCache (Gao et al., arXiv 2101.06983): for its features without gradient,
    and, once the loss of all of them has given their gradients, to carry these into the model. The loss is evaluated
    once, so that ``logit_scale`` has its exact gradient; random numbers are replayed, so that dropout is the same both
    times, and buffers, such as the averages of a BatchNorm, are updated once. It is what backward() of one big batch
    would give, for a model that treats rows independently::

        optimizer.zero_grad()
        losses = cached_step(model, [(images, texts), ...], ClipLoss())
        optimizer.step()

    Args:
        model: called as ``model(*batch)``, such as open_clip's with ``output_dict=True``, or DDP around it, which then
            exchanges gradients once.
        batches: the micro-batches of this rank, each the arguments of the model, on its device.
        loss: called as ``loss(**outputs, output_dict=True)`` with the outputs of all micro-batches: ``ClipLoss``,
            ``SigLipLoss``, or open_clip's.
        autocast: a new context for each forward, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        scaler: scales the loss; then call its ``step`` and ``update``.

    Returns:
        The losses by name without gradient, and their sum as "loss".

    Raises:
        UserError: no micro-batch, a model that returns no dictionary, or an output with another number of rows than
            the rest of its micro-batch.
    """
    batches = list(batches)
    if not batches:
        raise UserError("batches: got none, expected one micro-batch or more")
    states, parts = [], []
    with _same_buffers(model), torch.no_grad():
        for batch in batches:
            states.append(_random_state(model))
            with autocast():
                parts.append(_outputs(model, batch))
    leaves = {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}
    wanted = [name for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad]
    with torch.enable_grad(), autocast():
        losses = loss(**leaves, output_dict=True)
        total = sum(losses.values(), torch.zeros(()))
    scaled = total if scaler is None else scaler.scale(total)
    found = torch.autograd.grad(scaled, [leaves[name] for name in wanted], allow_unused=True)
    gradients = dict(zip(wanted, found, strict=True))
    rows = [_rows(part) for part in parts]
    del parts
    for number, (batch, state) in enumerate(zip(batches, states, strict=True)):
        last = number == len(batches) - 1
        _set_random_state(state)
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
            with torch.enable_grad(), autocast():
                outputs = _outputs(model, batch)
            _backward(outputs, gradients, slice(sum(rows[:number]), sum(rows[: number + 1])), last)
    return {**{name: value.detach() for name, value in losses.items()}, "loss": total.detach()}


def _outputs(model: nn.Module, batch: Sequence[Any]) -> Mapping[str, Any]:
    outputs = model(*batch)
    if not isinstance(outputs, Mapping):
        raise UserError(
            f"model: returned {type(outputs).__name__}, expected a dictionary; open_clip.create_model takes "
            "output_dict=True"
        )
    rows = {name: len(value) for name, value in outputs.items() if _of_rows(name, value)}
    if len(set(rows.values())) != 1:
        raise UserError(f"model: returned {rows} rows, expected the same number of each, and one output at least")
    return outputs


def _of_rows(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and name not in SHARED and value.ndim > 0


def _rows(outputs: Mapping[str, Any]) -> int:
    return next(len(value) for name, value in outputs.items() if _of_rows(name, value))


def _joined(name: str, values: list[Any]) -> Any:
    """One output of all micro-batches, as a leaf."""
    if not isinstance(values[0], Tensor):
        return values[0]
    joined = torch.cat(values) if _of_rows(name, values[0]) else values[0].clone()
    return joined.detach().requires_grad_(joined.is_floating_point())


def _backward(outputs: Mapping[str, Any], gradients: Mapping[str, Tensor | None], rows: slice, last: bool) -> None:
    """Carry the gradients of the outputs of a micro-batch into the model; those of the shared ones with the last."""
    pairs = [
        (outputs[name], gradient[rows] if _of_rows(name, outputs[name]) else gradient)
        for name, gradient in gradients.items()
        if gradient is not None and outputs[name].requires_grad and (last or _of_rows(name, outputs[name]))
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards what they were."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def _random_state(model: nn.Module) -> tuple[Tensor, tuple[Any, Any]]:
    return torch.get_rng_state(), get_device_states(*model.parameters())


def _set_random_state(state: tuple[Tensor, tuple[Any, Any]]) -> None:
    torch.set_rng_state(state[0])
    set_device_states(*state[1])
