"""Whether a kernel computes its addresses in 64 bits, read from Triton's intermediate code.

A tensor of more than 2^31 elements is where an offset in 32 bits wraps, and no test of that size runs without a GPU.
What can wrap is a product: of a position (a program's row, a column of a loop, a loaded index) with a stride or width.
Every 32-bit integer of the code is therefore given one of four kinds:

- a bound: constants, ranges and what is made of them;
- a size: an argument, such as a length or a stride, and its product with a bound, such as heads * head dim;
- a number: a program id, its quotients and remainders, and what is counted on from there; it becomes a position by the
  size of a block, a power of two of at most ``LARGEST_BLOCK``;
- a position: any other integer, which the programmer has bounded by an argument in 32 bits.

Any other product in 32 bits can wrap, and must not reach an address.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LARGEST_BLOCK = 1024
SIZE, NUMBER, POSITION = "size", "number", "position"

_LOCATION = re.compile(r"\s+loc\([^()]*(?:\([^()]*\)[^()]*)*\)\s*$")
_ARGUMENT = re.compile(r"(%[\w$.-]+): i(?:8|16|32)\b")
_ASSIGNMENT = re.compile(r"^\s*(%[\w$.-]+)(?::\d+)?\s*=\s*\"?([\w.]+)\"?\s*(.*)$")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_CARRIED = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)")


@dataclass(frozen=True)
class Wraps:
    """A value that holds a product that can wrap, identified by its line."""

    line: str


Kind = int | str | Wraps


def wrapping_addresses(ttir: str) -> list[str]:
    """The products in 32 bits of the code (stage "ttir") that can wrap and reach the offset of an address."""
    kinds: dict[str, Kind] = {}
    wrapping: dict[str, None] = {}
    for line in ttir.splitlines():
        line = _LOCATION.sub("", line)
        if "tt.func" in line:
            kinds |= dict.fromkeys(_ARGUMENT.findall(line), SIZE)
            continue
        match = _ASSIGNMENT.match(line)
        operation, rest = match.groups()[1:] if match else ("scf.for" if "scf.for" in line else "", line)
        if operation == "scf.for":
            # Loop variables by their kinds at the start: pointers and sums carry what their own offsets bring.
            induction = _searched(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?) to", line)
            kinds[induction] = POSITION
            carried = [pair for pair in _CARRIED.findall(line) if pair[0] not in (induction, match and match[1])]
            kinds |= {name: _join([kinds.get(start, POSITION), POSITION]) for name, start in carried}
            continue
        if not match:
            continue
        values = [kinds.get(value.split("#")[0], POSITION) for value in _VALUE.findall(rest)]
        if operation == "tt.addptr":
            if isinstance(values[-1], Wraps):
                wrapping[values[-1].line] = None
            values = values[:1]  # a pointer is clean again: what is wrong with it is in the list already
        kinds[match[1]] = _kind(operation, rest, values, Wraps(line.strip()))
    return list(wrapping)


def _kind(operation: str, rest: str, values: list[Kind], wraps: Wraps) -> Kind:
    if operation == "arith.constant":
        number = re.match(r"(?:dense<)?(-?\d+)>? :", rest)
        return abs(int(number[1])) if number else POSITION
    if operation == "tt.make_range":
        return int(_searched(r"end = (\d+)", rest))
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        return NUMBER
    if operation in ("tt.load", "tt.addptr"):
        return POSITION
    if operation in ("arith.cmpi", "arith.cmpf"):
        return 1  # random words are meant to wrap, and only what they are compared with leads to an address
    if operation in ("arith.muli", "arith.shli"):
        return _product(values[0], values[1], operation == "arith.shli", wraps) if _narrow(rest) else _join(values)
    if operation in ("arith.divsi", "arith.divui", "arith.remsi", "arith.remui"):
        return next((value for value in values if isinstance(value, Wraps)), values[0])
    if operation in ("arith.addi", "arith.subi"):
        bounds = [value for value in values if isinstance(value, int)]
        if len(bounds) == len(values):
            return sum(bounds)
        if "tensor" not in rest and NUMBER in values and all(v in (NUMBER, SIZE) or isinstance(v, int) for v in values):
            return NUMBER
    return _join(values)


def _product(first: Kind, second: Kind, shift: bool, wraps: Wraps) -> Kind:
    if shift and isinstance(second, int):
        second = 2**second
    if isinstance(first, Wraps) or isinstance(second, Wraps):
        return _join([first, second])
    if isinstance(first, int) and isinstance(second, int):
        return first * second if first * second < 2**31 else wraps
    if isinstance(first, int):
        first, second = second, first
    if second in (0, 1):
        return first
    if not isinstance(second, int) or first == POSITION:
        return wraps
    if first == SIZE:
        return SIZE
    return POSITION if second <= LARGEST_BLOCK and second & (second - 1) == 0 else wraps


def _narrow(rest: str) -> bool:
    """Whether the type at the end of the line, plain or of the elements of a tensor, has at most 32 bits."""
    return _searched(r"(?:^|[ x<])i(\d+)[>\s]*$", rest) != "64"


def _searched(pattern: str, text: str) -> str:
    """The first group of a pattern that the text has."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"intermediate code: got {text!r}, expected {pattern}")
    return match[1]


def _join(values: list[Kind]) -> Kind:
    if wraps := [value for value in values if isinstance(value, Wraps)]:
        return wraps[0]
    bounds = [value for value in values if isinstance(value, int)]
    if bounds and len(bounds) == len(values):
        return max(bounds)
    named = {value for value in values if not isinstance(value, int)}
    return named.pop() if len(named) == 1 else POSITION
