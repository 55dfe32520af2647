"""The launches of the flat room."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfx.kernels.flat import triton
from kvfx.testing.offline import Note

BATCH, KV_HEADS, SLOTS = 8, 8, 8 * 32768


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory per row of the batch that is not there."""
    return torch.empty(BATCH, *shape, dtype=dtype, device="meta")


def operands(width: int, repeat: int, dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    """A query [B, H, S, D], positions, and the buffers of a long cache."""
    q, flat = (empty(*shape, width, dtype=dtype) for shape in ((KV_HEADS * repeat, rows), (SLOTS,)))
    counters = [empty(KV_HEADS, dtype=torch.int32) for _ in range(2)]
    return q, empty(rows, dtype=torch.int64), flat, flat, *counters


def attend(width: int, dtype: torch.dtype) -> None:
    """One row."""
    triton.attend(*operands(width, 4, dtype, 1), scale=0.1)


def attend_scored(width: int, dtype: torch.dtype) -> None:
    """One row, and the weights of its entries."""
    q, positions, *buffers = operands(width, 4, dtype, 1)
    score = empty(SLOTS, dtype=torch.float32)
    triton.attend_scored(q, positions, score, *buffers, bias=score, scale=0.1)


def extend(width: int, dtype: torch.dtype, held: Tensor | None = None) -> None:
    """A chunk of a prompt."""
    q, positions, *buffers = operands(width, 4, dtype, 512)
    rows = q[:, :KV_HEADS]
    triton.extend(q, rows, rows, positions, *buffers, position=held, scale=0.1)


def append(width: int, dtype: torch.dtype) -> None:
    """One new entry per head."""
    row = empty(KV_HEADS, 1, width, dtype=dtype)
    keep = empty(KV_HEADS, 1, dtype=torch.bool)
    triton.append(row, row, keep, *operands(width, 4, dtype, 1)[2:])


def store(width: int, dtype: torch.dtype) -> None:
    """A prompt."""
    rows = empty(KV_HEADS, 4096, width, dtype=dtype)
    keep = empty(KV_HEADS, 4096, dtype=torch.bool)
    triton.store(rows, rows, keep, *operands(width, 4, dtype, 1)[2:])


VARIANTS: dict[str, Callable[[], object]] = {
    "attend bf16 D=64": lambda: attend(64, torch.bfloat16),
    "attend bf16 D=80": lambda: attend(80, torch.bfloat16),
    "attend bf16 D=128": lambda: attend(128, torch.bfloat16),
    "attend fp32 D=128": lambda: attend(128, torch.float32),
    "attend_scored bf16 D=128": lambda: attend_scored(128, torch.bfloat16),
    "extend bf16 D=64": lambda: extend(64, torch.bfloat16),
    "extend bf16 D=128": lambda: extend(128, torch.bfloat16),
    "extend bf16 D=128, positions": lambda: extend(
        128, torch.bfloat16, empty(SLOTS, dtype=torch.int32)
    ),
    "append bf16 D=128": lambda: append(128, torch.bfloat16),
    "store bf16 D=128": lambda: store(128, torch.bfloat16),
}


def elements(note: Note) -> int | None:
    """Elements of keys and values per thread and iteration."""
    if note.kernel.__name__ != "attend_kernel":
        return None
    sizes = note.constants
    return sizes["BLOCK_N"] * (sizes["WIDTH"] + sizes["VALUE_WIDTH"]) // (32 * note.warps)
