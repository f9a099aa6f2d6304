"""Kernels compiled ahead of time, without a GPU, and what their machine code uses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sclkern.kernels.config import ARCHITECTURES, SHARED_MEMORY
from sclkern.tools.specs import SPECS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Whose launch configurations a target has that has no table of its own.
TABLE_OF = {"gfx950": "gfx942"}
# What every kernel must compile for; the others on request.
REQUIRED_TARGETS = tuple(name for name in ARCHITECTURES if name.startswith("sm_"))
# These have the tensor-core instructions of the target beside them, and Triton takes as much shared memory. Registers
# differ, except of sm_86 and sm_89, so that a kernel that must not spill is compiled once for those two alone.
STAND_INS = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}
HOT_STAND_INS = {"sm_86": "sm_89"}
# Kernels of a few microseconds, which may spill on architectures other than sm_90, up to bytes of stack of a thread.
COLD_KERNELS = (
    "completion_loss_anchor_kernel", "completion_loss_finish_kernel", "completion_loss_merge_kernel",
    "completion_loss_norm_kernel", "invert_keep_kernel", "linear_cross_entropy_reduce_kernel", "mask_text_kernel",
    "position_gradient_kernel", "select_patches_kernel", "select_tokens_kernel",
)  # fmt: skip
MOST_COLD_STACK = 256
OPTIONAL = (
    "ids_ptr", "bits_ptr", "same_ptr", "bias_ptr", "bias_batch_stride", "bias_head_stride", "bias_row_stride",
    "bias_column_stride",
)  # fmt: skip
MODULES = tuple(dict.fromkeys(module for spec in SPECS.values() for module in spec.kernels))


@dataclass(frozen=True)
class Resources:
    """What the machine code of one kernel uses on an NVIDIA target.

    ``registers`` of a thread; bytes of ``stack`` of a thread, and ``spills``, bytes that instructions move to and from
    it; bytes of ``shared`` memory of a block; counts of tensor-core (``hgmma``, ``hmma``) and ``ffma`` instructions;
    ``loads`` from global memory, counted by their bytes a thread; all ``instructions``; ``blocks`` and ``warps`` that
    fit a multiprocessor of an H100 or H200; instructions of the longest ``loop``, 0 without one.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    ffma: int
    loads: dict[int, int]
    instructions: int
    blocks: int
    warps: int
    loop: int = 0


def kernels(target: str = "sm_90") -> list[dict[str, Any]]:
    """Every kernel in the configurations that its launcher selects on a target: ``ahead_of_time`` of the modules of
    ``sclkern.kernels``.

    An entry has ``kernel``, ``signature`` (types of the pointers and of scalars that are not int32), ``constants``
    (None for an absent pointer; those of ``OPTIONAL`` are absent where they have no type), ``num_warps`` and
    ``num_stages``; ``divisible`` may name integers that are multiples of 16 at the real shapes, such as strides;
    ``features`` may name the float types, where the narrowest does not tell two entries apart.
    """
    arch = TABLE_OF.get(target, target)
    modules = (importlib.import_module(f"sclkern.kernels.{name}") for name in MODULES)
    return [entry for module in modules for entry in module.ahead_of_time(arch)]


def entry_name(entry: dict[str, Any]) -> str:
    """The kernel, the float type of its features, its constants and warps: differs from entry to entry."""
    used = [kind for name, kind in entry["signature"].items() if name in entry["kernel"].arg_names]
    narrowest = next((kind for kind in ("bf16", "fp16", "fp32") if f"*{kind}" in used), "int")
    features = entry.get("features", narrowest)
    constants = "".join(f"{name}={value}," for name, value in entry["constants"].items())
    stages = "" if entry.get("num_stages") is None else f",stages={entry['num_stages']}"
    return f"{entry['kernel'].fn.__name__}[{features},{constants}warps={entry['num_warps']}{stages}]"


def is_hot(entry: dict[str, Any]) -> bool:
    """Whether an entry must not spill anywhere: 16-bit features, and none of ``COLD_KERNELS``."""
    used = [kind for name, kind in entry["signature"].items() if name in entry["kernel"].arg_names]
    return entry["kernel"].fn.__name__ not in COLD_KERNELS and ("*bf16" in used or "*fp16" in used)


