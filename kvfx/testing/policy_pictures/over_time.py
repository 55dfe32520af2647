"""What becomes of each position of a layer: positions to the right, time downwards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

import kvfx
from kvfx.cache_trace.picture import areas
from kvfx.cache_trace.trace import STATUSES, CacheTrace
from kvfx.policy import Policy
from kvfx.testing.policy_pictures.drawing import (
    LINE,
    MARGIN,
    document,
    legend,
    line,
    number,
    words,
)
from kvfx.testing.tiny import tiny_llama

# pixels: what is left of the panels, between them, a prompt, and a step
LEFT, GAP, PROMPT, STEP = 62, 34, 16, 5


@dataclass(frozen=True)
class Panel:
    """One KV head of one site under a policy."""

    policy: Policy
    title: str
    site: int = 1
    head: int = 0


@dataclass(frozen=True)
class OverTime:
    """Panels of a tiny Llama that reads `prompt` tokens and decodes `new` ones; `says` replaces
    what the legend says of a status, `title` the policies.
    """

    panels: Sequence[Panel]
    prompt: int = 40
    new: int = 24
    width: int = 300
    layers: int = 2
    says: Mapping[str, str] = field(default_factory=dict)
    title: str = ""

    def __call__(self) -> str:
        """The SVG."""
        traces = {repr(panel.policy): self._trace(panel.policy) for panel in self.panels}
        shown = [traces[repr(panel.policy)] for panel in self.panels]
        policies = dict.fromkeys(self.title or trace.policy for trace in shown)
        top = MARGIN + LINE * len(policies) + 26
        parts = [
            words(MARGIN, MARGIN + 12 + LINE * index, text, "code")
            for index, text in enumerate(policies)
        ]
        parts.append(words(LEFT - 8, top + 12, "prompt", "small", "end"))
        parts.append(words(LEFT - 8, top + PROMPT + 14, "reply", "small", "end"))
        parts.append(line("line", LEFT - 18, top + PROMPT + 20, "v26m-3 -5l3 5l3 -5"))
        bottom = top
        for index, (panel, trace) in enumerate(zip(self.panels, shown, strict=True)):
            left = LEFT + index * (self.width + GAP)
            drawn, height = drawing_of(panel, trace, left, top, self.width)
            parts.append(drawn)
            bottom = max(bottom, top + height)
        used = {change.status for panel, trace in zip(self.panels, shown, strict=True)
                for change in trace.sites[panel.site].heads[panel.head]}  # fmt: skip
        entries = {kind: {**STATUSES, **self.says}[kind] for kind in STATUSES if kind in used}
        parts.append(legend(entries, bottom + 30))
        width = LEFT + len(self.panels) * (self.width + GAP)
        said = [f"{self.prompt} tokens are read, {self.new} are decoded, one a step downwards."]
        if any("compact" in trace.steps for trace in shown):
            said.append("◂: the compact program runs.")
        parts.append(words(MARGIN, bottom + 66, " ".join(said), "small"))
        title = f"what becomes of each token: {'; '.join(policies)}"
        return document(parts, max(width, 560), round(bottom + 80), title)

    def _trace(self, policy: Policy) -> CacheTrace:
        model = tiny_llama(head_dim=32, layers=self.layers)
        fast = kvfx.compress(model, policy, compile=False, verify=False)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 90, (1, self.prompt), generator=generator)
        return fast.trace_cache(ids, self.new)


def drawing_of(
    panel: Panel, trace: CacheTrace, left: float, top: float, width: float
) -> tuple[str, float]:
    """A panel, and its height: rectangles of one status, a path per status."""
    heights = [PROMPT if step == "prefill" else STEP for step in trace.steps]
    edges = [0, *itertools.accumulate(heights)]
    cell = width / len(trace.tokens)
    paths: dict[str, list[str]] = {}
    for status, start, end, first, count in areas(trace, panel.site, panel.head):
        across, down = number(cell * count), edges[end] - edges[start]
        at = f"M{number(left + cell * first)} {number(top + edges[start])}"
        paths.setdefault(status, []).append(f"{at}h{across}v{down}h-{across}z")
    cells = [f'<path class="{kind}" d="{"".join(each)}"/>' for kind, each in paths.items()]
    height, split = edges[-1], left + cell * trace.prompt
    marks = [
        f'<path class="mark" d="M{number(left + width + 3)} {number(top + edges[step] + 2.5)}l7 '
        '-3.5v7z"/>'
        for step, program in enumerate(trace.steps)
        if program == "compact"
    ]
    parts = [
        words(left, top - 8, panel.title, "head"),
        *cells,
        *marks,
        line("line", split, top, f"v{height + 6}"),
        words(left, top + height + 15, "positions of the prompt", "small"),
        words(split + 4, top + height + 15, "of the reply", "small"),
    ]
    return "".join(parts), height


def heads(policy: Policy) -> tuple[Panel, ...]:
    """Both KV heads of a layer."""
    return tuple(Panel(policy, f"KV head {head}", head=head) for head in range(2))


def layers(policy: Policy, count: int = 2) -> tuple[Panel, ...]:
    """A KV head of each layer."""
    return tuple(Panel(policy, f"layer {site}", site=site) for site in range(count))
