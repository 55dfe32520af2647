"""What a gate says about a text, and which anchors it counts as used (KVCOMM, arXiv 2510.12872)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# anchors that together have this share of the weights are counted as used
NUCLEUS = 0.9


@dataclass(frozen=True)
class Verdict:
    """Whether the offsets of a text may be estimated, and from which anchors, by `contents`.

    `reason` says why not. `exact`: one of them is this very text. `distances` are to each of them,
    `entropy` (bits) is that of their weights, `nucleus` are those that `AnchorPool.count` counts.
    """

    shareable: bool
    reason: str
    exact: bool
    contents: tuple[str, ...]
    distances: tuple[float, ...]
    entropy: float
    nucleus: tuple[str, ...]


def refused(
    reason: str,
    contents: tuple[str, ...] = (),
    distances: tuple[float, ...] = (),
    entropy: float = math.nan,
) -> Verdict:
    """The verdict against a text, with what was known when it was passed."""
    return Verdict(False, reason, False, contents, distances, entropy, ())


def nucleus_of(contents: Sequence[str], weights: Sequence[float]) -> tuple[str, ...]:
    """The fewest anchors, heaviest first, that have `NUCLEUS` of the weights together."""
    chosen: list[str] = []
    total = 0.0
    for weight, content in sorted(zip(weights, contents, strict=True), key=lambda x: (-x[0], x[1])):
        if total >= NUCLEUS:
            break
        chosen.append(content)
        total += weight
    return tuple(chosen)


def published_nucleus_of(contents: Sequence[str], weights: Sequence[float]) -> tuple[str, ...]:
    """As in KVCOMM's code: heaviest first while their sum stays below `NUCLEUS`, so without the one
    that reaches it; all, where the first does.
    """
    chosen = nucleus_of(contents, weights)[:-1]
    return chosen if chosen else tuple(contents)
