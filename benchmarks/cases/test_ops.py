"""Every op at the workload's sizes, beside its definition, torch.compile, torch's SDPA by backend and other libraries.

A case is timed only after its output and gradients were compared with float64 in the same process. A case that is
further off than rounding explains fails and leaves no record.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.implementations import UnsupportedError
from benchmarks.harness.op_cases import Case, cases
from benchmarks.harness.profiler_trace import peak_bytes, record_trace
from benchmarks.harness.timing import (
    DeviceLostError,
    cost_of,
    make_call,
    on_device,
    quartiles,
    reason_to_skip,
    rounds_of,
)
from benchmarks.harness.verification import GPU, verify
from sclkern.tools.bench.roofline import MachineSpec, lower_bound

# Wall time for each case.
SECONDS = 0.3


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=pytest.mark.priority(case.priority)) for case in cases(GPU)]
)
def test_op(benchmark, record, rates, case):
    reason = reason_to_skip(case)
    if reason:
        pytest.skip(reason)
    try:
        measure(benchmark, record, rates, case)
    except UnsupportedError as error:
        pytest.skip(str(error))
    except DeviceLostError as error:
        pytest.exit(f"{case}: {error}", returncode=1)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip(f"{case.implementation.name}: out of memory for {case.op} {case.size.name}")


def measure(benchmark, record, rates: dict, case: Case) -> None:
    dtype = str(case.dtype).removeprefix("torch.")
    benchmark.group = " ".join((case.op, case.size.name, dtype, case.pass_))
    checked = verify(case)
    device = on_device(case) if GPU else {}
    call, _ = make_call(case)

    def run() -> None:
        call()
        if GPU:
            torch.cuda.synchronize()

    rounds, iterations = rounds_of(run, SECONDS)
    benchmark.pedantic(run, rounds=rounds, iterations=iterations)
    host = quartiles(benchmark.stats.stats.data)
    if not GPU:
        device = {"peak_bytes": peak_bytes(record_trace(call))}
    cost, machine = cost_of(case), MachineSpec.measured(rates, dtype)
    least_bytes, least_flops = cost.of(case.pass_)
    least_seconds = lower_bound(cost, case.pass_, machine)
    seconds = device["device_quartiles"][1] if GPU else host[1]
    values = {
        "op": case.op,
        "size": case.size.name,
        "values": case.size.values,
        "dtype": dtype,
        "pass": case.pass_,
        "way": case.implementation.name,
        "importance": case.priority,
        "seconds": seconds,
        "host_quartiles": host,
        "floor_seconds": least_seconds,
        "roofline_fraction": least_seconds / seconds,
        "dropout_p": case.size.dropout_p if case.implementation.dropout else 0.0,
        "copy_bytes_per_second": machine.bandwidth,
        "matrix_flops_per_second": machine.matrix,
        "bytes": least_bytes,
        "flops": least_flops,
        **checked,
        **device,
    }
    if case.implementation.without:
        values["without"] = case.implementation.without
    benchmark.extra_info.update(roofline_fraction=values["roofline_fraction"])
    record(f"op/{case}", **values)
