"""Compile kernels for GPUs that are not here, and read what came out: registers, spills, loops.

A launcher runs on meta tensors while `launch.run` only takes notes; each note is then compiled as
Triton would for these arguments. Kernels must not be interpreted: `TRITON_INTERPRET` unset or 0.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvfx.kernels.common import launch

# arch -> what is asked of the compiler, and a number of multiprocessors that exists
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108),
    "sm_90": (GPUTarget("cuda", 90, 32), 132),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),
}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Note:
    """One launch that was not made."""

    kernel: Any
    grid: tuple[int, ...]
    operands: tuple[object, ...]
    warps: int
    stages: int
    constants: dict[str, Any]


@dataclass(frozen=True)
class Built:
    """Machine code of one kernel for one arch. `stack` bytes and `spills` (instructions that move
    local memory) are 0 where every value found a register.
    """

    name: str
    arch: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    code: tuple[str, ...]

    @property
    def loops(self) -> list[tuple[str, ...]]:
        """The bodies of innermost loops, in the order of the code (NVIDIA)."""
        labels = {line[:-1]: at for at, line in enumerate(self.code) if line.endswith(":")}
        spans = []
        for at, line in enumerate(self.code):
            jump = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if jump and labels.get(jump[1], at) < at:
                spans.append((labels[jump[1]], at + 1))
        inner = [span for span in spans if not any(_holds(span, other) for other in spans)]
        bodies = [tuple(x for x in self.code[a:b] if not x.endswith(":")) for a, b in inner]
        # the trap behind the last instruction is a loop of one
        return [body for body in bodies if len(body) > 1]

    def count(self, pattern: str) -> int:
        """Instructions that match a regular expression."""
        return count(self.code, pattern)


def _holds(span: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether `other` lies inside `span`, and is not it."""
    return span != other and span[0] <= other[0] and other[1] <= span[1]


def count(code: tuple[str, ...], pattern: str) -> int:
    """Instructions of `code` that match a regular expression."""
    return sum(re.search(pattern, line) is not None for line in code)


def launches(launcher: Callable[[], object], arch: str) -> list[Note]:
    """What `launcher` would launch on a GPU of `arch`; its operands are meta tensors."""
    notes: list[Note] = []

    def note(
        kernel: Any, grid: tuple[int, ...], *operands: object, warps: int, stages: int,
        **constants: Any,
    ) -> None:  # fmt: skip
        notes.append(Note(kernel, grid, operands, warps, stages, constants))

    machine = launch.Machine(arch, TARGETS[arch][1])
    with (
        mock.patch.object(launch, "run", note),
        mock.patch.object(launch, "machine", return_value=machine),
    ):
        launcher()
    return notes


def build(note: Note, arch: str) -> Built:
    """Compile one launch for `arch`."""
    names = note.kernel.arg_names
    values = {**dict(zip(names, note.operands, strict=False)), **note.constants}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif name in note.constants or value is None or value == 1:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            wide = isinstance(value, int) and abs(value) >= 2**31
            signature[name] = "fp32" if isinstance(value, float) else "i64" if wide else "i32"
        divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if signature[name] != "constexpr" and divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(note.kernel, signature, constants, attributes)
    options = {"num_warps": note.warps, "num_stages": note.stages}
    compiled = triton.compile(source, target=TARGETS[arch][0], options=options)
    name = note.kernel.__name__
    read = _amd if "amdgcn" in compiled.asm else _nvidia
    return read(compiled, name, arch, note.warps)


def _nvidia(compiled: Any, name: str, arch: str, warps: int) -> Built:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _output(tools / "nvdisasm", "-c", file.name)
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
    code = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            code.append(f"{label[1]}:")
        elif instruction:
            code.append(instruction[1])
    sizes = {key: int(size) for key, size in re.findall(r"(REG|STACK):(\d+)", usage)}
    spills = count(tuple(code), r"\b(LDL|STL)\b")
    return Built(
        name, arch, warps, sizes["REG"], sizes["STACK"], spills, compiled.metadata.shared,
        tuple(code),
    )  # fmt: skip


def _amd(compiled: Any, name: str, arch: str, warps: int) -> Built:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])

    code = tuple(line.strip() for line in text.splitlines() if line.startswith("\t"))
    return Built(
        name, arch, warps, number("vgpr_count"), number("private_segment_fixed_size"),
        number("vgpr_spill_count"), compiled.metadata.shared, code,
    )  # fmt: skip


def _output(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout
