"""ExactPrefix: what stands at the beginning of a prompt is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Reuse


@dataclass(frozen=True)
class ExactPrefix(Reuse):
    """Take the keys and values of the pieces that a prompt has in common with the beginning of an
    earlier one; compute the others. Nothing is approximate.

    Prefixes are found piece by piece (`kvfx.reuse.Layout`).
    """

    finds: ClassVar[str] = "prefix"
