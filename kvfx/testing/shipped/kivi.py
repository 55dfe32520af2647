"""The launches of the kivi room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kvfx.kernels.kivi import triton, triton_split
from kvfx.kernels.kivi.layout import Planes, schedule
from kvfx.testing.offline import Note

BATCH, KV_HEADS, ENTRIES, RESIDUAL = 8, 8, 32768, 128


@dataclass(frozen=True)
class Shape:
    """What kernels are compiled for."""

    k_bits: int
    v_bits: int
    group_size: int
    width: int
    repeat: int = 4
    dtype: torch.dtype = torch.bfloat16
    rule: str = "window"

    @property
    def knobs(self) -> dict[str, Any]:
        """The keyword arguments of the ops."""
        return {
            "k_bits": self.k_bits, "v_bits": self.v_bits, "group_size": self.group_size,
            "residual": RESIDUAL, "rule": self.rule,
        }  # fmt: skip

    @property
    def buffers(self) -> list[Tensor]:
        """A long cache."""
        due = schedule(self.group_size, RESIDUAL, self.rule)
        tiles, group, width = ENTRIES // self.group_size, self.group_size, self.width
        k_words, v_words = (Planes(bits, width, group) for bits in (self.k_bits, self.v_bits))
        return [
            empty(tiles, k_words.rows, k_words.words, dtype=torch.int16),
            *(empty(tiles, width, dtype=torch.float16) for _ in range(2)),
            empty(tiles, v_words.rows, v_words.words, dtype=torch.int16),
            *(empty(tiles, group, width // group, dtype=torch.float16) for _ in range(2)),
            *(empty(ring, width, dtype=self.dtype) for ring in (due.k_ring, due.v_ring)),
            *(empty(dtype=torch.int32) for _ in range(3)),
        ]

    def query(self, rows: int) -> tuple[Tensor, Tensor]:
        """Query rows and their positions."""
        q = torch.empty(
            BATCH, KV_HEADS * self.repeat, rows, self.width, dtype=self.dtype, device="meta"
        )
        return q, torch.empty(BATCH, rows, dtype=torch.int64, device="meta")

    def attend(self) -> None:
        """One row."""
        triton.attend(*self.query(1), *self.buffers, scale=0.1, **self.knobs)

    def attend_scored(self) -> None:
        """One row, and the weights that entries get."""
        q, positions = self.query(1)
        entries = self.buffers[0].shape[2] * self.knobs["group_size"] + self.buffers[6].shape[2]
        score = empty(entries, dtype=torch.float32)
        triton.attend_scored(q, positions, score, *self.buffers, scale=0.1, **self.knobs)

    def extend(self) -> None:
        """A chunk of a prompt."""
        (q, positions), rows = self.query(512), empty(512, self.width, dtype=self.dtype)
        triton.extend(q, rows, rows, positions, *self.buffers, scale=0.1, **self.knobs)

    def store(self) -> None:
        """A prompt."""
        rows, keep = empty(4096, self.width, dtype=self.dtype), empty(4096, dtype=torch.bool)
        triton.store(rows, rows, keep, *self.buffers, **self.knobs)

    def append(self) -> None:
        """One new entry."""
        rows, keep = empty(1, self.width, dtype=self.dtype), empty(1, dtype=torch.bool)
        triton.append(rows, rows, keep, *self.buffers, **self.knobs)

    def flush(self) -> None:
        """The oldest block."""
        triton.flush(*self.buffers, **self.knobs)

    def load(self) -> None:
        """All entries."""
        triton.load(*self.buffers, **self.knobs)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory per row and KV head that is not there."""
    return torch.empty(BATCH, KV_HEADS, *shape, dtype=dtype, device="meta")


def in_pure_triton(shape: Shape) -> Callable[[], None]:
    """One row, unpacked without inline assembly: what other GPUs than NVIDIA's do."""

    def attend() -> None:
        with mock.patch.object(triton_split, "instructions", return_value=""):
            shape.attend()

    return attend


