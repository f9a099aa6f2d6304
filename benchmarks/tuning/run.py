"""Candidates checked and measured on a GPU, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch

from benchmarks.harness import timing, verification
from benchmarks.harness.op_cases import IMPLEMENTATIONS, Case
from benchmarks.tuning.candidates import Candidate
from benchmarks.tuning.launches import compile_launches, configured, launches
from benchmarks.tuning.plan import TARGET
from sclkern.tools.bench.roofline import MachineSpec, lower_bound
from sclkern.tools.specs import SPECS
from sclkern.tools.static.workers import submit

# Of each group, measured before any group has its next one.
FIRST_ROUND = 3
# Seconds that a candidate may take; with less left none is begun.
MIN_SECONDS = 4.0


def ordered(chosen: Sequence[Sequence[Candidate]]) -> list[list[Candidate]]:
    """The first few of every group, then the rest of every group; the present configuration leads each."""
    heads = [group[: 1 + FIRST_ROUND] for group in chosen]
    return heads + [[group[0], *group[1 + FIRST_ROUND :]] for group in chosen if len(group) > 1 + FIRST_ROUND]


Jobs = dict[Candidate, list[Future[Any]]]


def precompile(chosen: Sequence[Sequence[Candidate]]) -> Jobs:
    """Start to compile all on every core, in the order of measurement: a candidate then waits for its own alone."""
    jobs: Jobs = {}
    for candidate in (candidate for group in chosen for candidate in group):
        if candidate not in jobs:
            # Checks run without dropout as well.
            keys = {
                dropout: [launch.key for launch in launches(candidate, dropout)] for dropout in _dropouts(candidate)
            }
            jobs[candidate] = [submit(compile_launches, candidate, *each, TARGET) for each in keys.items()]
    return jobs


def _dropouts(candidate: Candidate) -> tuple[bool, ...]:
    return (True, False) if candidate.size.dropout_p else (True,)


def measure(candidate: Candidate) -> dict[str, Any]:
    """Check and time a candidate: ``verification.verify`` and ``timing.on_device`` with its values set."""
    case = Case(candidate.op, candidate.size, torch.bfloat16, IMPLEMENTATIONS[candidate.op][0], candidate.pass_)
    outcome: dict[str, Any] = {"sets": list(candidate.kernels)}
    try:
        with configured(candidate):
            # It remembers what was right, by op and size.
            verification.clear_caches()
            outcome |= verification.verify(case)
            outcome |= timing.on_device(case)
    except verification.WrongResultError as error:
        return outcome | {"outcome": "wrong", "problem": str(error)}
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        return outcome | {"outcome": "failed", "problem": f"{type(error).__name__}: {text}"[:300]}
    return outcome | {"outcome": "measured", "seconds": outcome["device_quartiles"][1]}


def tune(
    chosen: Sequence[Sequence[Candidate]],
    until: float,
    run: str,
    rates: MachineSpec,
    jobs: Jobs,
    done: dict[str, str],
    record: Callable[..., object],
    lost: Callable[[], bool],
) -> None:
    """Measure until that time (of ``time.monotonic``), each recorded under the name of the run as it is known.

    Args:
        chosen: groups of candidates, the present configuration first in each.
        until: nothing is begun that may end later.
        run: name of the run.
        rates: of the machine, for the lower bound.
        jobs: of ``precompile``, to be waited for.
        done: outcomes by candidate, of what is not measured again; without the present configuration there is nothing
            to compare.
        record: appends a record.
        lost: whether the GPU's context is lost, which ends it.
    """
    for group in chosen:
        rest = [candidate for candidate in group[1:] if str(candidate) not in done]
        if done.get(str(group[0])) in ("failed", "wrong"):
            continue
        present = None
        for candidate in [group[0], *rest] if rest else []:
            if until - time.monotonic() < MIN_SECONDS:
                return
            begin = time.monotonic()
            wait(jobs.get(candidate, ()))
            outcome = measure(candidate)
            if outcome["outcome"] == "measured":
                cost = SPECS[candidate.op].cost(candidate.size.values, 2)
                least = lower_bound(cost, candidate.pass_, rates)
                present = outcome["seconds"] if candidate is group[0] else present
                outcome |= {"floor_seconds": least, "roofline_fraction": least / outcome["seconds"]}
                outcome |= {"ratio": outcome["seconds"] / present, "present_seconds": present}
            described = {"op": candidate.op, "size": candidate.size.name, "dtype": "bfloat16", "pass": candidate.pass_}
            described |= {name: getattr(candidate, name) for name in ("choice", "config", "predicted", "reason")}
            record(f"tune/{candidate}", run=run, took=round(time.monotonic() - begin, 2), **described, **outcome)
            if outcome["outcome"] == "failed" and lost():
                return
            if present is None:
                break


def context_is_lost() -> bool:
    """Whether the GPU answers this process no more."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False
