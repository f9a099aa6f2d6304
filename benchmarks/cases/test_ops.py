"""Every op at the workload's sizes beside its definition, torch.compile, torch's attention by backend, other libraries.

A case is timed only after its output and gradients were compared with float64 in the same process; one that is further
off than rounding explains fails and leaves no record.
"""

from __future__ import annotations

import pytest
import torch

from measuring import GPU, floors, make_call, on_device, quartiles, reason_to_skip, rounds_of, verify
from registry import Case, cases
from sclkern.tools.bench.workload import WORKLOAD, Rates, floor
from tracing import peak_bytes, trace
from ways import UnableError

# Of wall time for each case.
SECONDS = 0.3


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=pytest.mark.importance(case.importance)) for case in cases(GPU)]
)
def test_op(benchmark, record, machine, case):
    reason = reason_to_skip(case)
    if reason:
        pytest.skip(reason)
    try:
        measure(benchmark, record, machine, case)
    except UnableError as error:
        pytest.skip(str(error))
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip(f"{case.way.name}: out of memory for {case.op} {case.size.name}")


def measure(benchmark, record, machine: dict, case: Case) -> None:
    benchmark.group = " ".join((case.op, case.size.name, str(case.dtype).removeprefix("torch."), case.part))
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
        device = {"peak_bytes": peak_bytes(trace(call))}
    dtype = str(case.dtype).removeprefix("torch.")
    rates = Rates(machine["copy_bytes_per_second"], machine["matrix_flops_per_second"].get(dtype, float("inf")))
    least = floor(WORKLOAD[case.op].cost(case.size.values, torch.finfo(case.dtype).bits // 8), case.part, rates)
    seconds = device["device_quartiles"][1] if GPU else host[1]
    values = {
        "op": case.op,
        "size": case.size.name,
        "values": case.size.values,
        "dtype": dtype,
        "pass": case.part,
        "way": case.way.name,
        "importance": case.importance,
        "seconds": seconds,
        "host_quartiles": host,
        "floor_seconds": least,
        "roofline_fraction": least / seconds,
        "dropout_p": case.size.dropout_p if case.way.dropout else 0.0,
        "copy_bytes_per_second": rates.bandwidth,
        "matrix_flops_per_second": rates.matrix,
        **floors(case),
        **checked,
        **device,
    }
    if case.way.without:
        values["without"] = case.way.without
    benchmark.extra_info.update(roofline_fraction=values["roofline_fraction"])
    record(f"op/{case}", **values)
