"""Compiles a kernel for an H200 and reads from the result what it will ask of the device."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
"""Bytes that one program can have on the target."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Variant:
    """A kernel as it ships: its types and constants.

    Attributes:
        name: What the test is called.
        arguments: The type of each argument that is not a constant: `*bf16`, `i32`, `fp32`. Pointers are taken to be
            aligned to 16 bytes, and integers written `i32:16` to be multiples of 16, as Triton finds out at a launch.
        constants: The value of each `tl.constexpr`.
        uses: Instructions that its PTX must hold, `cp.async` or `wgmma` for example.
        max_registers: Most registers a thread may take, so that as many programs as planned run on a processor.
    """

    name: str
    kernel: JITFunction
    arguments: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    uses: tuple[str, ...] = ()
    max_registers: int = field(default=255)


@dataclass(frozen=True)
class Compiled:
    """What a variant takes: registers a thread, bytes spilled a thread, bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int
    ptx: str


def launches(name: str, call: Callable[[], object], **expected: Any) -> list[Variant]:
    """What a call on tensors of the `meta` device would launch: exactly what ships, tiles and all.

    Args:
        name: What the tests are called, together with the name of the kernel.
        expected: `uses` or `max_registers` of each variant whose kernel's name is the key.
    """
    variants = []

    def record(kernel: JITFunction, *_: object, num_warps: int = 4, num_stages: int = 3, **given: Any) -> None:
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        values = {key: value for key, value in given.items() if key in kernel.arg_names}
        # A launch makes a constant of an argument that is 1, and takes note of those that 16 divides.
        constants |= {key for key, value in values.items() if type(value) is int and value == 1}
        arguments = {key: mangle_type(value) for key, value in values.items() if key not in constants}
        for key in arguments:
            if type(values[key]) is int and values[key] % 16 == 0:
                arguments[key] += ":16"
        each = expected.get(kernel.__name__, {})
        fixed = {key: values[key] for key in constants}
        label = f"{kernel.__name__}-{name}"
        variants.append(Variant(label, kernel, arguments, fixed, num_warps, num_stages, **each))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        call()
    return variants


def compile_variant(variant: Variant) -> Compiled:
    """Compiles for the target. Raises whatever the compiler does; takes a second or two."""
    names = variant.kernel.arg_names
    aligned = [name for name, kind in variant.arguments.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        variant.kernel,
        {name: variant.arguments.get(name, "constexpr").partition(":")[0] for name in names},
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(count["REG"], count["STACK"] + count["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"])
