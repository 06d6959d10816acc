"""Kernels compiled without a GPU, for architectures that this machine need not have, and what they take of one."""

from __future__ import annotations

import pkgutil
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from worker.kernels import triton as package

TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
"""A100, H100 and H200, B200."""

ALIGNED = ":16"
"""At the end of a type: divisible by 16, which Triton finds out when it launches, and needs for wide loads."""


@dataclass(frozen=True)
class Specimen:
    """A variant of a kernel that real models use, as a launch would have it compiled.

    name         of the variant, among those of its kernel
    signature    types of all arguments that are no constants, in their order: "i32", "fp32", "*bf16"; ending in ":16"
                 if divisible by 16, as pointers always are
    constexprs   values of all others
    is_decode    part of the step in which each row has one token, where nothing may be spilled
    targets      architectures that it is for
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    is_decode: bool = False
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def kernel_name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True, order=True)
class Usage:
    """What a compiled kernel takes: registers of a thread, bytes of shared memory of a block, and bytes of a thread's
    local memory, where registers are spilled to."""

    kernel: str
    variant: str
    target: str
    registers: int
    shared_bytes: int
    spill_bytes: int


def modules() -> list[ModuleType]:
    """All that have specimens of kernels."""
    names = [f"{package.__name__}.{each.name}" for each in pkgutil.iter_modules(package.__path__)]
    found = [import_module(name) for name in (*names, "worker.attention.triton")]
    return [each for each in found if hasattr(each, "specimens")]


def all_specimens() -> list[Specimen]:
    return [specimen for module in modules() for specimen in module.specimens()]


def compile(specimen: Specimen, target: str) -> Usage:
    """Raises whatever Triton or its assembler raises if the kernel cannot be compiled for `target`."""
    compiled = _compiled(specimen, target)
    registers, local_bytes = _resources(compiled.asm["cubin"])
    return Usage(specimen.kernel_name, specimen.name, target, registers, compiled.metadata.shared, local_bytes)


def instructions(specimen: Specimen, target: str) -> str:
    """PTX."""
    return str(_compiled(specimen, target).asm["ptx"])


def _compiled(specimen: Specimen, target: str) -> Any:
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    return triton.compile(_source(specimen), target=TARGETS[target], options=options)


def _source(specimen: Specimen) -> ASTSource:
    names = specimen.kernel.arg_names
    if set(names) != {*specimen.signature, *specimen.constexprs}:
        raise ValueError(f"{specimen.kernel_name} takes {', '.join(names)}; {specimen.name} says otherwise")
    types = {name: specimen.signature.get(name, "constexpr") for name in names}
    is_aligned = [each.startswith("*") or each.endswith(ALIGNED) for each in types.values()]
    attributes = {(place,): [["tt.divisibility", 16]] for place, is_one in enumerate(is_aligned) if is_one}
    signature = {name: each.removesuffix(ALIGNED) for name, each in types.items()}
    return ASTSource(specimen.kernel, signature, dict(specimen.constexprs), attributes)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of the one kernel in `cubin`."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    registers, stack, local = (re.findall(rf"\b{name}:(\d+)", said) for name in ("REG", "STACK", "LOCAL"))
    return int(registers[-1]), int(stack[-1]) + int(local[-1])