def elements(note: Note) -> int | None:
    """Elements of keys and values per thread and iteration."""
    if note.kernel.__name__ != "attend_kernel" or note.constants.get("TAILS", 0) == 0:
        return None
    sizes = note.constants
    tokens = sizes["PACK"] * sizes["BLOCKS"] * sizes["GROUP"]
    return tokens * (sizes["WIDTH"] + sizes["VALUE_WIDTH"]) // (32 * note.warps)


FP32 = torch.float32
VARIANTS: dict[str, Callable[[], object]] = {
    "attend 8 bit G=128 D=128": Shape(8, 8, 128, 128).attend,
    "attend 4 bit G=128 D=128": Shape(4, 4, 128, 128).attend,
    "attend 2 bit G=128 D=128": Shape(2, 2, 128, 128).attend,
    "attend 2 bit G=128 D=128, 16 heads": Shape(2, 2, 128, 128, repeat=16).attend,
    "attend 8 bit G=32 D=128": Shape(8, 8, 32, 128).attend,
    "attend 4 bit G=32 D=128": Shape(4, 4, 32, 128).attend,
    "attend 2 bit G=32 D=128": Shape(2, 2, 32, 128).attend,
    "attend 4 bit G=64 D=128": Shape(4, 4, 64, 128).attend,
    "attend 2 bit G=64 D=128": Shape(2, 2, 64, 128).attend,
    "attend K4V2 G=128 D=128": Shape(4, 2, 128, 128).attend,
    "attend K8V4 G=64 D=128": Shape(8, 4, 64, 128).attend,
    "attend K8V4 G=32 D=128": Shape(8, 4, 32, 128).attend,
    "attend K8V4 G=32 D=64": Shape(8, 4, 32, 64).attend,
    "attend 4 bit G=32 D=64": Shape(4, 4, 32, 64).attend,
    "attend 2 bit G=32 D=64": Shape(2, 2, 32, 64).attend,
    "attend 2 bit G=64 D=64": Shape(2, 2, 64, 64).attend,
    "attend 4 bit G=128 D=256": Shape(4, 4, 128, 256).attend,
    "attend 2 bit G=32 D=256": Shape(2, 2, 32, 256).attend,
    "attend 2 bit G=32 D=96": Shape(2, 2, 32, 96).attend,
    "attend 2 bit G=32 D=64 fp32": Shape(2, 2, 32, 64, dtype=FP32).attend,
    "attend 4 bit G=128 D=128 kivi": Shape(4, 4, 128, 128, rule="kivi").attend,
    "attend 2 bit G=32 D=128 kivi": Shape(2, 2, 32, 128, rule="kivi").attend,
    "attend 4 bit G=128 D=128, no asm": in_pure_triton(Shape(4, 4, 128, 128)),
    "attend 2 bit G=128 D=128, no asm": in_pure_triton(Shape(2, 2, 128, 128)),
    "attend_scored 4 bit G=128 D=128": Shape(4, 4, 128, 128).attend_scored,
    "attend_scored 2 bit G=32 D=128": Shape(2, 2, 32, 128).attend_scored,
    "attend_scored 4 bit G=32 D=128": Shape(4, 4, 32, 128).attend_scored,
    "attend_scored 2 bit G=64 D=128": Shape(2, 2, 64, 128).attend_scored,
    "attend_scored 2 bit G=128 D=128": Shape(2, 2, 128, 128).attend_scored,
    "extend 4 bit G=128 D=128": Shape(4, 4, 128, 128).extend,
    "extend 2 bit G=32 D=128": Shape(2, 2, 32, 128).extend,
    "store 4 bit G=128 D=128": Shape(4, 4, 128, 128).store,
    "store 2 bit G=32 D=128": Shape(2, 2, 32, 128).store,
    "append 2 bit G=32 D=128": Shape(2, 2, 32, 128).append,
    "append 2 bit G=32 D=128 kivi": Shape(2, 2, 32, 128, rule="kivi").append,
    "flush 4 bit G=128 D=128": Shape(4, 4, 128, 128).flush,
    "flush 2 bit G=32 D=128 kivi": Shape(2, 2, 32, 128, rule="kivi").flush,
    "load 2 bit G=32 D=128": Shape(2, 2, 32, 128).load,
}
