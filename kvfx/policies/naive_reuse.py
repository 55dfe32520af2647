"""NaiveReuse: pieces as they were computed alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Reuse


@dataclass(frozen=True)
class NaiveReuse(Reuse):
    """Take every piece of a prompt that is stored, computed alone, and only turn its keys to where
    it stands. Tokens of one piece have never seen those of another: the baseline of the others.

    Source: Gim et al., "Prompt Cache: Modular Attention Reuse for Low-Latency Inference" (MLSys
    2024). Different: keys move to their positions; there is no schema language.
    """

    finds: ClassVar[str] = "pieces"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.04934"
