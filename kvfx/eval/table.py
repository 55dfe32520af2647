"""Measurements as tables: on a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvfx.bench.machine import versions_text
from kvfx.eval.answers import CEILING, Retrieval
from kvfx.eval.estimates import KL, RATE, RATIO, estimate
from kvfx.eval.fidelity import Fidelity
from kvfx.eval.results import Measurement, Setting
from kvfx.eval.stats import mcnemar
from kvfx.policies.full import Full

if TYPE_CHECKING:
    from rich.table import Table

DENSE = repr(Full())
FIDELITY = ("policy", "cache", "of dense", "perplexity", "ratio to dense", "KL, nats", "flips")
RETRIEVAL = ("policy", "cache", "of dense", "answered", "rate", "p (vs dense)")


@dataclass(frozen=True)
class Section:
    """One task at one length."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remark: str

    def render(self) -> Table:
        """The section, drawn."""
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD, title=self.title, caption=self.remark, title_justify="left"
        )
        for name in self.header:
            table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The section as Markdown."""
        table = markdown_table(self.header, self.rows)
        return f"**{self.title}**\n\n{table}\n\n{self.remark}\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown; the first column is code, the others are numbers."""
    rule = ("---", *("---:" for _ in header[1:]))
    # a policy may be composed with the letter that parts cells
    first = [("`" + row[0].replace("|", "\\|") + "`", *row[1:]) for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *first))


def sections(measurements: Sequence[Measurement]) -> list[Section]:
    """One section per task and length, in order."""
    return [_section(group) for group in by_setting(measurements)]


def by_setting(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """Measurements that differ in their policy alone, in order."""
    groups: dict[str, list[Measurement]] = {}
    for found in measurements:
        groups.setdefault(repr(replace(found.setting, policy="")), []).append(found)
    return list(groups.values())


def dense_of(group: Sequence[Measurement]) -> Measurement | None:
    """The dense cache among measurements of one setting."""
    return next((found for found in group if found.setting.policy == DENSE), None)


def headline(measurements: Sequence[Measurement]) -> str:
    """Where and of what this was measured."""
    places = (
        f"{found.setting.model} in {found.setting.dtype} on {found.device}, {found.threads} "
        f"threads; {versions_text(found.versions)}; {found.date}"
        for found in measurements
    )
    return "\n".join(dict.fromkeys(places))


def _section(group: Sequence[Measurement]) -> Section:
    setting = group[0].setting
    dense = dense_of(group)
    where = f"{setting.task}, {setting.length:,} tokens"
    if isinstance(group[0].scores, Fidelity):
        rows = tuple(_fidelity_row(found, dense) for found in group)
        return Section(f"{where}: {_read(setting)}", FIDELITY, rows, "[95 % bootstrap interval]")
    ceiling = dense.scores if dense is not None else None
    low = isinstance(ceiling, Retrieval) and ceiling.below_ceiling
    remark = "rate [95 % Wilson interval]; p: exact McNemar test"
    if "score" in setting.options:
        remark = (
            "answered: with all parts; rate: mean share of the parts [95 % bootstrap interval]; p: "
            "exact McNemar test of answered"
        )
    if low:
        remark = f"below ceiling: dense answers less than {CEILING:.0%}, so nobody is ranked"
    rows = tuple(_retrieval_row(found, dense, ranked=not low) for found in group)
    asked = f"{setting.samples} samples, question {setting.options['question']}"
    return Section(f"{where}: {asked}, text {setting.text}", RETRIEVAL, rows, remark)


def _read(setting: Setting) -> str:
    return (
        f"{setting.samples} windows of {setting.options['scored']} scored tokens, read by "
        f"{setting.options['chunk']}, text {setting.text}"
    )


def _fidelity_row(found: Measurement, dense: Measurement | None) -> tuple[str, ...]:
    scores = found.scores
    assert isinstance(scores, Fidelity)
    ratio, ratios = estimate(RATIO, found)
    kl, kls = estimate(KL, found)
    return (
        *_first(found, dense),
        f"{scores.perplexity:.3f}",
        f"{ratio:.4f}{_interval(ratios, '.4f')}",
        f"{kl:.2g}{_interval(kls, '.2g')}",
        f"{scores.flips:.1%}",
    )


def _retrieval_row(
    found: Measurement, dense: Measurement | None, *, ranked: bool
) -> tuple[str, ...]:
    scores = found.scores
    assert isinstance(scores, Retrieval)
    rate, edges = estimate(RATE, found)
    p = "-"
    if ranked and dense is not None and dense is not found:
        assert isinstance(dense.scores, Retrieval)
        p = f"{mcnemar(dense.scores.answered, scores.answered):.2g}"
    return (
        *_first(found, dense),
        f"{sum(scores.answered)} of {len(scores.hits)}",
        f"{rate:.0%}{_interval(edges, '.0%')}",
        p,
    )


def _first(found: Measurement, dense: Measurement | None) -> tuple[str, str, str]:
    size = found.scores.cache_bytes
    share = "-" if dense is None else f"{size / dense.scores.cache_bytes:.0%}"
    return found.label, f"{size / 2**20:.2f} MiB", share


def _interval(edges: tuple[float, float] | None, spec: str) -> str:
    return "" if edges is None else f" [{edges[0]:{spec}}, {edges[1]:{spec}}]"
