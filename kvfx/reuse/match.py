"""Where the tokens of a request stand already: runs of stored sequences, found by rolling hash.

Source: KVShare v2 (arXiv 2503.16525) finds exact fragments of any length by rolling hash. What its
readers do not report is chosen here: windows, least lengths, which of two overlapping runs stays.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvfx.errors import InputError

# a prime, so that windows collide by chance only: 2^61 - 1
MODULUS = (1 << 61) - 1
# the polynomial's variable, above every token id in use
BASE = 0x5DEECE66D
# a stretch that repeats itself is known by its first and its last windows
ENDS = 2


@dataclass(frozen=True)
class Span:
    """`length` tokens of a request from position `start` on, equal to those of the stored
    `sequence` from position `source` on.
    """

    start: int
    length: int
    sequence: str
    source: int

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.length

    @property
    def is_prefix(self) -> bool:
        """Whether both begin with these tokens: what was computed exactly for the stored sequence
        is exact for the request.
        """
        return self.start == 0 and self.source == 0

    def cut(self, start: int, stop: int) -> Span:
        """The part at request positions start to stop."""
        return Span(start, stop - start, self.sequence, self.source + start - self.start)


@dataclass(eq=False)
class FragmentIndex:
    """Stored sequences, by the hashes of their windows of `window` tokens at multiples of `stride`.

    A run of `window + stride - 1` tokens or more holds one of those windows and is found. Hashes
    only propose: tokens are always compared, so a `modulus` of 1 is slow, never wrong.
    """

    window: int = 16
    stride: int = 16
    modulus: int = MODULUS
    _sequences: dict[str, array[int]] = field(default_factory=dict, init=False, repr=False)
    _places: dict[int, list[tuple[str, int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("window", "stride", "modulus"):
            if getattr(self, name) < 1:
                raise InputError(f"FragmentIndex({name}={getattr(self, name)}): use 1 or more")

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, key: str, tokens: Sequence[int]) -> None:
        """Know the token ids [T] as sequence `key`, in place of what it was before."""
        self.remove(key)
        stored = array("q", tokens)
        self._sequences[key] = stored
        for value, start in self._indexed(stored):
            self._places.setdefault(value, []).append((key, start))

    def remove(self, key: str) -> None:
        """Forget the sequence `key`, if it is known."""
        stored = self._sequences.pop(key, None)
        if stored is None:
            return
        for value in {value for value, _ in self._indexed(stored)}:
            left = [place for place in self._places[value] if place[0] != key]
            if left:
                self._places[value] = left
            else:
                del self._places[value]

    def match(self, tokens: Sequence[int], least: int = 32) -> tuple[Span, ...]:
        """Disjoint spans of the request `tokens` [N] of `least` tokens or more, by position.

        The longest comes first (of equal ones the earlier in the request, then the one stored
        first), and each takes from the others what overlaps.
        """
        check_least(least)
        return _disjoint(self._found(array("q", tokens)), least)

    def _found(self, request: array[int]) -> list[tuple[int, Span]]:
        """Runs that agree and cannot be longer, each with the rank of its sequence: all but those
        inside a run of a sequence of no later rank.
        """
        ranks = {key: rank for rank, key in enumerate(self._sequences)}
        found: list[tuple[int, Span]] = []
        ends: dict[tuple[str, int], int] = {}
        furthest, rank_of_furthest = Span(0, 0, "", 0), 0
        for at, value in enumerate(self._hashes(request)):
            for key, start in self._places.get(value, ()):
                shift, stored = at - start, self._sequences[key]
                if ends.get((key, shift), 0) > at:
                    continue
                later = ranks[key] >= rank_of_furthest
                if later and _within(furthest, at, request, stored, shift):
                    continue
                here, there = at + self.window, start + self.window
                if request[at:here] != stored[start:there]:
                    continue
                left = equal_before(request, at, stored, start)
                right = equal_after(request, here, stored, there)
                span = Span(at - left, left + self.window + right, key, start - left)
                ends[key, shift] = span.end
                found.append((ranks[key], span))
                if span.end > furthest.end:
                    furthest, rank_of_furthest = span, ranks[key]
        return found

    def _hashes(self, tokens: array[int]) -> Iterator[int]:
        """The hash of the window at every position that has one."""
        window, modulus = self.window, self.modulus
        top = pow(BASE, window, modulus)
        value = 0
        for position, token in enumerate(tokens):
            value = (value * BASE + token) % modulus
            if position >= window:
                value = (value - tokens[position - window] * top) % modulus
            if position >= window - 1:
                yield value

    def _indexed(self, tokens: array[int]) -> list[tuple[int, int]]:
        """(hash, start) of the windows that stand for a sequence.

        Where a window comes again and again because the text between repeats, its first two and
        last two places lead to the same runs as all of them: one end of a run is always an end of
        the stretch. So a text of one token costs as little as any other.
        """
        kept: dict[int, list[int]] = {}
        lengths: dict[int, int] = {}
        for start, value in enumerate(self._hashes(tokens)):
            if start % self.stride:
                continue
            places = kept.setdefault(value, [])
            repeats = len(places) >= ENDS and _repeats(
                tokens, places[-2], places[-1], start, self.window
            )
            lengths[value] = lengths.get(value, 0) + 1 if repeats else ENDS
            if lengths[value] > 2 * ENDS:
                del places[-ENDS]
            places.append(start)
        return [(value, start) for value, places in kept.items() for start in places]


def hit_rate(spans: Sequence[Span], tokens: Sequence[int]) -> float:
    """The share of the request's `tokens` that lies in `spans`; 0 for no tokens."""
    return sum(span.length for span in spans) / max(1, len(tokens))


