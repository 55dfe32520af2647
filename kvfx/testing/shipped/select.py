"""What the select room launches, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvfx.kernels.select.triton import select_top


def _select(rows: int, dtype: torch.dtype) -> Callable[[], object]:
    def launch() -> object:
        score = torch.empty(8, 8, rows, dtype=dtype, device="meta")
        live = torch.empty(8, 8, rows, dtype=torch.bool, device="meta")
        count = torch.empty(8, 8, dtype=torch.int64, device="meta")
        return select_top(score, live, count, 4, 32)

    return launch


VARIANTS: dict[str, Callable[[], object]] = {
    "select_top-32k": _select(32768, torch.float32),
    "select_top-128k": _select(131072, torch.float32),
    "select_top-32k-bf16": _select(32768, torch.bfloat16),
}
