"""Several sources as one: their pairs one after another, and steps of images and of clips in one run."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

import numpy as np
from PIL import Image

from sclkern.data.batches import Batch, BatchesOfKinds, BatchRequest
from sclkern.data.digest import digest
from sclkern.data.loader import PairLoader, load_batches
from sclkern.data.order import data_seed, take_share
from sclkern.data.source import PairSource, has_clips, image_ids

Kind = Literal["images", "clips"]
KINDS: tuple[Kind, ...] = ("images", "clips")
# Before the first step of a run, steps by which the seed shifts the alternation.
_MOST_SHIFT = 1024


def kind_of(source: PairSource) -> Kind:
    """What a source holds: clips where it has ``frames``."""
    return "clips" if has_clips(source) else "images"


def kind_of_batch(batch: Mapping[str, Any]) -> Kind:
    """What the samples of a batch are: clips have frames, (B, F, 3, H, W)."""
    return "clips" if batch["image"].ndim == 5 else "images"


class MixedPairs:
    """Sources one after another, as one ``PairSource``; none of its numbers means the same as in a source of its own.

    Args:
        sources: at least one, all of images or all of clips.
        folders: of the sources, which names of images begin with.
    """

    def __init__(self, sources: Sequence[PairSource], folders: Sequence[str]) -> None:
        self.sources = tuple(sources)
        # Names are unique, also where two sources read different splits of one folder.
        self.folders = [
            folder if folders.count(folder) == 1 else f"{folder} (source {number + 1})"
            for number, folder in enumerate(folders)
        ]
        self._first_pair = _starts([source.num_pairs for source in sources])
        self._first_image = _starts([source.num_images for source in sources])
        self.num_pairs, self.num_images = self._first_pair.pop(), self._first_image.pop()
        self.pair_image = np.concatenate(
            [first + np.asarray(source.pair_image) for first, source in zip(self._first_image, sources, strict=True)]
        )
        self._groups: np.ndarray | None = None
        if any(hasattr(source, "image_ids") for source in sources):
            ids = [image_ids(source) for source in sources]
            first = _starts([int(of_source.max()) + 1 for of_source in ids])
            self.image_ids = np.concatenate([start + of_source for start, of_source in zip(first, ids, strict=False)])

    @property
    def pair_group(self) -> np.ndarray:
        """(num_pairs,) int64; computed when it is first read, because no training step needs it."""
        if self._groups is None:
            groups: list[np.ndarray] = []
            hashes: list[np.ndarray] = []
            for source in self.sources:
                _, first, group = np.unique(source.pair_group, return_index=True, return_inverse=True)
                groups.append(group + sum(len(one) for one in hashes))
                # Not the texts: those of ten million pairs take gigabytes.
                hashes.append(np.array([_hashed(source.caption(int(pair))) for pair in first], dtype="S16"))
            self._groups = np.unique(np.concatenate(hashes), return_inverse=True)[1][np.concatenate(groups)]
        return self._groups

    @property
    def digest(self) -> str:
        """Of the digests of all sources."""
        hashed = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            hashed.update(f"{source.num_pairs} {source.num_images} {digest(source)}\n".encode())
        return hashed.hexdigest()

    def caption(self, pair: int) -> str:
        """Caption of a pair."""
        source, own = _find(self._first_pair, pair)
        return self.sources[source].caption(own)

    def image(self, image: int) -> Image.Image:
        """Decoded image of an image index."""
        source, own = _find(self._first_image, image)
        return self.sources[source].image(own)

    @property
    def image_bytes(self) -> Callable[[int], bytes] | None:
        """Gives an image as it is stored, where every source does."""
        return self._image_bytes if all(getattr(one, "image_bytes", None) for one in self.sources) else None

    def _image_bytes(self, image: int) -> bytes:
        source, own = _find(self._first_image, image)
        stored: Any = self.sources[source]
        encoded: bytes = stored.image_bytes(own)
        return encoded

    def image_name(self, image: int) -> str:
        """Folder of the source and name in it."""
        source, own = _find(self._first_image, image)
        return f"{self.folders[source]}: {self.sources[source].image_name(own)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": None}


class MixedClips(MixedPairs):
    """As ``MixedPairs``, of sources of clips."""

    def frames(self, image: int, choose: Callable[[int], Sequence[int]]) -> list[Image.Image]:
        """Frames of a clip, as its source gives them."""
        source, own = _find(self._first_image, image)
        clips: Any = self.sources[source]
        return clips.frames(own, choose)


def mix_pairs(sources: Sequence[PairSource], folders: Sequence[str]) -> PairSource:
    """Put sources of one kind together.

    Args:
        sources: at least one.
        folders: of the sources, for names of images.

    Returns:
        The source itself where there is one, otherwise all of them one after another.
    """
    if len(sources) == 1:
        return sources[0]
    mixed: Any = MixedClips if kind_of(sources[0]) == "clips" else MixedPairs
    pairs: PairSource = mixed(sources, folders)
    return pairs


class KindSchedule:
    """Whether a step has images or clips: a function of the seed and the step alone.

    Steps of each kind are spread evenly: of n steps in a row, a kind has its share of n to within one.

    Args:
        weights: of each kind, positive; only their ratios count.
        seed: shifts the alternation.
    """

    def __init__(self, weights: Mapping[Kind, float], seed: int) -> None:
        self.weights = dict(weights)
        self._clips = weights.get("clips", 0.0) / sum(weights.values())
        self._shift = data_seed(seed, 0) % _MOST_SHIFT

    @property
    def shares(self) -> dict[Kind, float]:
        """Share of the steps that each kind has."""
        return {kind: weight / sum(self.weights.values()) for kind, weight in self.weights.items()}

    def at(self, step: int) -> tuple[Kind, int]:
        """The kind of a step, and the number of steps of this kind before it."""
        taken, clips = take_share(self._clips, np.array([self._shift, self._shift + step]))
        before = int(clips[1] - clips[0])
        return ("clips", before) if taken[1] else ("images", step - before)


class MixedLoader:
    """Batches of a run whose steps have images or clips; each kind has a ``PairLoader``, and both the same workers.

    Args:
        loaders: by kind; they agree in everything but their samples.
        schedule: of the steps.
    """

    def __init__(self, loaders: Mapping[Kind, PairLoader], schedule: KindSchedule) -> None:
        self.loaders = dict(loaders)
        self.schedule = schedule
        self._any = next(iter(self.loaders.values()))
        self.batch_size, self.accumulation = self._any.batch_size, self._any.accumulation
        self.rank, self.world_size = self._any.rank, self._any.world_size
        self.pad_to_max = self._any.pad_to_max

    @property
    def global_batch(self) -> int:
        """Pairs of a step over all ranks and micro-batches."""
        return self._any.global_batch

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many pairs come as the data have."""
        return sum(loader.steps_per_epoch for loader in self.loaders.values())

    def steps(self, start: int = 0) -> Generator[Batch]:
        """As ``PairLoader.steps``: the batches of this rank from a step on, without end."""
        if len(self.loaders) == 1:
            return self._any.steps(start)
        requests = (self._request(step, micro) for step in count(start) for micro in range(self.accumulation))
        batches = BatchesOfKinds({kind: loader.batches for kind, loader in self.loaders.items()})
        return load_batches(batches, requests, self._any.num_workers)

    def _request(self, step: int, micro: int) -> tuple[Kind, BatchRequest]:
        kind, own = self.schedule.at(step)
        return kind, self.loaders[kind].request_of_step(step, micro, own)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of these begins, and the sum."""
    return [0, *np.cumsum(sizes).tolist()]


def _find(first: Sequence[int], index: int) -> tuple[int, int]:
    source = bisect_right(first, index) - 1
    return source, int(index) - first[source]


def _hashed(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
