"""Kernels compiled ahead of time, without a GPU, and what their machine code uses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MODULES = ("attention", "bias_gelu", "dropout_add_layer_norm", "completion_loss")


@dataclass(frozen=True)
class Resources:
    """Of one kernel on an NVIDIA target: registers a thread, bytes of stack a thread (spills live there), bytes of
    shared memory a block."""

    registers: int
    stack: int
    shared: int


def kernels() -> list[dict[str, Any]]:
    """Every kernel in the configurations that are launched: ``AHEAD_OF_TIME`` of the modules of ``sclkern.kernels``.

    An entry has ``kernel``, ``signature`` (types of the pointers and of scalars that are not int32), ``constants`` and
    ``num_warps``; ``divisible`` may name integers that are multiples of 16 at the real shapes, such as strides.
    """
    return [entry for name in MODULES for entry in importlib.import_module(f"sclkern.kernels.{name}").AHEAD_OF_TIME]


def entry_name(entry: dict[str, Any]) -> str:
    constants = ",".join(f"{name}={value}" for name, value in entry["constants"].items())
    return f"{entry['kernel'].fn.__name__}[{constants}]"


def compile_entry(entry: dict[str, Any], target: str) -> Any:
    """Compile one entry for a name of ``TARGETS``; pointers are taken as 16-byte aligned, as torch's are."""
    function, constants = entry["kernel"], entry["constants"]
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
    return triton.compile(
        source, target=TARGETS[target], options={"num_warps": entry["num_warps"], "enable_fp_fusion": True}
    )


def resources(compiled: Any) -> Resources:
    """Read the resource usage off the machine code of an NVIDIA target, with the ``cuobjdump`` in Triton's package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    descriptor, name = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], max(found["SHARED"], compiled.metadata.shared))
