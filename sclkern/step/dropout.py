"""Keys of dropout for a batch whose rows say their place in the global batch.

A mask then depends on (seed of the step, module, place, variant or view, position): not on packing, on the micro-batch
that holds the row, on the rank, on which other views the plan has, or on how often a layer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sclkern.models.layouts import DropoutKeys
from sclkern.models.network import SCLNetwork
from sclkern.objectives.objective import OBJECTIVES
from sclkern.objectives.views import TEXT_VARIANTS, VIEWS
from sclkern.random import module_seeds
from sclkern.step.masks import StepMasks

# Ids of sequences at one place, the last of them for texts that no view owns; and of tokens in a sequence, of which
# attention with dropout takes no more.
SEQUENCES, TOKENS = 64, 2**16


@dataclass(frozen=True)
class BatchKeys:
    """Makes the ``DropoutKeys`` of the layouts of a step.

    Attributes:
        place: (B,) int64, of each row in the global batch.
        seeds: of the modules.
    """

    place: Tensor
    seeds: tuple[Tensor, ...]

    @cached_property
    def _sequences(self) -> tuple[Tensor, ...]:
        """(B,) ids for each number of a variant or view."""
        number = torch.arange(SEQUENCES, device=self.place.device)
        return (self.place * SEQUENCES + number[:, None]).unbind()

    @cached_property
    def _first_tokens(self) -> tuple[Tensor, ...]:
        return tuple((torch.stack(self._sequences) * TOKENS).unbind())

    def padded(self, numbers: Sequence[int], length: int) -> DropoutKeys:
        """Keys of padded sequences of one length.

        Args:
            numbers: of the variants or views, which stand one after the other, B rows each.
            length: of every sequence.

        Returns:
            With tokens (len(numbers) * B, length).
        """
        sequences = _joined([self._sequences[number] for number in numbers])
        tokens = _joined([self._first_tokens[number] for number in numbers])[:, None]
        return DropoutKeys(sequences, tokens + torch.arange(length, device=tokens.device), self.seeds)

    def packed(self, numbers: Sequence[int], lengths: Sequence[int]) -> DropoutKeys:
        """Keys of packed sequences, of one length in each variant or view.

        Args:
            numbers: of the variants or views.
            lengths: of their sequences.

        Returns:
            With tokens (T,).
        """
        position = torch.arange(max(lengths, default=0), device=self.place.device)
        tokens = [
            (self._first_tokens[number][:, None] + position[:length]).flatten()
            for number, length in zip(numbers, lengths, strict=True)
        ]
        return DropoutKeys(_joined([self._sequences[number] for number in numbers]), _joined(tokens), self.seeds)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def batch_keys(network: SCLNetwork, masks: StepMasks) -> BatchKeys | None:
    """The keys of a step.

    Args:
        network: its modules draw masks in training mode.
        masks: with the seed of dropout and the places of the rows, where the batch has them.

    Returns:
        The keys; None where nothing is dropped, or where masks follow from where tokens lie.
    """
    if masks.place is None or masks.seed is None or not network.training or network.config.dropout == 0:
        return None
    return BatchKeys(masks.place, module_seeds(masks.seed, network.dropout_modules, masks.place.device))


def view_number(name: str) -> int:
    """The number of a view among all that objectives read, whatever a recipe has of them.

    Args:
        name: of the view.

    Returns:
        The number, below ``SEQUENCES``.

    Raises:
        ValueError: objectives read more views than there are numbers.
    """
    known = dict.fromkeys(view.name for view in VIEWS)
    known |= dict.fromkeys(outputs.view.name for other in OBJECTIVES.values() for outputs in other.outputs)
    number, limit = list(known).index(name), SEQUENCES - len(TEXT_VARIANTS)
    if number >= limit:
        raise ValueError(f"view {name!r}: got view number {number + 1} of all objectives, expected at most {limit}")
    return number


def text_number(encoding: str) -> int:
    """The number of a text encoding: that of the view which owns it, or one of the variant that many share.

    Args:
        encoding: name in the plan, "variant" or "variant/consumer".

    Returns:
        The number, below ``SEQUENCES``.
    """
    variant, _, consumer = encoding.partition("/")
    if any(consumer == outputs.view.name for other in OBJECTIVES.values() for outputs in other.outputs):
        return view_number(consumer)
    return SEQUENCES - 1 - [*TEXT_VARIANTS].index(variant)  # type: ignore[arg-type]
