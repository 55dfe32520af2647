"""Anchors of a placeholder: texts that stood there before, with what each context made of them, and
the rule that tells when a new text may be estimated from them.

Source: KVCOMM (arXiv 2510.12872) and its code at 48ca0b3 (specs/reuse.md 1.3 and 1.8). What the
two modes make of the 17 defects that are listed there in 1.7:

    defect                            "canonical"                 "official"
    P1 P2 P7 P8 rotated frames        nothing is rotated here: callers give canonical keys
    P3 gate says nearest, not near    relative distances, `furthest`    as published
    P4 an exact anchor is diluted     equal content: weight 1     as published
    P5 a longer anchor's piece        lengths="strict" refuses    as published
    P6 two ways of truncating         both are kept: `Metric.of_tokens` and `of_channels`
    P9 bases of two kinds             a pool has one kind of base
    P11 nucleus of the counts         least prefix of 0.9         as published
    P14 internals of another cache    none are used
    P16 differences in fp16           fp32 until they are stored
    P17 NaN reads as shareable        a number that is not finite is never shareable
    P10 P12 P13 P15                   of whole prompts: not decided in a pool
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvfx.errors import InputError, PolicyError
from kvfx.reuse.gate import Verdict, nucleus_of, published_nucleus_of, refused
from kvfx.reuse.offsets import (
    Base,
    Metric,
    Offsets,
    Published,
    Relative,
    blended,
    weights_of,
)

MODES = ("canonical", "official")
LENGTHS = ("strict", "paper")
# one anchor says nothing about how offsets vary
LEAST_ANCHORS = 2


@dataclass(frozen=True, eq=False)
class Anchor:
    """A text that stood in the slot, its offsets there and those of the fixed piece behind it (both
    per consumer), and how often it was among the nearest.
    """

    base: Base
    offsets: Mapping[str, tuple[Offsets, Offsets]]
    hits: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the base and of all offsets."""
        pairs = self.offsets.values()
        return self.base.nbytes + sum(each.nbytes for pair in pairs for each in pair)


