"""Dense bf16 attention of torch over as many tokens, which a kernel has to beat."""

from __future__ import annotations

import functools
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.bench.cases import DTYPE, Case
from kvfx.bench.checks import raised
from kvfx.bench.roofline import Launch, l2_bytes, replayed_us, sets_beyond

Operands = tuple[Tensor, Tensor, Tensor]


class Baselines:
    """Times of `"sdpa"` and `"flex"` (FlexAttention, which splits long caches for few rows) on a
    GPU, each measured once per shape; `missing` says what could not run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.missing: list[str] = []
        self.times: dict[tuple[str, tuple[int, ...]], float | None] = {}

    def ratio(self, name: str, case: Case, us: float) -> float | None:
        """`us` as a multiple of the baseline's time; None where there is none for the op."""
        if case.verb not in ("attend", "extend"):
            return None
        shape, rows = case.shape, case.rows[0].shape[2]
        sizes = (shape.batch, shape.heads, shape.kv_heads, shape.head_dim, shape.length, rows)
        if (name, sizes) not in self.times:
            self.times[name, sizes] = self._measure(name, sizes)
        time = self.times[name, sizes]
        return None if time is None else us / time

    def _measure(self, name: str, sizes: tuple[int, ...]) -> float | None:
        batch, heads, kv_heads, width, tokens, rows = sizes
        make = functools.partial(torch.randn, dtype=DTYPE, device=self.device)
        moved = 2 * batch * kv_heads * tokens * width * DTYPE.itemsize
        sets = [
            (
                make(batch, heads, rows, width),
                make(batch, kv_heads, tokens, width),
                make(batch, kv_heads, tokens, width),
            )
            for _ in range(sets_beyond(l2_bytes(self.device), moved))
        ]
        try:
            attend = _sdpa if name == "sdpa" else _flex()
            return statistics.median(replayed_us([_launch(attend, each) for each in sets]))
        except Exception as error:
            # code of others may fail in any way: the remark says how
            self.missing.append(f"{name} at {sizes} {raised(error)}")
            return None


def _launch(attend, operands: Operands) -> Launch:
    return lambda: attend(*operands)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _flex():
    """FlexAttention, compiled for the shape that it is called with."""
    from torch.nn.attention.flex_attention import flex_attention

    # torch.compile gives up on a function after some shapes: forget those before
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
