"""What the merge room launches, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfx.kernels.merge.triton import ahead, gaussian, sets, weighted

ROWS = 32768


def _rows(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, v = (torch.empty(8, 8, ROWS, width, dtype=dtype, device="meta") for _ in range(2))
    return k, v


def _per_row(dtype: torch.dtype) -> Tensor:
    return torch.empty(8, 8, ROWS, dtype=dtype, device="meta")


def _sets(width: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    def launch() -> object:
        count = torch.empty(8, 8, dtype=torch.int64, device="meta")
        return sets(
            _rows(width, dtype)[0], _per_row(torch.float32), _per_row(torch.bool), count,
            threshold=None, sinks=4, recent=0.17, heavy=0.12, linkage="chain",
        )  # fmt: skip

    return launch


def _gaussian(
    width: int, scaled: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    def launch() -> object:
        return gaussian(
            *_rows(width, dtype), _per_row(torch.int64), _per_row(torch.float32),
            sigma="dist", width=5.0, scaled=scaled,
        )  # fmt: skip

    return launch


def _weighted(width: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    def launch() -> object:
        return weighted(*_rows(width, dtype), _per_row(torch.int64), _per_row(torch.float32))

    return launch


def _ahead(width: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    def launch() -> object:
        return ahead(
            *_rows(width, dtype), _per_row(torch.bool), _per_row(torch.bool),
            _per_row(torch.float32), _per_row(torch.int64), targets=32, seed=0,
        )  # fmt: skip

    return launch


VARIANTS: dict[str, Callable[[], object]] = {
    "merge_sets-128": _sets(128),
    "merge_sets-64-fp32": _sets(64, torch.float32),
    "merge_gaussian-128": _gaussian(128),
    "merge_gaussian-80": _gaussian(80),
    "merge_gaussian-256": _gaussian(256),
    "merge_gaussian-128-scaled": _gaussian(128, scaled=True),
    "merge_gaussian-64-fp32": _gaussian(64, dtype=torch.float32),
    "merge_weighted-128": _weighted(128),
    "merge_ahead-128": _ahead(128),
    "merge_ahead-64": _ahead(64),
    "merge_ahead-256": _ahead(256),
    "merge_ahead-128-fp32": _ahead(128, torch.float32),
}
