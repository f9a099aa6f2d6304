"""The sanitizer finds each planted fault, raises no false alarm, and computes bfloat16 exactly."""

from fractions import Fraction

import pytest
import torch

from op_testing import run_in_interpreter
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted

if TRITON_INSTALLED and interpreted():
    import sanitizer_probes as probes
    from sanitizer.memory import SanitizerError, poison

sanitized = pytest.mark.skipif(not (TRITON_INSTALLED and interpreted()), reason="not in Triton's interpreter")


@pytest.fixture(autouse=True)
def installed(request):
    if interpreted() and not request.config.getoption("--sanitize"):
        pytest.skip("needs --sanitize")


def numbers(count, dtype=torch.float32):
    return torch.arange(count, dtype=dtype)


def padded(rows, columns, width):
    """(rows, columns), a part of a buffer of ``width`` columns."""
    return torch.zeros(rows, width)[:, :columns]


FAULTS = {
    "a load past the end": (
        lambda: probes.copy[2,](numbers(14), numbers(32), first=0, count=16, BLOCK=8),
        r"copy, program \(1, 0, 0\), .*sanitizer_probes.py:\d+: load of x_ptr at element 14 \(2 of 8 lanes\), behind "
        r"the end of its storage, which has elements 0 to 13; x_ptr is float32 of shape \(14,\), strides \(1,\)",
    ),
    "a load before the start": (
        lambda: probes.copy[1,](numbers(8), numbers(8), first=-1, count=8, BLOCK=8),
        r"load of x_ptr at element -1 \(1 of 8 lanes\), before the start of its storage",
    ),
    "a load before the start of a view's storage": (
        lambda: probes.copy[1,](numbers(8)[2:], numbers(8), first=-3, count=8, BLOCK=8),
        r"load of x_ptr at element -3 \(1 of 8 lanes\), before the start of its storage, which has elements -2 to 5",
    ),
    "a load of nothing": (
        lambda: probes.copy[1,](numbers(0), numbers(8), first=0, count=8, BLOCK=8),
        r"load of x_ptr at element 0 \(8 of 8 lanes\), behind the end",
    ),
    "a load from another argument": (
        lambda: reach_into_another_argument(),
        r"load of x_ptr at element -?\d+ \(8 of 8 lanes\), (behind the end|before the start)",
    ),
    "a store past the end, in a device function's caller": (
        lambda: probes.shift_store[1,](numbers(8), numbers(10), first=4, BLOCK=8),
        r"shift_store, program \(0, 0, 0\), .*: store of out_ptr at element 10 \(2 of 8 lanes\)",
    ),
    "a store into the padding": (
        lambda: probes.copy[1,](numbers(8), padded(4, 5, 8), first=0, count=8, BLOCK=8),
        r"store of out_ptr at element 5 \(3 of 8 lanes\), which is in its storage but not in the tensor",
    ),
    "a store behind a part": (
        lambda: probes.copy[1,](numbers(8), numbers(9)[1:6], first=0, count=8, BLOCK=8),
        r"store of out_ptr at element 5 \(3 of 8 lanes\), which is in its storage but not in the tensor",
    ),
    "an address between two elements": (
        lambda: probes.read_as_floats[1,](numbers(17, torch.uint8)[1:], numbers(4), BLOCK=4),
        r"load of x_ptr at element 0 \(4 of 4 lanes\), at an address that is not a multiple of 4 bytes",
    ),
    "a read of what another program wrote": (
        lambda: probes.read_what_another_wrote[3,](numbers(24, torch.int32), BLOCK=8),
        r"program \(1, 0, 0\), .*: load of out_ptr at element 0 \(8 of 8 lanes\), written by program \(0, 0, 0\) in",
    ),
    "a write to what another program read": (
        lambda: probes.write_what_another_read[3,](numbers(32), BLOCK=8),
        r"program \(1, 0, 0\), .*: store of x_ptr at element 8 \(8 of 8 lanes\), read by program \(0, 0, 0\) in",
    ),
    "a write to what all programs read": (
        lambda: probes.write_what_all_read[3,](numbers(8), numbers(24), BLOCK=8),
        r"program \(2, 0, 0\), .*: store of x_ptr at element 0 \(8 of 8 lanes\), read by several programs in",
    ),
    "two programs that write one address": (
        lambda: probes.write_one_place[1, 2, 3](numbers(1)),
        r"program \(0, 0, 1\), .*: store of out_ptr at element 0, written by program \(0, 0, 0\) in the same launch",
    ),
    "one store of two values to one address": (
        lambda: probes.write_in_pairs[1,](numbers(8), numbers(4), BLOCK=8),
        r"store of out_ptr at element 0 \(4 of 8 lanes\), to which another lane stores another value",
    ),
    "a floating atomic": (
        lambda: probes.count[3,](numbers(3), numbers(1), READ=False),
        r"atomic of out_ptr at element 0, whose result depends on the order of the programs",
    ),
    "a read of what an atomic wrote": (
        lambda: probes.count[3,](numbers(3, torch.int32), numbers(1, torch.int32), READ=True),
        r"load of out_ptr at element 0, written by an atomic in the same launch",
    ),
} | {
    f"a read of fresh {dtype}": (
        lambda dtype=dtype: probes.copy[1,](fresh(dtype), torch.ones(8, dtype=dtype), first=0, count=8, BLOCK=8),
        r"load of x_ptr at element 3 \(5 of 8 lanes\), which nobody has written",
    )
    for dtype in (torch.int64, torch.int32, torch.int16, torch.bool)
}


