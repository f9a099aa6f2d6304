"""Images that cannot be decoded: counted, logged once each, and an error when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sclkern.errors import UserError

_log = logging.getLogger("sclkern.data")


class UndecodableImages:
    """Distinct images of a source that cannot be decoded; each is logged once to ``sclkern.data``.

    Args:
        num_images: Number of images of the source.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._names: dict[str, None] = {}

    def __len__(self) -> int:
        """Distinct undecodable images so far."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Whether the image of this name is among them."""
        return name in self._names

    def add(self, names: Iterable[str]) -> None:
        """Count images.

        Args:
            names: Their ``image_name``; those counted before are not counted again.

        Raises:
            UserError: More than 1 % of the images are undecodable.
        """
        for name in names:
            if name not in self._names:
                self._names[name] = None
                _log.warning("skipped an image that cannot be decoded: %s", name)
        if 100 * len(self) > self.num_images:
            raise UserError(
                f"{len(self)} of {self.num_images} images cannot be decoded, expected 1 % at most; "
                f"the first is {next(iter(self._names))}; repair them or remove them from the data"
            )

    def state_dict(self) -> dict[str, list[str]]:
        """The names, in the order they were met."""
        return {"names": list(self._names)}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Take over the names of ``state_dict`` without logging them again."""
        self._names = dict.fromkeys(state["names"])