@dataclass(eq=False)
class AnchorPool:
    """At most `max_anchors` anchors of one placeholder, for all its consumers: a consumer is one
    agent's prompt around the placeholder, and always has the same piece behind it.

    A text is shareable if the entropy of its anchors' weights is at most `gamma` of the largest
    possible, and (canonical) its nearest anchor no further than `furthest` of its own size; the
    `most` nearest are then weighed at `temperature`. "strict" `lengths` ask for anchors of as many
    tokens, "paper" for no fewer. "official" has the published distances and temperature, weighs all
    anchors, and takes "paper" lengths. Neither ever holds more than `max_anchors`; the published
    code can hold one more. Raises PolicyError for knobs out of range.
    """

    max_anchors: int = 20
    window: int = 5
    mode: str = "canonical"
    gamma: float = 0.3
    temperature: float = 0.05
    furthest: float = 0.5
    most: int = 4
    lengths: str = "strict"
    anchors: list[Anchor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, choices in (("mode", MODES), ("lengths", LENGTHS)):
            if getattr(self, name) not in choices:
                raise PolicyError(
                    f"AnchorPool({name}={getattr(self, name)!r}): use one of {', '.join(choices)}"
                )
        for name in ("max_anchors", "window", "most"):
            if getattr(self, name) < 1:
                raise PolicyError(f"AnchorPool({name}={getattr(self, name)}): use 1 or more")
        if not 0 <= self.gamma <= 1:
            raise PolicyError(f"AnchorPool(gamma={self.gamma}): use a number from 0 to 1")
        for name in ("temperature", "furthest"):
            if not 0 < getattr(self, name) < math.inf:
                raise PolicyError(f"AnchorPool({name}={getattr(self, name)}): use more than 0")

    @property
    def official(self) -> bool:
        """Whether this pool does what KVCOMM's code does."""
        return self.mode == "official"

    @property
    def metric(self) -> Metric:
        """How distances are measured."""
        return Published() if self.official else Relative(self.temperature)

    @property
    def nbytes(self) -> int:
        """Bytes of all anchors."""
        return sum(anchor.nbytes for anchor in self.anchors)

    def gate(self, base: Base, consumer: str) -> Verdict:
        """Whether `base` may stand in the slot of `consumer` without computing its prompt."""
        if not base.is_finite():
            return refused("the base holds numbers that are not finite")
        found = self._serving(base, consumer)
        if not self.official and any(each.base.content == base.content for each in found):
            return Verdict(True, "", True, (base.content,), (0.0,), 0.0, (base.content,))
        contents = tuple(each.base.content for each in found)
        if len(found) < LEAST_ANCHORS:
            return refused(
                f"{len(found)} of {len(self.anchors)} anchors serve {consumer} and {base.tokens} "
                f"tokens: {LEAST_ANCHORS} are needed",
                contents,
            )
        metric = self.metric
        distances = [metric.whole(base.values, each.base.values) for each in found]
        weights = weights_of(distances, metric.temperature)
        entropy = float(-torch.xlogy(weights, weights).sum() / math.log(2))
        numbers = tuple(map(float, distances))
        reason = self._reason(entropy, numbers)
        if reason:
            return refused(reason, contents, numbers, entropy)
        nucleus = published_nucleus_of if self.official else nucleus_of
        return Verdict(
            True, "", False, contents, numbers, entropy, nucleus(contents, weights.tolist())
        )

    def estimate(self, base: Base, consumer: str, verdict: Verdict) -> tuple[Offsets, Offsets]:
        """Offsets of `base` in the slot of `consumer`, [L, K, T, D], and of the piece behind it,
        [L, K, P, D], in fp32 or wider, as `gate` allowed in `verdict`.

        Exact where this text was an anchor in canonical mode. Otherwise weights for the slot are
        per token, those for the piece per layer, head and (official) channel, from keys for keys
        and from values for values. Raises InputError where the gate refused.
        """
        if not verdict.shareable:
            raise InputError(f"{consumer}: nothing to estimate from: {verdict.reason}")
        used = self._used(consumer, verdict)
        metric, tokens = self.metric, base.tokens
        pairs = [
            (base.keys, [each.base.keys for each in used]),
            (base.values, [each.base.values for each in used]),
        ]
        slot_weights = [
            weights_of([metric.of_tokens(x, y) for y in others], metric.temperature)
            for x, others in pairs
        ]
        piece_weights = [
            weights_of([metric.of_channels(x, y) for y in others], metric.temperature)
            for x, others in pairs
        ]
        slots = [each.offsets[consumer][0] for each in used]
        slots = [Offsets(each.keys[:, :, :tokens], each.values[:, :, :tokens]) for each in slots]
        pieces = [each.offsets[consumer][1] for each in used]
        return blended(slots, *slot_weights), blended(pieces, *piece_weights)

    def add(self, base: Base, consumer: str, slot: Offsets, piece: Offsets) -> None:
        """Remember what the prompt of `consumer` made of `base` and of the piece behind it; of a
        text that is an anchor already, offsets of this consumer are replaced and hits stay.

        A full pool first evicts the anchor with the fewest hits among its `window` oldest, the
        oldest of equal ones. Raises InputError for shapes that do not fit the base or the pool, for
        a base of another kind, and for numbers that are not finite.
        """
        self._check(base, consumer, slot, piece)
        place = {each.base.content: place for place, each in enumerate(self.anchors)}
        if base.content in place:
            known = self.anchors[place[base.content]]
            offsets = {**known.offsets, consumer: (slot, piece)}
            self.anchors[place[base.content]] = replace(known, offsets=offsets)
            return
        if len(self.anchors) >= self.max_anchors:
            self.anchors.remove(min(self.anchors[: self.window], key=lambda each: each.hits))
        self.anchors.append(Anchor(base, {consumer: (slot, piece)}))

    def count(self, verdict: Verdict) -> None:
        """One hit more for each anchor in the nucleus of a verdict that was followed."""
        self.anchors = [
            replace(each, hits=each.hits + 1) if each.base.content in verdict.nucleus else each
            for each in self.anchors
        ]

    def _serving(self, base: Base, consumer: str) -> list[Anchor]:
        """The anchors that have offsets for `consumer` and enough tokens."""
        strict = self.lengths == "strict" and not self.official
        return [
            each
            for each in self.anchors
            if consumer in each.offsets
            and each.base.kind == base.kind
            and (each.base.tokens == base.tokens if strict else each.base.tokens >= base.tokens)
        ]

    def _used(self, consumer: str, verdict: Verdict) -> list[Anchor]:
        """The anchors to weigh, the nearest first."""
        near = sorted(zip(verdict.distances, verdict.contents, strict=True))
        by_content = {each.base.content: each for each in self.anchors}
        used = [by_content.get(name) for _, name in (near if self.official else near[: self.most])]
        found = [each for each in used if each is not None and consumer in each.offsets]
        if len(found) < len(used):
            raise InputError(f"{consumer}: anchors are gone since the verdict: ask the gate again")
        return found

    def _reason(self, entropy: float, distances: Sequence[float]) -> str:
        """Why a text with these distances is not shareable, or nothing."""
        if not math.isfinite(entropy):
            return "distances to anchors are not finite"
        largest = math.log2(len(distances))
        # rounding may lift equal weights above the largest entropy there is
        if min(entropy, largest) > self.gamma * largest:
            return (
                f"anchors are too much alike: an entropy of {entropy:.3f} bits, at most "
                f"{self.gamma * largest:.3f} are allowed"
            )
        if not self.official and min(distances) > self.furthest:
            return f"the nearest anchor is {min(distances):.3f} away, more than {self.furthest}"
        return ""

    def _check(self, base: Base, consumer: str, slot: Offsets, piece: Offsets) -> None:
        if (slot.keys.shape, slot.values.shape) != (base.keys.shape, base.values.shape):
            raise InputError(
                f"{consumer}: offsets {list(slot.keys.shape)} of a base {list(base.keys.shape)}"
            )
        if not (base.is_finite() and slot.is_finite() and piece.is_finite()):
            raise InputError(f"{consumer}: an anchor holds numbers that are not finite")
        if _form(piece.keys, piece.values) != _form(base.keys, base.values):
            raise InputError(f"{consumer}: the piece and the base are not of one model")
        for each in self.anchors:
            if each.base.kind != base.kind:
                raise InputError(f"a base that is {base.kind} in a pool of {each.base.kind} ones")
            if _form(each.base.keys, each.base.values) != _form(base.keys, base.values):
                raise InputError("a base of another model than those in the pool")
            if each.base.content == base.content and each.base.tokens != base.tokens:
                raise InputError(f"two texts of different length are both called {base.content}")
            known = each.offsets.get(consumer)
            if known is not None and known[1].keys.shape != piece.keys.shape:
                raise InputError(
                    f"{consumer}: the piece has {piece.keys.shape[2]} tokens, and had "
                    f"{known[1].keys.shape[2]} before: name another template another consumer"
                )


def _form(keys: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    """Layers, KV heads, and the widths of keys and values."""
    layers, heads, _, width = keys.shape
    return layers, heads, width, values.shape[3]
