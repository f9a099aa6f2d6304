"""What contrasts exchange between processes: bytes counted below torch.distributed, and the formula of `sclkern plan`.

    python -m benchmarks.collectives            worlds of 2 and 4 over gloo, with records

Each process takes a step of a small model, of images with one evaluation for each micro-batch and of clips with one
contrastive batch for all, and a dispatch mode counts what reaches c10d. Then the gathers of the base model's features
and statistics are timed, at a global batch of 512: of a machine whose processes share its cores this says little more
than that they work, and nothing of a GPU's link.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.distributed import stack
from sclkern.step import contrast_batch, match_labels, target_counts
from sclkern.tools.bench import records
from sclkern.tools.scaling import contrast_collectives
from sclkern.training.config import PretrainConfig
from sclkern.training.sections import RunConfig

SEED, LENGTH, ROWS, ACCUMULATION = 3, 12, 4, 2
CASES = {"images": ("glscl", None, None), "clips": ("scl", 2, "contrastive batch")}


class Exchanged(TorchDispatchMode):
    """Counts the buffers of all-gathers by their bytes.

    Attributes:
        gathered: number of all-gathers by dtype and bytes of what each rank has afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gathered: Counter[tuple[torch.dtype, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered[args[0].dtype, args[0].nbytes] += 1
        return func(*args, **(kwargs or {}))


def run_of(case: str, world: int) -> PretrainConfig:
    """The configuration of a case for one of ``world`` ranks."""
    recipe, frames, contrastive = CASES[case]
    total = world * ROWS * ACCUMULATION if contrastive else None
    return PretrainConfig(
        model=SCLConfig.preset("tiny").replace(max_frames=frames or 0),
        objectives=ObjectiveConfig(recipe),
        run=RunConfig(batch_size=ROWS, accumulation=ACCUMULATION, contrastive_batch=total),
    )


def expected(case: str, world: int) -> Counter[int]:
    """The gathers of a step by the formula: their number by the bytes of the buffer."""
    config, frames = run_of(case, world), CASES[case][1] or 1
    found: Counter[int] = Counter()
    for one in contrast_collectives(config, world, frames):
        found[one.bytes] += one.times
    return found


def counted(case: str, rank: int, world: int) -> Counter[int]:
    """The gathers of a step in this process, without the descriptions that ranks compare: those are int64."""
    config, frames = run_of(case, world), CASES[case][1]
    torch.manual_seed(1)
    model = SCLModel(config.model, config.objectives).train()
    size, batches = config.model.image_size, []
    for micro in range(ACCUMULATION):
        place = torch.arange(ROWS) + (micro * world + rank) * ROWS
        labels = match_labels(SEED, place)
        image = torch.rand(ROWS, *([frames] if frames else []), 3, size, size)
        ids = torch.full((ROWS, LENGTH), 7)
        batch = {"image": image, "text_ids": ids, "text_mask": ids > 0, "place": place, "match_labels": labels}
        batches.append({**batch, "false_image": image[labels == 0]})
    with Exchanged() as exchanged:
        contrasts = [None] * ACCUMULATION
        if config.run.contrastive_batch:
            contrasts = contrast_batch(model, batches, SEED)
        for batch, contrast in zip(batches, contrasts, strict=True):
            counts = target_counts(model.config, model.objectives, [batch], SEED)
            model(batch, seed=SEED, counts=counts, contrast=contrast).total.backward()
    found: Counter[int] = Counter()
    for (dtype, size), times in exchanged.gathered.items():
        if dtype != torch.int64:
            found[size] += times
    return found


def timed(world: int, global_batch: int = 512, rounds: int = 7) -> list[dict[str, Any]]:
    """Seconds of each gather of the base model's contrasts, medians."""
    config = PretrainConfig(run=RunConfig(batch_size=global_batch // world))
    found = []
    for one in contrast_collectives(config, world):
        own = torch.zeros(one.bytes // world // 4)
        times = []
        for _ in range(rounds):
            dist.barrier()
            begin = time.perf_counter()
            stack(own)
            times.append(time.perf_counter() - begin)
        found.append({"name": one.name, "bytes": one.bytes, "sent": one.sent(world)})
        found[-1]["seconds"] = statistics.median(times[1:])
    return found


def _work(rank: int, world: int, folder: str, time_too: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found: dict[str, Any] = {case: counted(case, rank, world) for case in CASES}
    if time_too:
        found["seconds"] = timed(world)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measure(world: int, *, time_too: bool = False) -> list[dict[str, Any]]:
    """Count, and time on request, in ``world`` processes.

    Args:
        world: number of processes.
        time_too: whether gathers of the base model are timed.

    Returns:
        For each rank the counts by case, and "seconds".
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (world, folder, time_too), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def main() -> None:
    """Record worlds of 2 and 4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the records")
    results = parser.parse_args().results
    for world in (2, 4):
        ranks = measure(world, time_too=True)
        for case in CASES:
            every = [sum(size * times for size, times in rank[case].items()) for rank in ranks]
            formula = sum(size * times for size, times in expected(case, world).items())
            same = all(rank[case] == expected(case, world) for rank in ranks)
            print(f"{world} processes, {case}: {sorted(set(every))} bytes, by the formula {formula}, equal: {same}")
            records.append(f"collectives/{case}/{world}", results=results, counted=every, formula=formula, equal=same)
        for number, one in enumerate(ranks[0]["seconds"]):
            seconds = max(rank["seconds"][number]["seconds"] for rank in ranks)
            print(f"  {one['name']:24} {one['bytes'] / 1e6:8.3f} MB in {1e3 * seconds:.2f} ms")
            values = {key: one[key] for key in ("bytes", "sent")}
            records.append(f"collectives/time/{world}/{one['name']}", results=results, seconds=seconds, **values)


if __name__ == "__main__":
    main()
