"""Every variant that ships compiles for an H200, within what a processor has, into the instructions it is meant for."""

from importlib import import_module
from pathlib import Path

import pytest
from kernels_compile.harness import SHARED_MEMORY, compile_variant

LISTS = [import_module(f"kernels_compile.{path.stem}") for path in sorted(Path(__file__).parent.glob("variants_*.py"))]


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.name) for each in LISTS for v in each.VARIANTS])
def test_fits_the_device(variant):
    compiled = compile_variant(variant)
    print(f"{compiled.registers} registers, {compiled.spilled} bytes spilled, {compiled.shared} bytes shared")
    assert compiled.spilled == 0
    assert compiled.registers <= variant.max_registers
    assert compiled.shared <= SHARED_MEMORY
    assert [word for word in variant.uses if word not in compiled.ptx] == []
