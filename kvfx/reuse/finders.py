"""Where rows of a prompt may be taken from, and what is remembered of one that was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvfx.reuse.align import aligned, nearest_donor
from kvfx.reuse.layout import Layout
from kvfx.reuse.match import FragmentIndex, Span
from kvfx.reuse.runner import LiveRows, Runner
from kvfx.reuse.segment import (
    EXACT,
    EXACT_PREFIX,
    ISOLATED,
    REPAIRED,
    Segment,
    Stored,
    context_hash,
)
from kvfx.reuse.store import SegmentStore

# rows that were reused so often on the way are not reused again (specs/reuse.md 1.7, P13)
DEEPEST = 2


@dataclass(frozen=True, eq=False)
class Found:
    """Rows for the positions from `start` on; `exact` says that the whole prompt would have made
    the same of them.
    """

    start: int
    segment: Segment
    exact: bool

    @property
    def stop(self) -> int:
        """The position behind the last row."""
        return self.start + len(self.segment.tokens)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a prompt: its live rows, what was found for it, the tokens that were found
    nowhere, and how far its rows are from exact arithmetic (0: they are exact).
    """

    layout: Layout
    rows: LiveRows
    found: tuple[Found, ...]
    new: int
    depth: int


class Finder(Protocol):
    """Looks up the tokens of a prompt, all but the last, and learns from those computed."""

    def find(self, layout: Layout) -> tuple[Found, ...]:
        """Disjoint rows that are stored, by position."""
        ...

    def missing(self, layout: Layout) -> tuple[tuple[int, ...], ...]:
        """What would be computed of a prompt, as runs of tokens; nothing is loaded."""
        ...

    def learn(self, outcome: Outcome) -> None:
        """Store what later prompts may find."""
        ...

    def add(self, segment: Segment) -> str:
        """Store rows that were not computed for a prompt: their key."""
        ...


@dataclass(eq=False)
class PieceFinder:
    """Whole pieces of a layout, all but the last: behind the very tokens before them, or, unless
    `exact`, as they were computed alone.
    """

    store: SegmentStore
    runner: Runner
    exact: bool

    def find(self, layout: Layout) -> tuple[Found, ...]:
        """Pieces that are stored."""
        found, context, exact = [], "", True
        for start, piece in zip(layout.starts[:-1], layout.pieces[:-1], strict=True):
            segment = None
            if exact:
                segment = self.store.get(piece, provenance=EXACT_PREFIX, context=context)
            if segment is not None:
                found.append(Found(start, segment, True))
            elif not self.exact:
                segment = self.store.get(piece, provenance=ISOLATED)
                if segment is not None:
                    found.append(Found(start, segment, False))
                    exact = False
            context = context_hash(piece, context)
        return tuple(found)

    def missing(self, layout: Layout) -> tuple[tuple[int, ...], ...]:
        """The pieces that are not stored, and the last one."""
        known = {(facts.tokens, facts.context) for facts in self.store.segments()}
        missing, context = [], ""
        for piece in layout.pieces[:-1]:
            contexts = {context} if self.exact else {context, ""}
            if not any((piece, before) in known for before in contexts):
                missing.append(piece)
            context = context_hash(piece, context)
        return (*missing, layout.pieces[-1])

    def learn(self, outcome: Outcome) -> None:
        """Store the pieces that were not found: those of an exact prompt as they are, or, unless
        `exact`, computed alone.
        """
        known = {each.start for each in outcome.found}
        layout, context = outcome.layout, ""
        for start, piece in zip(layout.starts[:-1], layout.pieces[:-1], strict=True):
            if start not in known:
                if not self.exact:
                    self.store.put(alone(self.runner, piece))
                elif outcome.depth == 0:
                    pair = self.runner.canonical(outcome.rows, start, start + len(piece))
                    segment = cast_segment(self.runner, piece, pair, EXACT_PREFIX, context, 0)
                    self.store.put(segment)
            context = context_hash(piece, context)

    def add(self, segment: Segment) -> str:
        """Store a piece."""
        return self.store.put(segment)


class FragmentFinder:
    """Runs of at least `least` tokens of whole earlier prompts, by hashes of `window` tokens; with
    `similar`, those of one prompt, in its order.
    """

    def __init__(
        self, store: SegmentStore, runner: Runner, *, least: int, window: int, similar: bool
    ) -> None:
        self.store, self.runner = store, runner
        self.least, self.similar = least, similar
        self.index = FragmentIndex(window=window, stride=window)
        self.known: dict[str, Stored] = {}
        for facts in store.segments():
            self._remember(facts)

    def find(self, layout: Layout) -> tuple[Found, ...]:
        """Fragments that are stored."""
        tokens = layout.tokens[:-1]
        found = []
        for span in self._spans(tokens):
            segment = self.store.load(span.sequence)
            if segment is None:
                # evicted since it was indexed; it may have had several fragments
                self.index.remove(span.sequence)
                self.known.pop(span.sequence, None)
                continue
            exact = span.is_prefix and segment.provenance in EXACT
            part = segment.slice(span.source, span.source + span.length)
            found.append(Found(span.start, part, exact))
        return tuple(found)

    def missing(self, layout: Layout) -> tuple[tuple[int, ...], ...]:
        """What stands between the fragments that are indexed."""
        tokens, missing, end = layout.tokens, [], 0
        for span in self._spans(tokens[:-1]):
            missing.append(tokens[end : span.start])
            end = span.end
        return tuple(part for part in (*missing, tokens[end:]) if part)

    def learn(self, outcome: Outcome) -> None:
        """Store the whole prompt, if it holds a fragment that is new."""
        if outcome.new < self.least or outcome.depth > DEEPEST:
            return
        tokens = outcome.layout.tokens[:-1]
        provenance = ISOLATED if outcome.depth == 0 else REPAIRED
        pair = self.runner.canonical(outcome.rows, 0, len(tokens))
        self.add(cast_segment(self.runner, tokens, pair, provenance, "", outcome.depth))

    def add(self, segment: Segment) -> str:
        """Store a sequence, and index its fragments."""
        key = self.store.put(segment)
        self._remember(Stored.of(key, segment))
        return key

    def _spans(self, tokens: Sequence[int]) -> tuple[Span, ...]:
        if not self.similar:
            return self.index.match(tokens, self.least)
        donor = nearest_donor(tokens, {key: facts.tokens for key, facts in self.known.items()})
        if donor is None:
            return ()
        return aligned(tokens, self.known[donor].tokens, sequence=donor)

    def _remember(self, facts: Stored) -> None:
        if facts.key not in self.known and not facts.context and facts.depth <= DEEPEST:
            self.known[facts.key] = facts
            self.index.add(facts.key, facts.tokens)


def alone(runner: Runner, tokens: Sequence[int]) -> Segment:
    """The rows of tokens that are computed with nothing before them."""
    rows = runner.rows(len(tokens))
    runner.dense(rows, tokens)
    return cast_segment(runner, tokens, runner.canonical(rows, 0, len(tokens)), ISOLATED, "", 0)


def cast_segment(
    runner: Runner,
    tokens: Sequence[int],
    pair: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    provenance: str,
    context: str,
    depth: int,
) -> Segment:
    """A segment of canonical keys and values in the dtype of the model."""
    dtype = runner.sites[0].dtype
    keys, values = (tuple(x.to(dtype) for x in each) for each in pair)
    return Segment(tuple(tokens), keys, values, provenance, context, depth)