def equal_after(left: array[int], at: int, right: array[int], there: int) -> int:
    """How many tokens from `at` on in one text equal those from `there` on in another."""
    return _longest(
        min(len(left) - at, len(right) - there),
        lambda a, b: left[at + a : at + b] == right[there + a : there + b],
    )


def equal_before(left: array[int], at: int, right: array[int], there: int) -> int:
    """How many tokens before `at` in one text equal those before `there` in another."""
    return _longest(
        min(at, there), lambda a, b: left[at - b : at - a] == right[there - b : there - a]
    )


def check_least(least: int) -> None:
    """Raise an InputError unless `least` is 1 or more."""
    if least < 1:
        raise InputError(f"least={least}: a span has 1 token or more")


def _longest(limit: int, agree: Callable[[int, int], bool]) -> int:
    """The largest n <= limit for which `agree(0, n)`, where `agree(a, b)` says whether tokens a to
    b are equal: in steps that double, then halve.
    """
    done, step, growing = 0, 16, True
    while step and done < limit:
        if agree(done, min(done + step, limit)):
            done = min(done + step, limit)
        else:
            growing = False
        step = step * 2 if growing else step // 2
    return done


def _within(outer: Span, at: int, request: array[int], stored: array[int], shift: int) -> bool:
    """Whether a run through request position `at` cannot leave `outer`, by one token on each side;
    `shift` is the request's position less the stored one.
    """
    if at >= outer.end:
        return False
    return not any(
        0 <= position < len(request)
        and 0 <= position - shift < len(stored)
        and request[position] == stored[position - shift]
        for position in (outer.start - 1, outer.end)
    )


def _repeats(tokens: array[int], first: int, second: int, third: int, window: int) -> bool:
    """Whether windows at three places are equally far apart in a text that repeats at that
    distance.
    """
    stop = third + window
    return tokens[first : second + window] == tokens[second:stop]


def _disjoint(found: Sequence[tuple[int, Span]], least: int) -> tuple[Span, ...]:
    """The longest span, then the longest of what is left beside it, and so on."""
    heap = [
        (-span.length, span.start, rank, number, span)
        for number, (rank, span) in enumerate(found)
        if span.length >= least
    ]
    heapq.heapify(heap)
    starts: list[int] = []
    taken: list[Span] = []
    while heap:
        _, _, rank, number, span = heapq.heappop(heap)
        # what is taken is no shorter, so none of it lies within this span: one part is left
        place = bisect_right(starts, span.start)
        start = max(span.start, taken[place - 1].end if place > 0 else 0)
        stop = min(span.end, starts[place] if place < len(taken) else span.end)
        if (start, stop) == (span.start, span.end):
            starts.insert(place, start)
            taken.insert(place, span)
        elif stop - start >= least:
            heapq.heappush(heap, (start - stop, start, rank, number, span.cut(start, stop)))
    return tuple(taken)
