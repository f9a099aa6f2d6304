"""Batches are copied on a stream of their own, which a stub stands for."""

from contextlib import contextmanager

import torch

from sclkern.data.transforms import normalize_images
from sclkern.training.passes import copied

CPU = torch.device("cpu")


class Stream:
    def __init__(self, events):
        self.events = events

    def wait_stream(self, other):
        self.events.append(("wait", self, other))


def test_the_step_waits_for_the_copies_and_keeps_their_memory(monkeypatch):
    events = []
    current, copies = Stream(events), Stream(events)

    @contextmanager
    def inside(stream):
        events.append(("enter", stream))
        yield
        events.append(("leave", stream))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    move = torch.Tensor.to

    def to(tensor, device, non_blocking):
        events.append(("copy", non_blocking))
        return move(tensor, device, copy=tensor.ndim == 4)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: events.append(("keep", tensor.ndim, stream))
    )
    # Of the ids nothing is copied: they are on the device already.
    batch = {"image": torch.randn(2, 3, 4, 4), "text_ids": torch.ones(2, 3), "text_tokens": 5}
    moved = copied(batch, CPU, copies)
    assert events == [
        ("enter", copies), ("copy", True), ("copy", True), ("leave", copies), ("wait", current, copies),
        ("keep", 4, current),
    ]  # fmt: skip
    assert moved["text_tokens"] == 5 and moved["text_ids"] is batch["text_ids"]
    assert torch.equal(moved["image"], batch["image"]) and moved["image"] is not batch["image"]


def test_on_a_cpu_nothing_is_copied():
    batch = {"image": torch.randn(2, 3, 4, 4), "text_tokens": 5}
    assert copied(batch, CPU, None) == batch


def test_images_of_bytes_are_normalised_where_they_are_moved():
    image = torch.randint(256, (2, 4, 3, 4, 4), dtype=torch.uint8)
    moved = copied({"image": image, "false_image": image[:1], "match_labels": torch.tensor([0, 1])}, CPU, None)
    assert torch.equal(moved["image"], normalize_images(image))
    assert torch.equal(moved["false_image"], moved["image"][:1]) and moved["match_labels"].tolist() == [0, 1]
