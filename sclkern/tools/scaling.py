"""Scale on paper: what each collective of a step moves, how much of it hides behind arithmetic, and what N GPUs reach.

W ranks share the pairs of a step. A collective over a buffer of S bytes sends (W-1)/W S from each rank (all-gather,
reduce-scatter) or twice that (all-reduce), the least there is, and waits log2(W) times, or twice that, for the latency
of a link (Thakur et al. 2005; Patarasuk and Yuan 2009). docs/scaling.md states what else is assumed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sclkern.errors import UserError
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.contrastive import contrasted_objectives
from sclkern.step.flops import Counter
from sclkern.step.masks import token_capacity
from sclkern.step.memory import parameter_bytes
from sclkern.step.plan import make_plan
from sclkern.training.config import PretrainConfig
from sclkern.training.throughput import first_pass_flops

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
# What runs meanwhile: the backward of the last micro-batch, all arithmetic of the step, nothing.
Behind = Literal["backward", "step", "nothing"]

# Bytes per second of each GPU's link, and FLOP/s that it reaches in a step, where the user names none: an adapter of
# 400 Gb/s, and 40 % of an H200's 989 TFLOP/s.
LINK, RATE = 50e9, 396e12
LATENCY = 10e-6  # seconds that a message takes beside its bytes
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # of DDP, whose last one has no arithmetic left to hide behind
GOAL = 0.9
_FLOAT = 4


@dataclass(frozen=True)
class Collective:
    """One kind of exchange of a step.

    Attributes:
        name: what is exchanged.
        kind: of the collective.
        bytes: of the whole buffer: of an all-gather what each rank has afterwards, otherwise what each had before.
        times: in a step.
        behind: what hides it.
    """

    name: str
    kind: Kind
    bytes: int
    times: int
    behind: Behind = "nothing"

    def sent(self, world: int) -> float:
        """Bytes that each rank sends in a step."""
        return self.times * (2 if self.kind == "all_reduce" else 1) * (world - 1) / world * self.bytes

    def seconds(self, world: int, link: float) -> float:
        """Least time of a step's exchanges.

        Args:
            world: ranks.
            link: bytes per second that each rank sends and receives at once.

        Returns:
            Seconds.
        """
        waits = self.times * (2 if self.kind == "all_reduce" else 1) * math.ceil(math.log2(world))
        return self.sent(world) / link + waits * LATENCY


def contrast_collectives(config: PretrainConfig, world: int, num_frames: int = 1) -> list[Collective]:
    """What the contrasts of a recipe gather over the ranks, by ``ops.completion_loss`` as kernels and tiles compute it.

    Each contrast gathers both sets of features, then loss and log-sum-exp of each row (and, where the temperature is
    learnt, the sum that its gradient needs), in float32; MLTC, whose tokens are not as many in each pair, also a byte
    for each. In the backward nothing is exchanged.

    Args:
        config: of the run: of one rank, ``run.batch_size``, ``run.accumulation`` and ``run.contrastive_batch``.
        world: ranks.
        num_frames: of every clip; 1 for images.

    Returns:
        Two all-gathers for each contrast, three for each of MLTC.
    """
    model, objectives, run = config.model, config.objectives, config.run
    pairs = world * run.batch_size * run.accumulation
    at_once = contrasted_objectives(model, objectives, pairs, num_frames) if run.contrastive_batch else ()
    # Parts of a global batch give each caption the same room.
    tokens = token_capacity(model, objectives, model.max_text_len)
    directions = 1 if objectives.directions == "recovered_to_complete" else 2
    # Name, vectors of a pair, their length, bytes of a number, whether the temperature is learnt.
    half = 2 if config.run.precision == "bfloat16" else _FLOAT
    sizes = {
        "itc": [("ITC", 1, model.projection_dim, half, True)],
        "mvsc": [("MVSC", num_frames, model.width, _FLOAT, False)],
        "mlsc": [("MLSC", 1, model.width, _FLOAT, False)],
        "mltc": [
            ("MLTC of patches", num_frames * tokens["replaced"], model.width, _FLOAT, False),
            ("MLTC of tokens", tokens["completion"], model.width, _FLOAT, False),
        ],
    }
    found = []
    for objective in objectives.selected:
        times = 1 if objective.name in at_once else run.accumulation
        rows = pairs // times
        for name, vectors, length, size, learnt in sizes.get(objective.name, ()):
            if name in within_rank(objectives):
                continue
            of_both = 2 if name == "ITC" else directions
            features = rows * vectors * 2 * length * size
            statistics = rows * vectors * (1 + of_both * (2 if learnt else 1)) * _FLOAT
            found.append(Collective(f"features of {name}", "all_gather", features, times))
            found.append(Collective(f"losses and LSE of {name}", "all_gather", statistics, times))
            if objective.name == "mltc":
                found.append(Collective(f"places of {name}", "all_gather", rows * vectors, times))
    return found


def within_rank(objectives: ObjectiveConfig) -> tuple[str, ...]:
    """Contrasts whose negatives are those of the rank, as published."""
    return ("MLSC", "MLTC of patches") if objectives.negatives == "published" else ()


def step_collectives(config: PretrainConfig, world: int, num_frames: int = 1) -> list[Collective]:
    """Every exchange of a step.

    Args:
        config: as of ``contrast_collectives``.
        world: ranks.
        num_frames: of every clip; 1 for images.

    Returns:
        The collectives; those of numbers that a log shows are counted in every step.
    """
    run = config.run
    passes = run.accumulation * (2 if run.contrastive_batch and run.accumulation > 1 else 1)
    weights = parameter_bytes(config.model)
    if run.parallel == "fsdp":
        # What lies outside of blocks stays gathered until the end of the backward.
        found = [
            Collective("weights for the forward", "all_gather", weights.total, passes, "step"),
            Collective(
                "weights for the backward", "all_gather", weights.total - weights.outside, run.accumulation, "step"
            ),
            Collective("gradients", "reduce_scatter", weights.total, 1, "backward"),
        ]
    else:
        found = [Collective("gradients", "all_reduce", weights.total, 1, "backward")]
    found += contrast_collectives(config, world, num_frames)
    found.append(Collective("counts of targets", "all_reduce", 3 * 8, 1 if run.contrastive_batch else run.accumulation))
    found.append(Collective("gradient norm, losses and times", "all_reduce", 32 * 8, 1))
    return found


@dataclass(frozen=True)
class Scale:
    """What a number of GPUs reaches.

    Attributes:
        gpus: W.
        batch_size: pairs of a micro-batch of one GPU.
        accumulation: micro-batches.
        collectives: of a step.
        compute_seconds: arithmetic of a step on one GPU.
        moved_bytes: sent by each GPU in a step.
        communication_seconds: all exchanges one after the other.
        hidden: share of them that arithmetic hides.
        efficiency: time of the arithmetic over that of the step.
        pairs_per_second: of all GPUs.
    """

    gpus: int
    batch_size: int
    accumulation: int
    collectives: tuple[Collective, ...]
    compute_seconds: float
    moved_bytes: float
    communication_seconds: float
    hidden: float
    efficiency: float
    pairs_per_second: float


class Calculator:
    """Scales a run whose batch of a step stays the same, as training needs it.

    Args:
        config: of the run on one GPU: its batch of a step is ``run.batch_size`` x ``run.accumulation``.
        link: bytes per second that each GPU sends and receives at once over its slowest link.
        rate: FLOP/s that a GPU reaches.
        caption_tokens: of a caption on average.
        padded_tokens: of the longest caption.
        num_frames: of every clip; 1 for images.

    Raises:
        UserError: a rate that is not positive.
    """

    def __init__(
        self,
        config: PretrainConfig,
        link: float,
        *,
        rate: float = RATE,
        caption_tokens: int = 13,
        padded_tokens: int = 18,
        num_frames: int = 1,
    ) -> None:
        for name, value in (("--link", link / 1e9), ("--rate", rate / 1e12)):
            if not value > 0:
                raise UserError(f"{name}: got {value:g}, expected a positive number")
        self.config, self.link, self.rate = config, link, rate
        self.num_frames = num_frames
        plan = make_plan(config.objectives, config.step)
        sizes = {"caption_tokens": caption_tokens, "padded_tokens": padded_tokens, "num_frames": num_frames}
        trained: dict[str, Any] = {**sizes, "device": "cuda", "backend": config.run.backend}
        counter = Counter(config.model, config.objectives, plan, **trained)
        forward = sum(part.flops for part in counter.parts())
        self.backward_flops = sum(part.backward for part in counter.parts()) + config.step.checkpoint_blocks * forward
        self.flops = sum(part.total for part in counter.parts()) + config.step.checkpoint_blocks * forward
        self._first_pass = functools.partial(
            first_pass_flops,
            caption_tokens=caption_tokens,
            padded_tokens=padded_tokens,
            num_frames=num_frames,
            device="cuda",
        )
        self.global_batch = config.run.batch_size * config.run.accumulation

    def at(self, gpus: int, *, link: float | None = None, pairs: int | None = None) -> Scale:
        """What a number of GPUs reaches.

        Args:
            gpus: W.
            link: as in the class, another.
            pairs: of each GPU in a step; None shares the batch of the configuration.

        Returns:
            Its parts.

        Raises:
            UserError: fewer pairs than GPUs, or no GPU.
        """
        if gpus < 1:
            raise UserError(f"--gpus: got {gpus}, expected 1 or more")
        pairs = self.global_batch // gpus if pairs is None else pairs
        if pairs < 1:
            raise UserError(f"--gpus: got {gpus}, expected at most {self.global_batch}, the pairs of a step")
        run = self.config.run
        accumulation = max(1, pairs // run.batch_size)
        rows = pairs // accumulation
        of_rank = replace(run, batch_size=rows, accumulation=accumulation)
        config = replace(self.config, run=of_rank)
        compute = rows * accumulation * (self.flops + self._first_pass(config)) / self.rate
        collectives = tuple(step_collectives(config, gpus, self.num_frames))
        hidden, total = 0.0, 0.0
        backward = rows * self.backward_flops / self.rate
        for behind, room in (("backward", backward), ("step", compute), ("nothing", 0.0)):
            group = [one for one in collectives if one.behind == behind]
            seconds = sum(one.seconds(gpus, link or self.link) for one in group)
            total += seconds
            if room and seconds:
                hidden += min(room, seconds * (1 - self._alone(group)))
        exposed = total - hidden
        return Scale(
            gpus=gpus,
            batch_size=rows,
            accumulation=accumulation,
            collectives=collectives,
            compute_seconds=compute,
            moved_bytes=sum(one.sent(gpus) for one in collectives),
            communication_seconds=total,
            hidden=hidden / total if total else 1.0,
            efficiency=compute / (compute + exposed),
            pairs_per_second=gpus * rows * accumulation / (compute + exposed),
        )

    def _alone(self, group: Sequence[Collective]) -> float:
        """Share of collectives that nothing can hide: the last bucket of DDP, the first and last block of FSDP."""
        weights = parameter_bytes(self.config.model)
        last = BUCKET if self.config.run.parallel == "ddp" else weights.block + weights.outside
        return min(1.0, last / sum(one.bytes * one.times for one in group))

    def least_link(self, gpus: int) -> float | None:
        """Bytes per second of the slowest link at which ``GOAL`` of the speed is reached; None if none is enough."""

        def reached(exponent: float) -> bool:
            return self.at(gpus, link=10**exponent).efficiency >= GOAL

        exponent = _least(reached, 6.0, 13.0)
        return None if exponent is None else 10**exponent

    def least_pairs(self, gpus: int) -> int | None:
        """Pairs of each GPU in a step from which ``GOAL`` of the speed is reached; None if no number is enough."""

        def reached(exponent: float) -> bool:
            return self.at(gpus, pairs=round(2**exponent)).efficiency >= GOAL

        return next((2**exponent for exponent in range(17) if reached(exponent)), None)


def _least(reached: Callable[[float], bool], low: float, high: float) -> float | None:
    """The least number from which a condition holds, by halving."""
    if not reached(high):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def describe_scale(calculator: Calculator, gpus: Sequence[int]) -> dict[str, Any]:
    """The scales of several numbers of GPUs as plain data.

    Args:
        calculator: of the run.
        gpus: numbers of GPUs.

    Returns:
        "assumed", and "scales", each with the fields of ``Scale`` and "least_link" and "least_pairs".
    """
    assumed: dict[str, Any] = {"link": calculator.link, "rate": calculator.rate, "latency": LATENCY, "goal": GOAL}
    assumed |= {"parallel": calculator.config.run.parallel, "global_batch": calculator.global_batch}
    scales = []
    for number in gpus:
        scale = calculator.at(number)
        collectives = [
            {**asdict(one), "sent": one.sent(number), "seconds": one.seconds(number, calculator.link)}
            for one in scale.collectives
        ]
        ends = {"least_link": calculator.least_link(number), "least_pairs": calculator.least_pairs(number)}
        scales.append({**asdict(scale), "collectives": collectives, **ends})
    return {"assumed": assumed, "scales": scales}


def format_scale(described: dict[str, Any]) -> str:
    """Format the data of ``describe_scale`` for people.

    Args:
        described: the data.

    Returns:
        Lines of text.
    """
    assumed = described["assumed"]
    lines = [
        f"{assumed['global_batch']} pairs a step, {assumed['parallel'].upper()}, {assumed['link'] / 1e9:g} GB/s a GPU, "
        f"{assumed['rate'] / 1e12:g} TFLOP/s reached; on paper, not measured",
        "",
        f"{'GPUs':>5}{'micro-batch':>13}{'arithmetic':>12}{'sent':>10}{'exchanges':>11}{'hidden':>8}{'efficiency':>12}"
        f"{'pairs/s':>9}  {assumed['goal']:.0%} needs",
    ]
    for scale in described["scales"]:
        shape = f"{scale['batch_size']} x {scale['accumulation']}"
        pairs, link = scale["least_pairs"], scale["least_link"]
        needs = f"{pairs} pairs a GPU, or " if pairs else ""
        needs += f"{link / 1e9:.3g} GB/s" if link else "no link is enough"
        lines.append(
            f"{scale['gpus']:5}{shape:>13}{1e3 * scale['compute_seconds']:9.1f} ms{scale['moved_bytes'] / 1e6:7.0f} MB"
            f"{1e3 * scale['communication_seconds']:8.1f} ms{scale['hidden']:8.0%}{scale['efficiency']:12.1%}"
            f"{scale['pairs_per_second']:9.0f}  {needs}"
        )
    largest = described["scales"][-1]
    lines += [
        "",
        f"of {largest['gpus']} GPUs, each step",
        f"{'':34}{'kind':16}{'buffer':>12}{'times':>7}{'sent':>12}{'ms':>8}",
    ]
    for one in largest["collectives"]:
        lines.append(
            f"{one['name']:34}{one['kind'].replace('_', '-'):16}{one['bytes'] / 1e6:9.3f} MB{one['times']:7}"
            f"{one['sent'] / 1e6:9.3f} MB{1e3 * one['seconds']:8.2f}"
        )
    return "\n".join(lines)
