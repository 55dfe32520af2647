"""KVShare: fragments of earlier requests, with the tokens that matter most computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Reuse, check_at_least, check_fraction


@dataclass(frozen=True)
class KVShare(Reuse):
    """Take every run of `least` or more tokens that an earlier request had too, wherever it stood,
    and compute the part `ratio` of them again: those whose values deviate most at the layer
    `layer`, weighted with the attention that they receive. While decoding, each step computes up to
    `repairs` more, by the attention of the newest token.

    Source: Yang et al., "KVShare: An LLM Service System with Efficient and Effective Multi-Tenant
    KV Cache Reuse" (arXiv 2503.16525 v2), as secondary notes describe it: its text and code were
    not to be had. Fragments are found by hashes of `window` tokens. With `semantic=True`, one
    similar earlier request is aligned with this one instead, in the order of its tokens (in the
    spirit of v1; similarity is that of pairs of tokens, there is no embedder; runs of 8 count).

    Not said by the source, and chosen here: the layer (1, where values first depend on the
    context), products per KV head, attention from fresh keys, the ratio is of the reused tokens,
    keys and values up to the layer stay fresh, repairs ascend within a step and go on with the rows
    behind approximate ones. Its published numbers are not those of this implementation.
    """

    ratio: float = 0.2
    repairs: int = 3
    layer: int = 1
    least: int = 32
    window: int = 16
    semantic: bool = False
    check: ClassVar[str] = "attention"  # pyright: ignore[reportIncompatibleVariableOverride]
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.16525"

    def __post_init__(self) -> None:
        check_fraction("KVShare", "ratio", self.ratio)
        for field, least in (("repairs", 0), ("layer", 0), ("least", 1), ("window", 1)):
            check_at_least("KVShare", field, getattr(self, field), least)

    @property
    def finds(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is looked for."""
        return "similar" if self.semantic else "fragments"
