"""How much each layer gets, as bars: from the plan of a tiny model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import kvfx
from kvfx.errors import CalibrationError
from kvfx.fit import sites_of
from kvfx.geometry import Site
from kvfx.planner import Plan, SitePlan, make_plan
from kvfx.policies import KIVI
from kvfx.policy import Policy
from kvfx.report import short_policy
from kvfx.testing.policy_pictures.drawing import (
    LINE,
    MARGIN,
    box,
    document,
    legend,
    line,
    words,
)
from kvfx.testing.tiny import tiny, tiny_llama

# pixels: what is left of the bars, the longest bar, and the height of a row
LEFT, LONGEST, ROW = 92, 420, 22
LAYERS = 8
# tokens of the prompt whose entries are counted
PROMPT = 1000

Bars = Sequence[tuple[str, float, str]]


@functools.cache
def sites() -> tuple[Site, ...]:
    """Those of a tiny Llama of eight layers."""
    return sites_of(tiny_llama(head_dim=32, layers=LAYERS), strict=True)


@functools.cache
def calibration() -> kvfx.Calibration:
    """What that model does with two random prompts."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (128,), generator=generator) for _ in range(2)]
    return kvfx.calibrate(tiny_llama(head_dim=32, layers=LAYERS), prompts, tokens=128)


def plan_of(policy: Policy) -> Plan:
    """What the policy decides for that model, calibrated if it asks for that."""
    try:
        return make_plan(policy, sites())
    except CalibrationError:
        return make_plan(policy, sites(), calibration=calibration())


@dataclass(frozen=True)
class ByLayer:
    """Bars per layer under a policy: what `bars` reads from the plan of a site."""

    policy: Policy
    bars: Callable[[SitePlan], Bars]
    says: dict[str, str]
    mean: float | None = None
    largest: float | None = None

    def __call__(self) -> str:
        """The SVG."""
        rows = [self.bars(site) for site in plan_of(self.policy).sites]
        labels = [f"layer {index}" for index in range(len(rows))]
        note = "A tiny model with random weights."
        if self.bars is not precision:
            note = f"A prompt of {PROMPT:,} tokens. {note}"
        return bars_of(
            short_policy(self.policy), labels, rows, self.says, note, self.mean, self.largest
        )


def bars_of(
    title: str,
    labels: Sequence[str],
    rows: Sequence[Bars],
    says: dict[str, str],
    note: str,
    mean: float | None = None,
    largest: float | None = None,
) -> str:
    """Labelled rows of bars under a title; a dashed line at `mean`."""
    top, each = MARGIN + LINE + 12, max(len(row) for row in rows)
    scale = LONGEST / (largest or max(value for row in rows for _, value, _ in row))
    parts = [words(MARGIN, MARGIN + 12, title, "code")]
    height = ROW * each + (6 if each > 1 else 0)
    for index, (label, row) in enumerate(zip(labels, rows, strict=True)):
        above = top + index * height
        parts.append(words(LEFT - 8, above + 15, label, "small", "end"))
        for place, (kind, value, text) in enumerate(row):
            y = above + place * ROW
            parts.append(box(kind, LEFT, y + 3, max(1.0, value * scale), ROW - 6))
            # a number beside the bar would lie on the dashed line
            inside = mean is not None
            at = LEFT + 6 if inside else LEFT + value * scale + 6
            parts.append(words(at, y + 15, text, "inside" if inside else "small"))
    bottom = top + height * len(rows)
    if mean is not None:
        parts.append(line("dash", LEFT + mean * scale, top, f"V{bottom}"))
        parts.append(words(LEFT + mean * scale + 4, bottom + 11, "equal budgets", "small"))
        bottom += 14
    parts.append(legend(says, bottom + 12))
    parts.append(words(MARGIN, bottom + 46, note, "small"))
    return document(parts, LEFT + LONGEST + 110, bottom + 60, f"bars per layer: {title}")


def entries(site: SitePlan) -> Bars:
    """Entries that stay of the prompt."""
    kept = site.schedule.kept(PROMPT, PROMPT)
    return [("kept", kept, f"{kept}")]


def precision(site: SitePlan) -> Bars:
    """Bits of keys and of values."""
    assert isinstance(site.store, KIVI)
    k, v = site.store.key_bits, site.store.value_bits
    return [("kept", k, f"{k}"), ("values", v, f"{v}")]


def both(site: SitePlan) -> Bars:
    """Entries that stay, and their bits."""
    assert isinstance(site.store, KIVI)
    kept = site.schedule.kept(PROMPT, PROMPT)
    bits = f"{site.store.key_bits} bit keys, {site.store.value_bits} bit values"
    return [("kept", kept, f"{kept} in {bits}")]


def budgets(policy: Policy) -> ByLayer:
    """The entries that an allocator gives to layers, at a quarter of the tokens."""
    return ByLayer(policy, entries, {"kept": "entries kept per KV head"}, mean=PROMPT / 4)


def latents() -> str:
    """Bytes per token and layer of keys and values, and of what they are computed from."""
    kinds = {"deepseek_v3": "DeepSeek-V3", "minicpm3": "MiniCPM3", "gpt2": "GPT-2"}
    rows: list[Bars] = []
    for kind in kinds:
        site = sites_of(tiny(kind), strict=True)[0]
        size = site.dtype.itemsize
        dense, cut = site.width * size, sum(site.latent) * size
        rows.append([("odd", dense, f"{dense} bytes"), ("kept", cut, f"{cut} bytes")])
    says = {"odd": "keys and values", "kept": "what they are computed from"}
    note = "Bytes per token and layer in fp32: tiny models of these classes, as they were found."
    return bars_of("CacheLatent()", list(kinds.values()), rows, says, note)
