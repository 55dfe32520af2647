"""What a request shares with one similar sequence, in the order of both: the semantic mode."""

from __future__ import annotations

import difflib
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence

from kvfx.reuse.match import Span, check_least, equal_after, equal_before

# tokens of a run that count as one word where sequences are compared
GRAM = 2


def aligned(
    tokens: Sequence[int], donor: Sequence[int], least: int = 8, *, sequence: str = ""
) -> tuple[Span, ...]:
    """Spans of the request `tokens` [N] that stand in the `donor` [M] in the same order, of `least`
    tokens or more, by position; they name the donor `sequence`.

    The common beginning and end, and between them what `difflib.SequenceMatcher` calls equal: its
    time grows with the product of both lengths. KVShare v1 (arXiv 2503.16525v1) aligns requests
    semantically in a way that is not published: this is the smallest step towards it.
    """
    check_least(least)
    request, stored = array("q", tokens), array("q", donor)
    n, m = len(request), len(stored)
    front = equal_after(request, 0, stored, 0)
    back = min(equal_before(request, n, stored, m), min(n, m) - front)
    middle = difflib.SequenceMatcher(
        None, request[front : n - back], stored[front : m - back], autojunk=False
    )
    spans = [Span(0, front, sequence, 0)]
    spans += [
        Span(front + block.a, block.size, sequence, front + block.b)
        for block in middle.get_matching_blocks()
    ]
    spans.append(Span(n - back, back, sequence, m - back))
    return tuple(span for span in spans if span.length >= least)


def nearest_donor(
    tokens: Sequence[int], stored: Mapping[str, Sequence[int]], threshold: float = 0.8
) -> str | None:
    """The key of the stored sequence most like `tokens`, or None where none reaches `threshold`;
    of equally similar ones the last in `stored`, which is in order of age.

    Likeness is the cosine of the counts of token pairs, in [0, 1]: no embedding is involved, so it
    sees shared wording and no shared meaning.
    """
    grams = _grams(tokens)
    likeness = {key: _cosine(grams, _grams(donor)) for key, donor in stored.items()}
    best = max(reversed(likeness), key=likeness.__getitem__, default=None)
    if best is None or not likeness[best] >= threshold:
        return None
    return best


def _grams(tokens: Sequence[int]) -> Counter[tuple[int, ...]]:
    """How often each run of `GRAM` tokens occurs; a shorter text is one run."""
    if not len(tokens):
        return Counter()
    count = max(1, len(tokens) - GRAM + 1)
    return Counter(tuple(tokens[start : start + GRAM]) for start in range(count))


def _cosine(left: Counter[tuple[int, ...]], right: Counter[tuple[int, ...]]) -> float:
    lengths = math.prod(sum(count * count for count in side.values()) for side in (left, right))
    if lengths == 0:
        return 0.0
    return sum(count * right[gram] for gram, count in left.items()) / math.sqrt(lengths)
