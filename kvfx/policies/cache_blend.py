"""CacheBlend: the tokens that deviate most are computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Reuse, check_at_least, check_choice, check_fraction


@dataclass(frozen=True)
class CacheBlend(Reuse):
    """Take every stored piece, compute all rows up to the layer `layer`, and the part `ratio` of
    the reused ones to the end: those whose values (`kind="keys"`: keys) deviate most there, by the
    sum of squares over heads.

    Source: Yao et al., "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge
    Fusion" (EuroSys 2025), and its prototype (one check layer, values).

    Different: rows see exactly those before them (the prototype aligns the chosen rows with the
    last keys, so that rows see later ones).
    """

    ratio: float = 0.15
    kind: str = "values"
    layer: int = 1
    finds: ClassVar[str] = "pieces"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16444"

    def __post_init__(self) -> None:
        check_fraction("CacheBlend", "ratio", self.ratio)
        check_choice("CacheBlend", "kind", self.kind, ("values", "keys"))
        check_at_least("CacheBlend", "layer", self.layer, 0)

    @property
    def check(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rule that ranks rows."""
        return self.kind