def compile_entry(entry: dict[str, Any], target: str) -> Any:
    """Compile one entry for a name of ``TARGETS``; pointers are taken as 16-byte aligned, as torch's are."""
    function, constants = entry["kernel"], dict(entry["constants"])
    typed = {**entry["signature"], **constants}
    constants |= dict.fromkeys(name for name in OPTIONAL if name in function.arg_names and name not in typed)
    signature = {
        name: "constexpr" if name in constants else entry["signature"].get(name, "i32") for name in function.arg_names
    }
    positions = {name: (index,) for index, name in enumerate(function.arg_names)}
    aligned = {positions[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
    aligned |= {positions[n]: [["tt.divisibility", 16]] for n in entry.get("divisible", ())}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={positions[name]: value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": entry["num_warps"], "enable_fp_fusion": True}
    if entry.get("num_stages") is not None:
        options["num_stages"] = entry["num_stages"]
    return triton.compile(source, target=TARGETS[target], options=options)


def shared_memory_problem(shared: int, target: str) -> str | None:
    """What is wrong where a block takes more shared memory than a target has."""
    most = SHARED_MEMORY.get(target)
    if most is None or shared <= most:
        return None
    return f"shared memory: {shared} bytes, expected at most {most} on {target}"


def spill_problem(stack: int, hot: bool, target: str) -> str | None:
    """What is wrong where a thread has a stack of this many bytes, which is where registers are spilled to."""
    most = 0 if hot else MOST_COLD_STACK
    return f"spills: stack {stack} bytes, expected at most {most} on {target}" if stack > most else None


def stack_of(compiled: Any) -> int:
    """Bytes of stack of a thread, on an NVIDIA target; much faster than ``resources``."""
    return _registers_and_stack(_dumped(compiled, "-res-usage"))["STACK"] if "cubin" in compiled.asm else 0


def _dumped(compiled: Any, *options: str) -> str:
    """What the ``cuobjdump`` in Triton's package says of machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    descriptor, name = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(compiled.asm["cubin"])
        return subprocess.run([tool, *options, name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(name)


def _registers_and_stack(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def resources(compiled: Any) -> Resources:
    """Read what the machine code of an NVIDIA target uses."""
    text = _dumped(compiled, "-res-usage", "-sass")
    used = _registers_and_stack(text)
    operations = [operation.split(".") for operation in _INSTRUCTION.findall(text)]
    counts = Counter(parts[0] for parts in operations)
    blocks = resident_blocks(compiled.metadata.num_warps, used["REG"], compiled.metadata.shared)
    return Resources(
        registers=used["REG"],
        stack=used["STACK"],
        spills=sum(_width(parts) for parts in operations if parts[0] in ("LDL", "STL")),
        shared=compiled.metadata.shared,
        hgmma=counts["HGMMA"],
        hmma=counts["HMMA"],
        ffma=counts["FFMA"] + 2 * counts["FFMA2"],
        loads=dict(sorted(Counter(_width(parts) for parts in operations if parts[0] in ("LDG", "LDGSTS")).items())),
        instructions=len(operations),
        blocks=blocks,
        warps=blocks * compiled.metadata.num_warps,
        loop=longest_loop(text),
    )


# Address, predicate and operation of a line of SASS.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)")


# As above, and where a branch goes.
_ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


def longest_loop(text: str) -> int:
    """Instructions from where a branch goes back to up to that branch, the most of any; 0 without a loop."""
    lines = [(int(address, 16), operation, rest) for address, operation, rest in _ADDRESS.findall(text)]
    addresses = [address for address, _, _ in lines]
    back = [
        (target, address)
        for address, operation, rest in lines
        if operation.startswith("BRA") and (target_address := re.search(r"0x([0-9a-f]+)", rest))
        # What ends every kernel is a branch to itself.
        if (target := int(target_address[1], 16)) < address
    ]
    return max((sum(first <= instruction <= last for instruction in addresses) for first, last in back), default=0)


def _width(operation: list[str]) -> int:
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in operation if part in widths), 4)


def resident_blocks(warps: int, registers: int, shared: int) -> int:
    """Blocks of ``warps`` warps that fit a multiprocessor of compute capability 9.0, from NVIDIA's tables.

    64 warps and 32 blocks; 65,536 registers in four parts, given to a warp in units of 256; 228 KiB of shared memory,
    of which each block takes its own in units of 128 bytes and 1 KiB for the system.
    """
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = 16384 // of_a_warp * 4 // warps
    by_shared = 228 * 1024 // (-(-shared // 128) * 128 + 1024)
    return min(64 // warps, 32, by_registers, by_shared)
