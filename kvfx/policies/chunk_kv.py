"""ChunkKV: whole chunks of tokens stay or go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.geometry import Site
from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget, check_choice


@dataclass(frozen=True)
class ChunkKV(Select):
    """Keep the chunks of `chunk` tokens to which the last `window` rows gave most attention, the
    same ones in all heads, and those rows themselves: at most `budget` tokens, in whole chunks.

    Source: Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient
    Long-Context LLM Inference".

    Exact: attention of the window in fp32, summed over heads, mean over a chunk. Different: tokens
    behind the last whole chunk stay (published: they form a short one), so the budget is never
    exceeded; decoded rows add their attention, and older attention fades, as for `SnapKV`.
    Not here: layers that reuse the choice of the one before.
    """

    budget: Budget = 0.25
    chunk: int = 10
    window: int = 32
    interval: int = 64
    positions: str = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00299"
    score: ClassVar[str] = "score_window"
    select: ClassVar[str] = "select_chunks"
    decay: ClassVar[float] = 1.0 - 1.0 / 32

    def __post_init__(self) -> None:
        check_budget("ChunkKV", self.budget)
        for field in ("chunk", "window", "interval"):
            check_at_least("ChunkKV", field, getattr(self, field), 1)
        check_choice("ChunkKV", "positions", self.positions, ("cache", "absolute"))

    def attributes(self) -> Attributes:
        """The size of a chunk, and the window, which stays."""
        return {"chunk": self.chunk, "recent": self.window}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores, and the rows that look."""
        return {"scale": site.scale, "window": self.window}

    def least(self) -> int:
        """The window and a chunk."""
        return self.window + self.chunk

    def keeps(self, rows: int, allowed: int) -> int:
        """The window, what is left of the last chunk, and whole chunks."""
        if rows <= allowed:
            return rows
        tail = self.window + (rows - self.window) % self.chunk
        return min(allowed, tail + max(0, allowed - tail) // self.chunk * self.chunk)
