"""Every kernel compiles for every target without a GPU, and none spills on the H200's architecture."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from sclkern.dispatch import interpreted

if interpreted():
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from sclkern.static import TARGETS, compile_entry, entry_name, kernels, resources

ENTRIES = kernels()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("entry", ENTRIES, ids=entry_name)
def test_compiles(entry, target):
    compiled = compile_entry(entry, target)
    assert len(compiled.asm["hsaco" if target.startswith("gfx") else "cubin"]) > 0


@pytest.mark.parametrize("entry", ENTRIES, ids=entry_name)
def test_nothing_spills_on_sm_90(entry):
    used = resources(compile_entry(entry, "sm_90"))
    assert used.stack == 0 and 0 < used.registers <= 240, used
