"""Clips of MiniGrid that one frame cannot tell: an agent walks through two rooms, in each of which lies a ball."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Ball, Door
from minigrid.minigrid_env import MiniGridEnv
from PIL import Image

from examples.demo_tasks.commands import evaluate, pretrain
from examples.demo_tasks.figures import Figure, recall
from sclkern.data.sources.arrow import write_pairs

COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
SPLITS = {"train": 1440, "val": 144, "test": 360}
# Cells of a room in the direction of the walk.
LENGTH = 4
# Cells of the agent's view, and pixels of a cell, which is a patch of the demo's model.
VIEW, CELL = 3, 8
FRAMES = 4
# Contrast alone: ranking each clip's caption among others by the fusion encoder takes fifteen times as long a clip.
KEYS: dict[str, Any] = {
    "evaluation.rerank": 0,
    "model.image_size": VIEW * CELL,
    "model.max_text_len": 16,
    "objectives.recipe": "[itc]",
    "run.max_steps": 400,
    "run.val_every": 100,
}


class TwoRooms(MiniGridEnv):
    """Two rooms in a row with a closed door between them; the agent sees only what lies before it.

    Args:
        colours: of the ball in the first room and in the second.
    """

    def __init__(self, colours: tuple[str, str]) -> None:
        self.colours = colours
        mission = MissionSpace(lambda: "walk through both rooms")
        super().__init__(mission, width=2 * LENGTH + 3, height=5, max_steps=100, agent_view_size=VIEW, highlight=False)

    def _gen_grid(self, width: int, height: int) -> None:
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        door = LENGTH + 1
        self.grid.vert_wall(door, 1, height - 2)
        self.grid.set(door, height // 2, Door("grey"))
        for room, colour in enumerate(self.colours):
            # Not beside the door: no frame may show both balls.
            self.put_obj(Ball(colour), room * door + self._rand_int(2, LENGTH), int(self._rand_elem((1, 3))))
        self.agent_pos, self.agent_dir = (1, height // 2), 0
        self.mission = "walk through both rooms"


def walk(colours: tuple[str, str], seed: int) -> Iterator[np.ndarray]:
    """Walk through two rooms.

    Args:
        colours: of ``TwoRooms``.
        seed: of where the balls lie.

    Returns:
        What the agent sees, (24, 24, 3) uint8 a frame.
    """
    rooms = TwoRooms(colours)
    rooms.reset(seed=seed)
    yield rooms.get_pov_render(CELL)
    while rooms.agent_pos[0] < 2 * LENGTH + 1:
        ahead = rooms.grid.get(*rooms.front_pos)
        closed = ahead is not None and not ahead.is_open
        rooms.step(rooms.actions.toggle if closed else rooms.actions.forward)
        yield rooms.get_pov_render(CELL)


def write(folder: Path, splits: dict[str, int] | None = None) -> Path:
    """Write clips with their captions, such as "red, then blue".

    Args:
        folder: of the tables.
        splits: clips of each, None for ``SPLITS``; captions occur equally often.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw, seeds = random.Random(0), itertools.count()
    captions = list(itertools.product(COLOURS, repeat=2))
    for split, count in (splits or SPLITS).items():
        chosen = [
            colours for _ in range(-(-count // len(captions))) for colours in draw.sample(captions, len(captions))
        ]
        write_pairs(folder / f"{split}.arrow", (_row(colours, next(seeds)) for colours in chosen[:count]))
    return folder


def run(checkpoint: Path, folder: Path) -> list[Figure]:
    """Go on with pre-training on four frames of each clip and on one, for the same number of steps.

    Args:
        checkpoint: folder of the pre-trained model or its run.
        folder: of everything that is written.

    Returns:
        Recall of four frames beside that of one, and beside chance.
    """
    data, found = write(folder / "data"), {}
    for frames in (1, FRAMES):
        keys = {**KEYS, "data.num_frames": frames, "model.max_frames": frames}
        trained = pretrain(checkpoint, data, folder / f"frames_{frames}", keys)
        # One candidate of the ranking head, which is not trained here.
        of_frames = {"data.num_frames": frames, "task.rerank": 1}
        found[frames] = evaluate("video-retrieval", trained, data, folder / f"frames_{frames}_test", of_frames)
    task, metric = "MiniGrid, which ball and then which", "R@1"
    model, four = f"trained on {FRAMES} frames", recall(found[FRAMES], "itc")
    return [
        Figure(task, model, metric, four, "trained on 1 frame", recall(found[1], "itc")),
        Figure(task, model, metric, four, "chance", recall(found[FRAMES], "chance")),
    ]


def _row(colours: tuple[str, str], seed: int) -> dict[str, Any]:
    caption = ", then ".join(colours)
    # Clips of one caption are no negatives of one another.
    return {"frames": [_encoded(frame) for frame in walk(colours, seed)], "caption": [caption], "image_id": caption}


def _encoded(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()
