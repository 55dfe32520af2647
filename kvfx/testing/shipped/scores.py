"""What the scores room launches, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfx.kernels.scores.triton import columns, window


def _prompt(heads: int, kv_heads: int, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and live rows of 8 prompts, laid out as a projection writes them."""
    q = torch.empty(8, rows, heads, width, dtype=dtype, device="meta").transpose(1, 2)
    k = torch.empty(8, rows, kv_heads, width, dtype=dtype, device="meta").transpose(1, 2)
    return [q, k, torch.empty(8, kv_heads, rows, dtype=torch.bool, device="meta")]


def _columns(heads: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    return lambda: columns(*_prompt(heads, 8, 32768, width, dtype), scale=width**-0.5)


def _window(heads: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    return lambda: window(*_prompt(heads, 8, 32768, width, dtype), scale=width**-0.5, window=32)


VARIANTS: dict[str, Callable[[], object]] = {
    "columns-64": _columns(32, 64, torch.bfloat16),
    "columns-80": _columns(32, 80, torch.float16),
    "columns-128": _columns(32, 128, torch.bfloat16),
    "columns-128-heads-8": _columns(8, 128, torch.bfloat16),
    "columns-256": _columns(32, 256, torch.bfloat16),
    "columns-512": _columns(32, 512, torch.bfloat16),
    "columns-128-fp32": _columns(32, 128, torch.float32),
    "columns-256-fp32": _columns(32, 256, torch.float32),
    "window-64": _window(32, 64, torch.bfloat16),
    "window-128": _window(32, 128, torch.bfloat16),
}
