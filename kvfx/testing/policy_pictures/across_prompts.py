"""Where the rows of a prompt come from, as strips: from pools and agents on a tiny model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kvfx
from kvfx.policy import Reuse
from kvfx.reuse import Agents, Pool, Slot
from kvfx.reuse.layout import Layout
from kvfx.reuse.repaired import RepairedState
from kvfx.reuse.runner import Checked
from kvfx.testing.policy_pictures.drawing import LINE, MARGIN, box, document, legend, words
from kvfx.testing.tiny import tiny_llama

# pixels: what is left of the strips, a token, and a strip
LEFT, CELL, STRIP = 104, 7, 18
SAYS = {
    "exact": "found, exact",
    "reused": "found, computed in another context",
    "repaired": "found, computed again",
    "computed": "computed",
    "late": "computed again while decoding",
}
# one colour would say two things
KINDS = {"exact": "passed"}


@dataclass(frozen=True)
class Strip:
    """A prompt: the names and lengths of its pieces, and where each row came from."""

    label: str
    pieces: Sequence[tuple[str, int]]
    rows: Sequence[str]


@dataclass(frozen=True)
class AcrossPrompts:
    """Two prompts of the same pieces in another order, under a reuse policy."""

    policy: Reuse
    steps: int = 0
    order: str = "BACQ"

    def __call__(self) -> str:
        """The SVG."""
        fast = kvfx.compress(model(), "full", compile=False, verify=False)
        pool = Pool(fast, self.policy)
        pieces = {"A": piece(1, 26), "B": piece(2, 34), "C": piece(3, 18), "Q": piece(4, 9)}
        strips = [
            self._strip(pool, pieces, label, order)
            for label, order in (("first prompt", "ABQ"), ("second prompt", self.order))
        ]
        return strips_of(repr(self.policy), strips)

    def _strip(self, pool: Pool, pieces: dict[str, list[int]], label: str, order: str) -> Strip:
        layout = Layout.of([pieces[name] for name in order])
        found = pool.finder.find(layout)
        computed: list[tuple[Any, Sequence[int]]] = []
        for name in ("partial", "precheck"):
            setattr(pool.runner, name, noted(getattr(pool.runner, name), computed))
        done = pool.prefill(layout)
        again = {
            place for rows, positions in computed if rows is computed[0][0] for place in positions
        }
        kinds = ["computed"] * (len(layout.tokens) - 1)
        for each in found:
            for place in range(each.start, min(each.stop, len(kinds))):
                kinds[place] = "exact" if each.exact else "reused"
                if place in again:
                    kinds[place] = "repaired"
        served = done.served
        assert kinds.count("reused") == served.approximate
        assert kinds.count("computed") == served.computed
        state = done.cache.state
        ids = done.input_ids[:, -1:]
        for _ in range(self.steps if isinstance(state, RepairedState) else 0):
            ids = pool.fast(ids, past_key_values=done.cache).logits[:, -1:].argmax(-1)
        if isinstance(state, RepairedState):
            for place in state.repaired:
                kinds[place] = "late"
        names = [(name, len(pieces[name])) for name in order]
        return Strip(label, names, [*kinds, "computed"])


def noted(
    call: Callable[..., Any], computed: list[tuple[Any, Sequence[int]]]
) -> Callable[..., Any]:
    """The same call, which also writes down the rows that it computes to the end."""

    def wrapped(*args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        positions = result.positions if isinstance(result, Checked) else args[2]
        computed.append((args[0], list(positions)))
        return result

    return wrapped


def agents() -> str:
    """Three calls of one agent: new texts, another answer, and texts that are anchors."""
    fast = kvfx.compress(model(), "full", compile=False, verify=False)
    fixed, asked = [piece(seed, 12) for seed in (1, 2, 3)], piece(4, 20)
    drafts = [piece(5, 24), piece(6, 24)]
    parts = [fixed[0], Slot("question"), fixed[1], Slot("draft"), fixed[2]]
    writer = Agents(fast, {"writer": parts})
    strips = []
    for index, draft in enumerate((*drafts, drafts[0])):
        call = writer.prefill("writer", {"question": asked, "draft": draft})
        names = [("fixed", 12), ("question", 20), ("fixed", 12), ("draft", 24), ("fixed", 12)]
        body = sum(length for _, length in names) - 1
        kinds = ["computed"] * body
        if call.reused:
            kinds = ["exact"] * 12 + ["reused"] * (body - 12)
        assert kinds.count("computed") == call.served.computed
        strips.append(Strip(f"call {index + 1}", names, [*kinds, "computed"]))
    says = {**SAYS, "reused": "computed alone, plus the offset of an anchor"}
    return strips_of("KVCOMM()", strips, says)


def strips_of(title: str, strips: Sequence[Strip], says: dict[str, str] = SAYS) -> str:
    """Prompts one below the other: pieces, and where their rows came from."""
    top = MARGIN + LINE + 14
    parts = [words(MARGIN, MARGIN + 12, title, "code")]
    for index, strip in enumerate(strips):
        above, place = top + index * (2 * STRIP + 24), 0
        parts.append(words(LEFT - 8, above + 13, strip.label, "small", "end"))
        for number, (name, length) in enumerate(strip.pieces):
            left, width = LEFT + CELL * place, CELL * length
            parts.append(box(("even", "odd")[number % 2], left, above, width, STRIP))
            parts.append(words(left + width / 2, above + 13, name, "small", "middle"))
            place += length
        place = 0
        for kind, group in itertools.groupby(strip.rows):
            length = len(list(group))
            drawn = KINDS.get(kind, kind)
            left = LEFT + CELL * place
            parts.append(box(drawn, left, above + STRIP + 2, CELL * length, STRIP))
            place += length
    bottom = top + len(strips) * (2 * STRIP + 24)
    used = {kind for strip in strips for kind in strip.rows}
    parts.append(
        legend({KINDS.get(kind, kind): says[kind] for kind in says if kind in used}, bottom)
    )
    parts.append(
        words(MARGIN, bottom + 34, "Above: the pieces of a prompt. Below: its rows.", "small")
    )
    widest = max(len(strip.rows) for strip in strips)
    width = max(LEFT + CELL * widest + MARGIN, 700)
    return document(parts, width, bottom + 48, f"where rows come from: {title}")


def model() -> Any:
    """A tiny Llama with four layers."""
    return tiny_llama(head_dim=32, layers=4)


def piece(seed: int, length: int) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (length,), generator=generator).tolist()
