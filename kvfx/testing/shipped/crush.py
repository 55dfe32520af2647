"""What the crush room launches, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvfx.kernels.crush.triton import refine


def _refine(kv_heads: int, rows: int, anchor: str, *, searched: bool) -> Callable[[], object]:
    def launch() -> object:
        score = torch.empty(8, kv_heads, rows, device="meta")
        live = torch.empty(8, kv_heads, rows, dtype=torch.bool, device="meta")
        position = torch.empty(8, kv_heads, rows, dtype=torch.int32, device="meta")
        return refine(
            score, live, live, position if searched else None, sinks=4, recent=32, share=0.0,
            ratio=0.25, anchor=anchor, bits="half", pick="linspace", page=1, seed=0,
        )  # fmt: skip

    return launch


VARIANTS: dict[str, Callable[[], object]] = {
    "refine-32k": _refine(8, 32768, "mean", searched=False),
    "refine-32k-random": _refine(8, 32768, "random", searched=False),
    "refine-4k-32-heads": _refine(32, 4096, "mean", searched=False),
    "refine-cache-2k": _refine(8, 2048, "mean", searched=True),
    "refine-cache-2k-random": _refine(8, 2048, "random", searched=True),
}
