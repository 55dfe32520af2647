"""What the compact room launches, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvfx.kernels.compact.triton import compact


def _compact(
    width: int, pairs: int, style: str, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    def launch() -> None:
        k, v = (torch.empty(8, 8, 32768, width, dtype=dtype, device="meta") for _ in range(2))
        keep = torch.empty(8, 8, 32768, dtype=torch.bool, device="meta")
        length = torch.empty(8, 8, dtype=torch.int32, device="meta")
        frequencies = torch.empty(pairs, device="meta") if pairs else None
        compact(keep, frequencies, k, v, length, style=style)

    return launch


VARIANTS: dict[str, Callable[[], object]] = {
    "compact-128": _compact(128, 0, "half"),
    "compact-80": _compact(80, 0, "half"),
    "compact-128-half": _compact(128, 64, "half"),
    "compact-128-half-32": _compact(128, 16, "half"),
    "compact-128-interleaved": _compact(128, 64, "interleaved"),
    "compact-64-half-fp32": _compact(64, 32, "half", torch.float32),
    "compact-64-interleaved-fp32": _compact(64, 32, "interleaved", torch.float32),
}
