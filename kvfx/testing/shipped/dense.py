"""The launches of the dense room."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfx.kernels.dense import triton
from kvfx.testing.offline import Note

BATCH, KV_HEADS, ENTRIES = 8, 8, 32768


def operands(width: int, repeat: int, dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    """A query [B, H, S, D], positions, and the buffers of a long cache."""
    q = torch.empty(BATCH, KV_HEADS * repeat, rows, width, dtype=dtype, device="meta")
    cache = torch.empty(BATCH, KV_HEADS, ENTRIES, width, dtype=dtype, device="meta")
    positions = torch.empty(BATCH, rows, dtype=torch.int64, device="meta")
    length = torch.empty(BATCH, KV_HEADS, dtype=torch.int32, device="meta")
    return q, positions, cache, cache, length


def attend(width: int, repeat: int, dtype: torch.dtype) -> None:
    """One row."""
    triton.attend(*operands(width, repeat, dtype, 1), scale=0.1)


def extend(width: int, repeat: int, dtype: torch.dtype) -> None:
    """A chunk of a prompt."""
    q, positions, k_cache, v_cache, length = operands(width, repeat, dtype, 512)
    rows = q[:, :KV_HEADS]
    triton.extend(q, rows, rows, positions, k_cache, v_cache, length, scale=0.1)


def append(width: int, dtype: torch.dtype) -> None:
    """One new entry."""
    _, _, *cache = operands(width, 4, dtype, 1)
    row = torch.empty(BATCH, KV_HEADS, 1, width, dtype=dtype, device="meta")
    triton.append(
        row, row, torch.empty(BATCH, KV_HEADS, 1, dtype=torch.bool, device="meta"), *cache
    )


def store(width: int, dtype: torch.dtype) -> None:
    """A prompt."""
    _, _, *cache = operands(width, 4, dtype, 1)
    rows = torch.empty(BATCH, KV_HEADS, 4096, width, dtype=dtype, device="meta")
    keep = torch.empty(BATCH, KV_HEADS, 4096, dtype=torch.bool, device="meta")
    triton.store(rows, rows, keep, *cache)


VARIANTS: dict[str, Callable[[], object]] = {
    "attend bf16 D=64": lambda: attend(64, 4, torch.bfloat16),
    "attend bf16 D=128": lambda: attend(128, 4, torch.bfloat16),
    "attend bf16 D=256": lambda: attend(256, 4, torch.bfloat16),
    "attend fp32 D=128": lambda: attend(128, 4, torch.float32),
    "extend bf16 D=64": lambda: extend(64, 4, torch.bfloat16),
    "extend bf16 D=128": lambda: extend(128, 4, torch.bfloat16),
    "extend bf16 D=256": lambda: extend(256, 4, torch.bfloat16),
    "append bf16 D=128": lambda: append(128, torch.bfloat16),
    "store bf16 D=128": lambda: store(128, torch.bfloat16),
}


def elements(note: Note) -> int | None:
    """Elements of keys and values per thread and iteration."""
    if note.kernel.__name__ != "attend_kernel":
        return None
    sizes = note.constants
    return sizes["BLOCK_N"] * (sizes["WIDTH"] + sizes["VALUE_WIDTH"]) // (32 * note.warps)