def reach_into_another_argument():
    x, out = numbers(8), numbers(8)
    probes.copy[1,](x, out, first=(out.data_ptr() - x.data_ptr()) // 4, count=8, BLOCK=8)


def fresh(dtype):
    """Eight elements, of which the first three were written."""
    x = poison(torch.empty(8, dtype=dtype))
    x[:3] = 1
    return x


@sanitized
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    run, message = FAULTS[name]
    with pytest.raises(SanitizerError, match=message):
        run()


NO_FAULTS = {
    "lanes outside that are masked": lambda: probes.copy[4,](numbers(14), numbers(14), first=0, count=14, BLOCK=8),
    "no lane at all": lambda: probes.copy[1,](numbers(0), numbers(0), first=2**40, count=0, BLOCK=8),
    "a row read with its padding": lambda: probes.copy[1,](padded(2, 5, 8), numbers(8), first=0, count=8, BLOCK=8),
    "what lies before a view": lambda: probes.copy[1,](numbers(9)[4:], numbers(5), first=-4, count=5, BLOCK=8),
    "views with offsets": lambda: probes.copy[1,](numbers(16)[8:], numbers(20)[3:11], first=0, count=8, BLOCK=8),
    "a view with gaps": lambda: probes.write_one_place[1,](numbers(8).view(2, 2, 2).mT[1]),
    "one buffer as two arguments": lambda: in_place(),
    "halves of one buffer": lambda: halves_of_one_buffer(),
    "a program that writes twice": lambda: probes.write_twice[3,](numbers(24), numbers(24), BLOCK=8),
    "one value from two lanes": lambda: probes.write_in_pairs[1,](torch.ones(8), numbers(4), BLOCK=8),
    "one NaN from two lanes": lambda: probes.write_in_pairs[1,](torch.ones(8) * torch.nan, numbers(4), BLOCK=8),
    "a program that writes what it read": lambda: probes.write_what_all_read[1,](numbers(8), numbers(8), BLOCK=8),
    "integer atomics": lambda: probes.count[3,](numbers(3, torch.int32), numbers(1, torch.int32), READ=False),
    "a floating maximum": lambda: probes.largest[3,](numbers(3), numbers(1)),
    "elements of another size": lambda: probes.read_halves[3,](numbers(24), numbers(24), BLOCK=8),
    "bytes as floats": lambda: probes.read_as_floats[1,](numbers(16, torch.uint8), numbers(4), BLOCK=4),
    "any byte": lambda: probes.copy[1,](torch.full((8,), 0xA5).byte(), numbers(8).byte(), first=0, count=8, BLOCK=8),
}


def in_place():
    x = numbers(8)
    probes.shift_store[1,](x, x, first=0, BLOCK=8)
    assert torch.equal(x, 2 * numbers(8))


def halves_of_one_buffer():
    x = numbers(16)
    probes.copy[2,](x[:8], x[8:], first=0, count=8, BLOCK=4)
    assert torch.equal(x[8:], numbers(8))


@sanitized
@pytest.mark.parametrize("name", NO_FAULTS)
def test_no_false_alarm(name):
    NO_FAULTS[name]()


@sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fresh_floating_memory_is_seen_in_results(dtype):
    out = torch.zeros(8, dtype=dtype)
    probes.copy[1,](fresh(dtype), out, first=0, count=8, BLOCK=8)
    assert torch.equal(out.isnan(), torch.arange(8) >= 3)


@sanitized
def test_many_reads_are_noted_before_a_write(monkeypatch):
    """The notes of reads are kept short."""
    monkeypatch.setattr("sanitizer.memory.PENDING_LANES", 10)
    with pytest.raises(SanitizerError, match="read by several programs"):
        probes.write_what_all_read[3,](numbers(8), numbers(24), BLOCK=8)


@sanitized
def test_a_mistake_of_another_kind_stays_what_it_is():
    from triton.runtime.errors import InterpreterError

    with pytest.raises(InterpreterError, match="AttributeError"):
        probes.copy[1,](numbers(8), numbers(8), first=0, count=8, BLOCK="8")


# Every number, and one NaN.
BFLOAT16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
BFLOAT16 = BFLOAT16.masked_fill(BFLOAT16.isnan(), torch.nan)


def bits(tensor):
    """Of bfloat16, with one NaN."""
    return tensor.masked_fill(tensor.isnan(), torch.nan).view(torch.int16)


def converted(x, dtype, rounding=None):
    out = torch.zeros(x.shape, dtype=dtype)
    probes.convert[x.numel() // 256,](x, out, ROUNDING=rounding, BLOCK=256)
    return out


@sanitized
def test_bfloat16_is_cast_exactly():
    assert torch.equal(converted(BFLOAT16, torch.float32).nan_to_num(7), BFLOAT16.float().nan_to_num(7))
    assert torch.equal(bits(converted(BFLOAT16.float(), torch.bfloat16)), bits(BFLOAT16))
    # Around every number of bfloat16: a little more, half way, and on either side of half way.
    for offset in (1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (BFLOAT16.float().view(torch.int32) + offset).view(torch.float32)
        x = x.masked_fill(x.isnan(), torch.nan)
        assert torch.equal(bits(converted(x, torch.bfloat16)), bits(x.to(torch.bfloat16))), offset
        cut_off = bits(
            (x.view(torch.int32) & -(2**16)).view(torch.float32).masked_fill(x.isnan(), torch.nan).bfloat16()
        )
        assert torch.equal(bits(converted(x, torch.bfloat16, "rtz")), cut_off), offset
    integers = torch.randint(-(2**30), 2**30, (1024,), dtype=torch.int32) >> torch.randint(30, (1024,))
    integers = integers.to(torch.int32)
    assert torch.equal(converted(integers, torch.bfloat16), integers.to(torch.bfloat16))
    halves = torch.randn(1024).half()
    assert torch.equal(converted(halves, torch.bfloat16), halves.to(torch.bfloat16))
    assert torch.equal(converted(halves.bfloat16(), torch.float16), halves.bfloat16().half())
    assert torch.equal(converted(50 * halves.bfloat16(), torch.int32), (50 * halves.bfloat16()).int())


CONSTANTS = torch.tensor([0.3, 1.5, 0.7]).bfloat16()
OPERATIONS = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "less": torch.lt,
    "constant": lambda x, y: (x * CONSTANTS[0] + CONSTANTS[1]) + CONSTANTS[2],
}


@sanitized
@pytest.mark.parametrize("name", [*OPERATIONS, "select"])
def test_bfloat16_arithmetic_is_exact(name):
    x = BFLOAT16[torch.randperm(2**16)[:2048]].nan_to_num(1.0)
    y = torch.where(torch.arange(2048) % 2 == 0, x * torch.randn(2048).bfloat16(), x)
    z = torch.randn(2048).bfloat16()
    expected = torch.where(x == y, z, y) if name == "select" else OPERATIONS[name](x, y)
    out = torch.zeros_like(expected)
    probes.arithmetic[8,](x, y, z, out, NAME=name, BLOCK=256)
    assert torch.equal(out, expected) if expected.dtype == torch.bool else torch.equal(bits(out), bits(expected))


@sanitized
def test_a_multiply_add_of_bfloat16_is_rounded_once():
    x, y, z = torch.randn(3, 2048).bfloat16()
    # A product half way between two numbers, and what tips it.
    x[:4], y[:4] = 1 + 2**-7, 1 + 2**-1
    z[:4] = torch.tensor([2.0**-100, -(2.0**-100), 0.0, 2.0**-40]).bfloat16()
    x[4:8], y[4:8], z[4:8] = 1 + 2**-7, 1 + 2**-7, z[:4]
    out = torch.zeros_like(x)
    probes.arithmetic[8,](x, y, z, out, NAME="fma", BLOCK=256)
    for a, b, c, found in zip(*(t.double().tolist() for t in (x, y, z, out)), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        near = torch.tensor(float(exact)).bfloat16()
        near = [near, *(torch.nextafter(near, torch.tensor(end).bfloat16()) for end in (-torch.inf, torch.inf))]
        least = min(abs(Fraction(n.item()) - exact) for n in near)
        closest = [n for n in near if abs(Fraction(n.item()) - exact) == least]
        expected = closest[0] if len(closest) == 1 else next(n for n in closest if n.view(torch.int16) % 2 == 0)
        assert found == expected, (a, b, c)


@sanitized
def test_products_of_bfloat16_are_exact():
    x, y = (torch.randint(-200, 200, (16, 16)).bfloat16() for _ in range(2))
    out = torch.zeros(16, 16)
    probes.product[1,](x, y, out, SIZE=16)
    assert torch.equal(out, x.float() @ y.float())


@sanitized
def test_sums_of_bfloat16_are_rounded_at_each_step():
    x = torch.randn(4, 8).bfloat16()
    out = torch.zeros(16).bfloat16()
    probes.sums[1,](x, out, ROWS=4, COLUMNS=8)
    expected = x
    while expected.shape[1] > 1:
        half = expected.shape[1] // 2
        expected = expected[:, :half] + expected[:, half:]
    assert torch.equal(out[:4], expected[:, 0]) and torch.equal(out[4:8], x.amax(1))
    torch.testing.assert_close(out[8:].float(), x[0].float().cumsum(0), rtol=0.02, atol=0.02)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
