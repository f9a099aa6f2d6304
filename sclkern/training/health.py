"""Detection of losses, gradients and parameters that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sclkern.errors import UserError
from sclkern.training.sharded import local_part
from sclkern.training.world import World


class FiniteCheck:
    """Remembers on the device whether every loss and gradient norm was finite, so that no step waits for a GPU.

    Args:
        model: whose gradients and parameters are searched for the cause.
        device: device of the losses.
        world: the processes that train together, all of which find the same at the same step; None is this one alone.
    """

    def __init__(self, model: nn.Module, device: torch.device, world: World | None = None) -> None:
        self.model = model
        self.world = world or World()
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._image: tuple[int, str] | None = None

    def observe(self, *values: Tensor) -> None:
        """Take 0-d tensors of a step into account, without a wait."""
        for value in values:
            self._finite &= torch.isfinite(value)

    def observe_images(self, step: int, batch: Mapping[str, Any], name_of: Callable[[int], str]) -> None:
        """Remember the first image that is not finite; the losses will not be finite either.

        Args:
            step: number of the step.
            batch: a micro-batch, on the host: ``image``, and ``pair`` of each row; ``false_image`` of some rows.
            name_of: the name of the image of a pair.
        """
        for key in ("image", "false_image"):
            images = batch.get(key)
            if self._image is not None or images is None or not images.is_floating_point() or not len(images):
                continue
            # A sum shows what a search would, and takes no memory.
            broken = ~torch.isfinite(images.flatten(1).sum(1))
            if broken.any():
                row = int(broken.int().argmax())
                named = f"image {name_of(int(batch['pair'][row]))}" if key == "image" else "a negative image"
                self._image = step, named

    def require(self, step: int, saved_step: int, values: Mapping[str, Tensor] | None = None) -> None:
        """Raise if anything observed was not finite; this waits for the device.

        Args:
            step: number of the step, for the message.
            saved_step: step of the latest checkpoint, -1 if there is none.
            values: losses of the step by name, to name the one that is not finite.

        Raises:
            UserError: names the first image, loss, gradient or parameter that is not finite, what is kept, and the
                remedy.
        """
        if self._finite:
            return
        values = values or {}
        found = self.world.gather((self._image, self._first_broken(values) or "an earlier loss"))
        # Gradients are broken everywhere, a loss also where another rank's features are, an image where it began.
        known = [name for name in values if name != "grad_norm"]

        def order(rank: int) -> tuple[bool, int, int]:
            image, cause = found[rank]
            return image is None, image[0] if image else 0, known.index(cause) if cause in known else len(known)

        rank = min(range(len(found)), key=order)
        image, cause = found[rank]
        remedy = "lower optimizer.learning_rate or set optimizer.max_grad_norm"
        if image is not None:
            cause = image[1] + (f", read in step {image[0]}," if image[0] != step else "")
            remedy = "look at this image and at data.transform"
        cause += f" on rank {rank}" if self.world.size > 1 else ""
        kept = f"the checkpoint of step {saved_step} is kept" if saved_step >= 0 else "no step was saved"
        raise UserError(f"step {step}: {cause} is not finite; {kept}; {remedy}, then --resume")

    def _first_broken(self, values: Mapping[str, Tensor]) -> str | None:
        for name, value in values.items():
            if not torch.isfinite(value).all():
                return name
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(local_part(parameter.grad)).all():
                return f"the gradient of {name}"
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(local_part(parameter)).all():
                return f"the parameter {name}"
        return None
