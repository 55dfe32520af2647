"""KVCOMM: what a context does to a text is estimated from what it did to others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Reuse, check_at_least, check_choice, check_fraction


@dataclass(frozen=True)
class KVCOMM(Reuse):
    """Fill the slots of an agent's template with texts that were computed alone, and add to them,
    and to the fixed piece behind each, the offsets that earlier texts got in this slot: a weighted
    mean over *anchors*. Where no anchor is near (the entropy of their weights is above `gamma` of
    the largest), the whole prompt is computed, and becomes an anchor.

    Source: Ye et al., "KVCOMM: Online Cross-context KV-cache Communication for Efficient LLM-based
    Multi-agent Systems" (NeurIPS 2025, arXiv 2510.12872), and its code.

    A slot has at most `max_anchors`; of the `window` oldest the one goes that was used least. Mode
    `"canonical"` keeps offsets free of positions, measures distances relative to the text's own
    size (`temperature`, at most `furthest`), weighs the `most` nearest anchors, and takes a text
    that is an anchor as it was; `lengths="strict"` asks for anchors of as many tokens, `"paper"`
    for no fewer. Mode `"official"` has the published distances, temperature and weights, on
    canonical keys (docs/reuse.md lists what differs).
    Different: texts of all slots are computed alone (published: answers as they were decoded).
    """

    gamma: float = 0.3
    max_anchors: int = 20
    window: int = 5
    mode: str = "canonical"
    temperature: float = 0.05
    furthest: float = 0.5
    most: int = 4
    lengths: str = "strict"
    finds: ClassVar[str] = "anchors"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.12872"

    def __post_init__(self) -> None:
        check_fraction("KVCOMM", "gamma", self.gamma)
        check_choice("KVCOMM", "mode", self.mode, ("canonical", "official"))
        check_choice("KVCOMM", "lengths", self.lengths, ("strict", "paper"))
        for field in ("max_anchors", "window", "most"):
            check_at_least("KVCOMM", field, getattr(self, field), 1)
