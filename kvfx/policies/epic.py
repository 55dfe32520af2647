"""EPIC: the first tokens of every piece are computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Reuse, check_at_least


@dataclass(frozen=True)
class EPIC(Reuse):
    """Take every stored piece, and compute the first `k` tokens of each but the first again: there
    attention sinks were, which do not belong in the middle of a prompt.

    Source: Hu et al., "EPIC: Efficient Position-Independent Caching for Serving Large Language
    Models" (ICML 2025), LegoLink-k.

    With k as long as the pieces, the prompt is computed densely.
    """

    k: int = 2
    finds: ClassVar[str] = "pieces"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.15332"

    def __post_init__(self) -> None:
        check_at_least("EPIC", "k", self.k, 0)

    @property
    def leading(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rows of a piece that are computed again."""
        return self.k
